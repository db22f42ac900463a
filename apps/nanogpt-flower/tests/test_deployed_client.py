"""A client of a deployment refuses some requests, and tells the server nothing of its text."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from flower_adapter import Policy, PolicyError, Refusal, to_arrays
from flower_adapter.protocol import ATTEMPTS, MIN_REPLIES, RUN
from flower_adapter.testing import LocalGrid
from nanogpt_flower.client_app import app, build_model, measure, measure_part
from nanogpt_flower.client_node import default_policy, label_from, policy, read_policy
from nanogpt_flower.client_text import label
from nanogpt_flower.preset import all_presets
from nanogpt_flower.settings import Settings
from shakespeare_data import load_corpus, partition

pytestmark = pytest.mark.deployed
MakeContext = Callable[..., Context]
TOKEN = "0" * 64
# for a tiny model and short rounds
RULES = """
min-replies = 2
[run-config]
max-steps = { min = 1 }
learning-rate = { min = 1e-5 }
[limits]
characters = { min = 0 }
steps = { min = 0 }
windows = { min = 0 }
tokens = { min = 0 }
learning-rate-sum = { min = 0 }
parameters = { max = 100_000 }
"""


@pytest.fixture(autouse=True)
def server_identity() -> None:
    LocalGrid(app, 0)  # lets this process make messages, as a ServerApp does


@pytest.fixture
def part(text_file: Path, tmp_path: Path) -> Path:
    """A directory with private text."""
    return partition(load_corpus(str(text_file)), 2).write(tmp_path / "private")[0]


@pytest.fixture
def deployed(context: MakeContext, part: Path, tmp_path: Path) -> MakeContext:
    (tmp_path / "policy.toml").write_text(RULES, encoding="utf-8")

    def make(node: dict[str, Any] | None = None, **run_config: Any) -> Context:
        own = {
            "data-path": str(part),
            "state-path": str(tmp_path / "state"),
            "policy": str(tmp_path / "policy.toml"),
        }
        return context({**own, **(node or {})}, **{"max_steps": 3, **run_config})

    return make


def message(
    config: ConfigRecord, here: Context, kind: str = "train", seed: int = 0, **changes: Any
) -> Message:
    torch.manual_seed(seed)
    fields = {**config, MIN_REPLIES: 2, RUN: TOKEN, **changes}
    record = ConfigRecord({key: value for key, value in fields.items() if value is not None})
    arrays = to_arrays(build_model(config, here))
    return Message(RecordDict({"arrays": arrays, "config": record}), 2, kind)


def update(reply: Message) -> dict[str, bytes]:
    assert not reply.has_error(), reply.error
    return {name: array.data for name, array in reply.content["arrays"].items()}


def reason(reply: Message) -> str:
    assert reply.has_error()
    return reply.error.reason or ""


# S1: which text the client reads


def test_a_path_in_a_message_opens_no_file(
    context: MakeContext, to_clients: ConfigRecord, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text(RULES, encoding="utf-8")
    node = {
        "partition-id": 0,
        "num-partitions": 2,
        "policy": str(tmp_path / "policy.toml"),
    }
    here = context(node)
    assert to_clients["corpus"] == str(text_file)
    refused = reason(app(message(to_clients, here), here))
    assert refused.startswith("data: this client cannot train on its text with these settings")
    own = context({**node, "corpus-path": str(text_file)})
    other = message(to_clients, own, corpus="/etc/shadow")
    assert not app(other, own).has_error()


# S2: how little text an update may hold


def test_one_window_of_text_is_refused_by_the_default_policy(
    context: MakeContext, to_clients: ConfigRecord, part: Path
) -> None:
    here = context({"data-path": str(part)}, batch_size=1, max_steps=1, dropout=0.0)
    refused = reason(app(message(to_clients, here), here))
    assert refused == "policy: batch-size is 1, this client allows 8 to 512"


@pytest.mark.parametrize("name", all_presets())
def test_the_default_policy_permits_all_presets_but_the_shortest(name: str) -> None:
    preset = all_presets()[name]
    settings = preset.settings
    part = partition(load_corpus("auto"), preset.clients)[0]
    default_policy().check_settings(settings.to_run_config())
    measured = measure_part(settings, part, part.tokenizer, 1)
    assert settings.num_server_rounds <= default_policy().max_rounds
    if name == "fast":
        with pytest.raises(Refusal, match="policy"):
            default_policy().check_limits(measured)
    else:
        default_policy().check_limits(measured)


def test_the_default_policy_names_each_setting_that_a_client_uses() -> None:
    """A setting that only the server uses needs no range."""
    of_the_server = {
        "seed", "corpus", "partition", "fraction-train", "fraction-evaluate",
        "min-clients", "min-replies", "max-failed-rounds", "round-timeout", "outer-learning-rate",
        "outer-momentum", "uplink", "downlink", "keep-checkpoints", "resume-from", "client-state",
        "sample-tokens", "round-sample-tokens", "sample-prompt", "temperature", "top-k",
        "output-dir", "run-name", "report-to", "max-weight-ratio",
    }  # fmt: skip
    named = set(default_policy().run_config)
    assert named | of_the_server >= set(Settings().to_run_config())
    assert not named & of_the_server


def test_a_node_without_a_policy_has_the_default_one(context: MakeContext, part: Path) -> None:
    assert policy(context({"data-path": str(part)})) == default_policy()


def test_a_bad_policy_file_refuses_everything_and_stays_private(
    deployed: MakeContext, to_clients: ConfigRecord, tmp_path: Path
) -> None:
    here = deployed()
    (tmp_path / "policy.toml").write_text("max-round = 3", encoding="utf-8")
    refused = reason(app(message(to_clients, here), here))
    assert refused.startswith("error: this client failed with PolicyError; its log has the details")


def test_the_measure_of_a_message_is_what_training_will_do(
    deployed: MakeContext, to_clients: ConfigRecord
) -> None:
    here = deployed(max_steps=7)
    measured = measure(to_clients, here)
    model = build_model(to_clients, here)
    assert measured["parameters"] == sum(p.numel() for p in model.parameters())
    reply = app(message(to_clients, here), here)
    assert reply.content["metrics"]["tokens"] == measured["tokens"] == 7 * 8 * 16
    assert (measured["steps"], measured["windows"]) == (7, 7 * 8)
    assert measured["characters"] == reply.content["metrics"]["num-examples"]
    # the 7 first of 20 steps of warm-up to the rate 0.01
    assert measured["learning-rate-sum"] == pytest.approx(sum(0.01 * k / 20 for k in range(1, 8)))


def test_a_round_that_takes_too_long_is_given_up(
    deployed: MakeContext, to_clients: ConfigRecord, tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text(f"{RULES}seconds = {{ max = 1e-9 }}", encoding="utf-8")
    here = deployed()
    assert "the round takes longer than 1e-09 seconds" in reason(
        app(message(to_clients, here), here)
    )


# S2: what the client draws


def test_two_clients_with_one_text_draw_different_windows(
    deployed: MakeContext, to_clients: ConfigRecord, tmp_path: Path
) -> None:
    one = deployed()
    other = deployed({"state-path": str(tmp_path / "other")})
    mine, theirs = app(message(to_clients, one), one), app(message(to_clients, other), other)
    assert update(mine) != update(theirs)
    assert mine.content["client"]["label"] != theirs.content["client"]["label"]


def test_the_same_request_draws_the_same_windows_and_any_other_does_not(
    deployed: MakeContext, to_clients: ConfigRecord
) -> None:
    def losses(here: Context, **changes: Any) -> Any:
        reply = app(message(to_clients, here, **{RUN: None}, **changes), here)
        assert not reply.has_error(), reply.error
        return reply.content["metrics"]["train-loss"]

    first = losses(deployed())
    assert losses(deployed()) == first
    assert losses(deployed(), seed=1) != first  # other weights
    one_more = losses(deployed(warmup_steps=21))
    assert one_more != first


def test_a_reproducible_client_draws_what_a_simulated_one_with_its_label_would(
    deployed: MakeContext, to_clients: ConfigRecord, tmp_path: Path
) -> None:
    one = deployed({"reproducible": True})
    other = deployed({"reproducible": True, "state-path": str(tmp_path / "other")})
    assert update(app(message(to_clients, one), one)) == update(
        app(message(to_clients, other), other)
    )
    assert label(one) == label(other)
    assert not (tmp_path / "other" / "secret").exists()


# S3 and S4: the client's state


def test_only_the_token_of_a_run_finds_the_state_of_the_run(
    deployed: MakeContext, to_clients: ConfigRecord
) -> None:
    def second_round(token: str | None) -> dict[str, bytes]:
        here = deployed()  # a restarted client
        return update(app(message(to_clients, here, **{RUN: token, "server-round": 2}), here))

    here = deployed()
    app(message(to_clients, here), here)
    known, unknown, none = second_round(TOKEN), second_round("1" * 64), second_round(None)
    assert unknown == none
    assert known != none


def test_the_run_config_does_not_say_where_a_client_writes(
    deployed: MakeContext, to_clients: ConfigRecord, tmp_path: Path
) -> None:
    here = deployed({"state-path": ""}, client_state=str(tmp_path / "elsewhere"))
    assert not app(message(to_clients, here), here).has_error()
    assert not (tmp_path / "elsewhere").exists()


def test_a_client_writes_in_its_state_path_alone(
    deployed: MakeContext, to_clients: ConfigRecord, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    for changes in ({}, {ATTEMPTS: ["1:../../../out"]}, {RUN: "../out"}):
        here = deployed()
        app(message(to_clients, here, **changes), here)
    written = set(tmp_path.rglob("*")) - before
    assert written
    assert all(path.is_relative_to(tmp_path / "state") for path in written)
    modes = {path.stat().st_mode & 0o077 for path in written if not path.name.endswith(".lock")}
    assert modes == {0}


# S5: memory


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"n_embd": 8000, "n_head": 8}, "policy: n-embd is 8000, this client allows 8 to 384"),
        ({"n_layer": 12, "n_embd": 384}, "policy: parameters is out of range, this client"),
        ({"block_size": 10**9}, "policy: block-size is 1000000000"),
        ({"n_embd": 9}, "settings: a setting of the run is not allowed"),
    ],
)
def test_a_model_that_is_too_large_is_refused_before_it_is_built(
    changes: dict[str, Any], code: str, deployed: MakeContext, to_clients: ConfigRecord
) -> None:
    sent = message(to_clients, deployed())
    tracemalloc.start()
    refused = reason(app(sent, deployed(**changes)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused.startswith(code)
    assert peak < 2**24


def test_arrays_are_compared_before_a_model_is_built(
    deployed: MakeContext, to_clients: ConfigRecord, tmp_path: Path
) -> None:
    anything = f"{RULES}[run-config.n-embd]\nmin = 1\n[limits.seconds]\nmin = 0"
    anything = anything.replace("parameters = { max = 100_000 }", "parameters = { min = 1 }")
    (tmp_path / "policy.toml").write_text(anything, encoding="utf-8")
    here = deployed(n_embd=8000, n_head=8)
    sent = message(to_clients, deployed())
    huge = Array("float32", (16_000, 16_000), "numpy.ndarray", b"\x93NUMPY" + bytes(126))
    for arrays in (sent.content["arrays"], ArrayRecord({"ln_f.weight": huge})):
        sent.content["arrays"] = arrays
        refused = reason(app(sent, here))
        assert refused.startswith("error: this client failed with ArrayMismatch")


# P4: what the server learns from an error


def test_no_error_tells_of_the_text_its_place_or_its_size(
    deployed: MakeContext, to_clients: ConfigRecord, part: Path, tmp_path: Path
) -> None:
    meta = json.loads((part / "meta.json").read_text(encoding="utf-8"))
    secrets = [str(tmp_path), part.name, "Traceback", ".py", str(meta)[:20]]
    secrets += [str(len((part / "train.bin").read_bytes()) // size) for size in (1, 2)]
    other = ConfigRecord({**to_clients, "tokenizer": '{"type": "char", "vocab": "xyz"}'})
    refusals = [
        reason(app(message(to_clients, deployed()), here))
        for here in (
            deployed(block_size=100_000),
            deployed({"data-path": str(tmp_path / "gone")}),
            deployed({"policy": str(tmp_path / "gone")}),
            deployed({"data-path": str(tmp_path)}),
        )
    ]
    sent = message(to_clients, deployed())
    sent.content["config"]["tokenizer"] = other["tokenizer"]
    refusals.append(reason(app(sent, deployed())))
    refusals.append(reason(app(message(to_clients, deployed(), kind="query"), deployed())))
    for refused in refusals:
        assert not [secret for secret in secrets if secret in refused]
        assert "SHA-256" not in refused
        assert "\n" not in refused
        assert len(refused) < 200


def test_a_label_tells_nothing_of_the_text(deployed: MakeContext, part: Path) -> None:
    meta = json.loads((part / "meta.json").read_text(encoding="utf-8"))
    name = label(deployed())
    assert name == label(deployed())
    assert str(part) not in name
    assert not [v for v in map(str, meta.values()) if len(v) > 5 and v[:6] in name]
    assert name != label_from(b"", "anything")


def test_the_audit_log_and_the_count_of_rounds_stay_with_the_client(
    deployed: MakeContext, to_clients: ConfigRecord, tmp_path: Path
) -> None:
    app(message(to_clients, deployed()), deployed())
    query = Message(RecordDict(), 2, "query.label")
    app(query, deployed())
    app(message(to_clients, deployed(), **{MIN_REPLIES: 1}), deployed())
    lines = [
        json.loads(line)
        for line in (tmp_path / "state" / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["message"] for line in lines] == ["train", "query.label", "train"]
    assert [bool(line["refused"]) for line in lines] == [False, False, True]
    assert lines[0]["settings"]["batch-size"] == 8
    assert (tmp_path / "state" / "rounds.json").exists()


def test_the_default_policy_is_what_its_file_says() -> None:
    assert default_policy().min_replies == 2
    assert default_policy() != Policy()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[limits]\nparamters = { max = 8 }", "limits has 'paramters', should have only charact"),
        ("[run-config]\nbatchsize = { min = 8 }", "run-config has 'batchsize', should have only"),
        ("[run-config]\noptimizer = { min = 8 }", "run-config.optimizer allows at least 8, should"),
        ('[run-config]\noptimizer = { one-of = ["sgdd"] }', "run-config.optimizer allows one of"),
        ('messages = ["trian"]', "messages has 'trian', should have only train, evaluate, query"),
        ('queries = ["vocabluary"]', "queries has 'vocabluary', should have only label, vocab"),
    ],
)
def test_a_policy_file_with_a_typing_error_is_an_error(
    text: str, error: str, tmp_path: Path
) -> None:
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    with pytest.raises(PolicyError) as caught:
        read_policy(tmp_path / "own.toml")
    assert error in str(caught.value)


def test_a_policy_file_that_changes_one_line_keeps_the_floors(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("max-rounds = 5", encoding="utf-8")
    assert read_policy(tmp_path / "own.toml") == replace(default_policy(), max_rounds=5)
