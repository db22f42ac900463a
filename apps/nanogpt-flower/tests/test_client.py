import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower_adapter import Refusal, restore_state, to_arrays
from flower_adapter.protocol import RUN
from flower_adapter.testing import LocalGrid
from nanogpt_flower.client_app import app, build_model, evaluate_part, num_steps, train
from nanogpt_flower.client_node import state_path, text_name
from nanogpt_flower.client_text import client_part
from nanogpt_flower.composition import client_seed
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, DataError, load_corpus, partition

MakeContext = Callable[..., Context]


def trained(context: Context, config: ConfigRecord) -> tuple[torch.nn.Module, dict[str, float]]:
    torch.manual_seed(0)
    model = build_model(config, context)
    return model, train(model, config, context)


def cause_of_refusal(context: Context, config: ConfigRecord) -> str:
    """Return what the client's log says of a refusal because of the text."""
    with pytest.raises(Refusal, match="data: this client cannot train on its text") as caught:
        trained(context, config)
    assert isinstance(caught.value.__cause__, DataError)
    return str(caught.value.__cause__)


def test_a_round_of_training_lowers_the_loss_on_the_validation_part(
    context: MakeContext, to_clients: ConfigRecord
) -> None:
    here = context()
    before = evaluate_part(build_model(to_clients, here), to_clients, here)
    model, metrics = trained(here, to_clients)
    after = evaluate_part(model, to_clients, here)
    assert after["val-loss"] < before["val-loss"] - 0.5
    assert metrics["num-examples"] == 3600
    assert after["num-examples"] == 399


def test_equal_seeds_train_equal_models_and_rounds_differ(
    context: MakeContext, to_clients: ConfigRecord
) -> None:
    first, again = trained(context(), to_clients), trained(context(), to_clients)
    for metrics in (first[1], again[1]):
        assert metrics.pop("train-seconds") > 0
        assert metrics["tokens"] == 20 * 8 * 16  # steps x batch-size x block-size
    assert first[1] == again[1]
    for one, other in zip(first[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)
    later = ConfigRecord({**to_clients, "server-round": 2})
    assert trained(context(), later)[1]["train-loss"] != first[1]["train-loss"]


def test_the_optimizer_and_the_warm_up_go_on_where_the_last_round_ended(
    context: MakeContext, to_clients: ConfigRecord
) -> None:
    here = context(max_steps=10)
    model, _ = trained(here, to_clients)
    train(model, to_clients, here)
    state = restore_state(here)
    assert state is not None
    assert state["steps"] == 20
    # AdamW counts its own steps: 20 only if the second round began with the state of the first
    assert {entry["step"].item() for entry in state["optimizer"]["state"].values()} == {20}
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.01


def test_clients_and_rounds_have_different_seeds() -> None:
    pairs = [("left", 1), ("right", 1), ("left", 2)]
    seeds = [client_seed(Settings(), name, server_round) for name, server_round in pairs]
    assert len(set(map(tuple, seeds))) == 3


@pytest.mark.parametrize(
    ("local_epochs", "max_steps", "batch_size", "steps"),
    [
        (1, 50, 64, 50),  # the defaults
        (1, 0, 64, 56),  # one pass over 3,584 windows
        (2, 0, 64, 112),
        (2, 100, 64, 100),
        (1, 50, 3584, 1),
        (1, 0, 3583, 2),
    ],
)
def test_a_round_is_local_epochs_passes_cut_short_at_max_steps(
    context: MakeContext,
    to_clients: ConfigRecord,
    local_epochs: int,
    max_steps: int,
    batch_size: int,
    steps: int,
) -> None:
    given = {"local_epochs": local_epochs, "max_steps": max_steps, "batch_size": batch_size}
    settings = Settings.from_run_config(context(**given).run_config)
    part = client_part(settings, to_clients, context())
    assert len(part.train) - settings.block_size == 3584
    assert num_steps(settings, part) == steps


def test_the_defaults_take_fifty_steps_on_half_of_tiny_shakespeare() -> None:
    class Half:
        train = np.zeros(1_003_854 // 2, np.uint16)

    assert num_steps(Settings(), Half()) == 50  # type: ignore[arg-type]


def test_a_data_path_is_trained_on_and_nothing_else(
    context: MakeContext, to_clients: ConfigRecord, text_file: Path, tmp_path: Path
) -> None:
    parts = partition(load_corpus(str(text_file)), 2).write(tmp_path / "parts")
    here = context({"data-path": str(parts[1]), "partition-id": 0, "num-partitions": 2})
    settings = Settings.from_run_config(here.run_config)
    elsewhere = ConfigRecord({**to_clients, "corpus": "no such corpus"})
    part = client_part(settings, elsewhere, here)
    expected = np.fromfile(parts[1] / "train.bin", dtype="<u2")
    assert np.array_equal(part.train, expected)
    assert text_name(here) == str(parts[1])


def test_a_part_of_another_vocabulary_is_refused_with_both_named(
    context: MakeContext, to_clients: ConfigRecord, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("zyxw" * 500, encoding="utf-8")
    (part, *_) = partition(load_corpus(str(other)), 2).write(tmp_path / "parts")
    with pytest.raises(Refusal, match="vocabulary: the text has other characters") as caught:
        trained(context({"data-path": str(part)}), to_clients)
    message = str(caught.value.__cause__)
    model = CharTokenizer.from_json(str(to_clients["tokenizer"]))
    assert str(part) in message
    assert f"{model.vocab_size} characters" in message
    assert "only in the first: 'xz'" in message


def test_another_corpus_than_the_servers_is_refused(
    context: MakeContext, to_clients: ConfigRecord
) -> None:
    other = ConfigRecord({**to_clients, "corpus-sha256": "0" * 64})
    assert "has SHA-256" in cause_of_refusal(context(), other)


def test_a_part_too_short_for_the_block_is_refused(
    context: MakeContext, to_clients: ConfigRecord
) -> None:
    cause = cause_of_refusal(context(block_size=1000), to_clients)
    assert "block-size 1000 needs at least 1001" in cause


def test_more_clients_than_the_text_can_feed_are_refused(
    context: MakeContext, to_clients: ConfigRecord
) -> None:
    here = context({"partition-id": 3, "num-partitions": 500})
    assert re.search("of 500 .* allows at most 47 clients", cause_of_refusal(here, to_clients))


def test_a_node_without_data_is_told_what_to_give(
    context: MakeContext, to_clients: ConfigRecord
) -> None:
    assert "data-path" in cause_of_refusal(context({}), to_clients)


def test_a_simulated_client_keeps_its_state_where_the_run_says(context: MakeContext) -> None:
    assert state_path(context()) is None
    here = context(client_state="/of/the/run")
    assert state_path(here) == Path("/of/the/run/partition 0000 of 2")


def test_a_restarted_client_goes_on_with_its_optimizer(
    context: MakeContext,
    to_clients: ConfigRecord,
    tmp_path: Path,
) -> None:
    LocalGrid(app, 0)  # lets this process make messages, as a ServerApp does

    def round_of(here: Context, server_round: int) -> RecordDict:
        torch.manual_seed(0)
        arrays = to_arrays(build_model(to_clients, here))
        config = ConfigRecord({**to_clients, "server-round": server_round, RUN: "0" * 64})
        reply = app(Message(RecordDict({"arrays": arrays, "config": config}), 2, "train"), here)
        assert not reply.has_error(), reply.error
        return reply.content

    living = context(max_steps=5)
    round_of(living, 1)
    forgetful, durable = context(max_steps=5), {"client_state": str(tmp_path), "max_steps": 5}
    round_of(context(**durable), 1)
    restarted = round_of(context(**durable), 2)
    assert restarted["arrays"] == round_of(living, 2)["arrays"]
    assert restarted["arrays"] != round_of(forgetful, 2)["arrays"]
    assert [path.name for path in tmp_path.iterdir()] == ["partition 0000 of 2"]


def test_each_file_of_a_text_is_opened_once_a_message_and_not_again_while_unchanged(
    context: MakeContext, to_clients: ConfigRecord, text_file: Path, tmp_path: Path
) -> None:
    LocalGrid(app, 0)
    copy = tmp_path / "text.txt"
    copy.write_bytes(text_file.read_bytes())
    (part, _) = partition(load_corpus(str(text_file)), 2).write(tmp_path / "parts")
    opened: list[str] = []
    watched = tuple(map(str, (part, copy)))

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(watched):
            opened.append(Path(str(arguments[0])).name)

    sys.addaudithook(watch)

    def opens(kind: str, here: Context, config: ConfigRecord) -> list[str]:
        arrays = to_arrays(build_model(config, here))
        message = Message(RecordDict({"arrays": arrays, "config": config}), 2, kind)
        opened.clear()
        reply = app(message, here)
        assert not reply.has_error(), reply.error
        return sorted(opened)

    deployed = context({"data-path": str(part)}, max_steps=1)
    assert opens("train", deployed, to_clients) == ["meta.json", "train.bin", "val.bin"]
    assert opens("evaluate", deployed, to_clients) == []
    (part / "meta.json").touch()  # changed, as far as anyone can tell
    assert opens("evaluate", deployed, to_clients) == ["meta.json", "train.bin", "val.bin"]

    simulated = context(max_steps=1)
    of_copy = ConfigRecord({**to_clients, "corpus": str(copy)})
    assert opens("train", simulated, of_copy) == ["text.txt"]
    assert opens("evaluate", simulated, of_copy) == []


def test_a_client_trains_without_importing_the_compiler_of_torch(tmp_path: Path) -> None:
    """The import takes more than a second of the first message of each worker."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys, types
sys.modules["ray"] = types.SimpleNamespace(is_initialized=lambda: True)
from flower_adapter import run_rounds, to_arrays
from flower_adapter.testing import LocalGrid
from gpt_core import GPT
from nanogpt_flower.client_app import app
from nanogpt_flower.composition import model_config
from nanogpt_flower.server_app import config_for_clients, strategy
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, load_corpus
settings = Settings(
    n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=1, max_steps=1, optimizer="muon",
    corpus=sys.argv[1],
)
corpus = load_corpus(settings.corpus)
tokenizer = CharTokenizer.from_text(corpus.text)
grid = LocalGrid(app, 2, run_config=settings.to_run_config())
config = config_for_clients(corpus, tokenizer)
model = GPT(model_config(settings, tokenizer.vocab_size))
run_rounds(
    grid, strategy(settings), to_arrays(model), num_rounds=2, train_config=config,
    evaluate_config=config,
)
print("torch._dynamo" in sys.modules)
""",
        encoding="utf-8",
    )
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be. " * 40, encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, str(script), str(text)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split()[-1] == "False"
