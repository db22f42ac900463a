"""Runs that are cut off anywhere and go on, against runs of Flower's own `start` that are not."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    Result,
    Strategy,
)
from flwr.supercore.task_identity import TaskIdentity
from localgrid import LocalGrid
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn

import flower_adapter.checkpoint
import flower_adapter.durable
from flower_adapter import (
    Checkpoint,
    Checkpointed,
    CheckpointError,
    Durable,
    Guarded,
    OuterOptimizer,
    RoundFailed,
    Seeded,
    StreamingFedAvg,
    Wired,
    checkpoints,
    load_arrays,
    read_checkpoint,
    restore_state,
    save_state,
    to_arrays,
    torch_client_app,
    wire_mod,
)
from flower_adapter.checkpoint import round_of

ROUNDS = 6
CUT = 4  # the round in which single runs are cut off
FILES = ("arrays.safetensors", "round.json", "state.safetensors")
Look = Callable[[str, int, int], None]  # at phase, partition and round


class Cut(Exception):
    """The end of a process; no client or strategy knows it."""


@pytest.fixture(autouse=True)
def nothing_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def new_model(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2))


def loss_of(model: nn.Module, partition: int, server_round: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(100 * partition + server_round)
    x = torch.randn(8, 6, generator=chance)
    return nn.functional.mse_loss(model(x), x[:, :2].sin() + partition)


def client_app(state: Path | None = None, look: Look = lambda *_: None) -> ClientApp:
    """Clients with momentum from round to round, which is lost without their state."""

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        partition, at = int(context.node_config["partition-id"]), int(config["server-round"])
        look("train", partition, at)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        restore_state(context, valid_for=model, optimizer=optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(model, partition, at)
            loss.backward()
            optimizer.step()
        save_state(context, valid_for=model, optimizer=optimizer)
        return {"num-examples": 8 + partition, "loss": loss.item()}

    def evaluate(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        partition, at = int(context.node_config["partition-id"]), int(config["server-round"])
        look("evaluate", partition, at)
        with torch.no_grad():
            return {"num-examples": 8, "client-loss": loss_of(model, partition, 0).item()}

    mods = [wire_mod] if state is None else [Durable(state), wire_mod]
    return torch_client_app(lambda config, context: new_model(), train, evaluate, mods=mods)


def server_loss(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    model = new_model()
    load_arrays(model, arrays)
    with torch.no_grad():
        return MetricRecord({"server-loss": loss_of(model, 9, 0).item()})


def average(**options: Any) -> Seeded:
    return Seeded(Guarded(StreamingFedAvg(**options)), seed=3)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: Seeded(FedAvg(), seed=3),
    "StreamingFedAvg": average,
    "FedAvgM": lambda: Seeded(
        Guarded(FedAvgM(server_learning_rate=0.5, server_momentum=0.9)), seed=3
    ),
    "FedAdam": lambda: Seeded(Guarded(FedAdam(eta=0.02)), seed=3),
    "FedYogi": lambda: Seeded(Guarded(FedYogi(eta=0.02)), seed=3),
    "FedAdagrad": lambda: Seeded(Guarded(FedAdagrad(eta=0.02)), seed=3),
    "OuterOptimizer": lambda: Seeded(Guarded(OuterOptimizer(StreamingFedAvg())), seed=3),
    "Wired 2-bit": lambda: Seeded(
        Guarded(Wired(OuterOptimizer(StreamingFedAvg()), uplink="2-bit", downlink="2-bit")), seed=3
    ),
    "Wired 2-bit without evaluation": lambda: Seeded(
        Guarded(Wired(StreamingFedAvg(fraction_evaluate=0.0), uplink="2-bit", downlink="2-bit")),
        seed=3,
    ),
    "Wired 2-bit up, exact down": lambda: Seeded(
        Wired(Guarded(StreamingFedAvg()), uplink="2-bit", downlink="fp32"), seed=3
    ),
    "Wired 2-bit of a fraction": lambda: Seeded(
        Guarded(Wired(StreamingFedAvg(fraction_train=0.4), uplink="2-bit", downlink="2-bit")),
        seed=3,
    ),
    "adaptive clipping with noise": lambda: Seeded(
        DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.05, 3, 0.3), seed=3
    ),
    "Seeded fraction": lambda: average(
        fraction_train=0.4, fraction_evaluate=0.6, min_train_nodes=1, min_evaluate_nodes=1
    ),
}


def start(
    strategy: Strategy,
    app: ClientApp,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
    evaluate_fn: Any = server_loss,
    model: nn.Module | None = None,
) -> Result:
    """A run in a process of its own: new nodes, contexts and random states, by `seed`."""
    grid = LocalGrid(app, 3, seed, run_id=1 + seed)
    initial = to_arrays(new_model() if model is None else model)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return strategy.start(grid, initial, num_rounds=rounds, evaluate_fn=evaluate_fn)


def figures(result: Result) -> dict[str, Any]:
    return {
        "arrays": {name: array.numpy().tobytes() for name, array in result.arrays.items()},
        "train": result.train_metrics_clientapp,
        "evaluate": result.evaluate_metrics_clientapp,
        "server": result.evaluate_metrics_serverapp,
    }


def uninterrupted(name: str = "Wired 2-bit", rounds: int = ROUNDS) -> dict[str, Any]:
    """What Flower's own `start` gives, without checkpoints and without `Durable`."""
    return figures(start(STRATEGIES[name](), client_app(), rounds=rounds))


def cut_after(server_round: int) -> Callable[[int, ArrayRecord], MetricRecord]:
    """The server's evaluation, which ends the process after the round before was checkpointed."""

    def evaluate(at: int, arrays: ArrayRecord) -> MetricRecord:
        if at == server_round + 1:
            raise Cut
        return server_loss(at, arrays)

    return evaluate


def files_in(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def rounds_in(directory: Path) -> list[int]:
    return [round_of(path) for path in checkpoints(directory)]


def run(
    directory: Path,
    *,
    name: str = "StreamingFedAvg",
    rounds: int = ROUNDS,
    model: nn.Module | None = None,
    evaluate_fn: Any = server_loss,
    **options: Any,
) -> Result:
    """A run with checkpoints of clients whose state dies with it."""
    strategy = Checkpointed(STRATEGIES[name](), directory, **options)
    return start(strategy, client_app(), rounds=rounds, model=model, evaluate_fn=evaluate_fn)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_that_is_cut_off_in_every_round_is_the_uninterrupted_one(
    name: str, tmp_path: Path
) -> None:
    def attempt(number: int, evaluate_fn: Any) -> Result:
        resume = tmp_path / "checkpoints" if number else None
        strategy = Checkpointed(STRATEGIES[name](), tmp_path / "checkpoints", resume_from=resume)
        app = client_app(tmp_path / "state")
        return start(strategy, app, seed=number, evaluate_fn=evaluate_fn)

    for k in range(ROUNDS):
        with pytest.raises(Cut):
            attempt(k, cut_after(k))
        assert rounds_in(tmp_path / "checkpoints")[-1] == k
    assert figures(attempt(99, server_loss)) == uninterrupted(name)


def test_without_durable_the_clients_of_a_resumed_run_start_anew(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        run(tmp_path, evaluate_fn=cut_after(3))
    resumed = figures(run(tmp_path, resume_from=tmp_path))
    expected = uninterrupted("StreamingFedAvg")
    assert resumed["server"][3] == expected["server"][3]
    assert resumed["server"][4] != expected["server"][4]


PARTIAL, PRUNED = f".round-{CUT:06d}.partial", f"round-{CUT - 3:06d}"
# Where a process may end: an attribute to replace, and when a call of it is the last.
CALLS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "before the arrays": (
        flower_adapter.checkpoint,
        "write_file",
        lambda path, *_: path.match(f"{PARTIAL}/arrays.safetensors"),
    ),
    "before the state": (
        flower_adapter.checkpoint,
        "write_file",
        lambda path, *_: path.match(f"{PARTIAL}/state.safetensors"),
    ),
    "before the move": (Path, "rename", lambda path, _: path.name == PARTIAL),
    "after the move": (
        flower_adapter.checkpoint,
        "sync",
        lambda path: (path / f"round-{CUT:06d}").exists(),
    ),
    "before the oldest is hidden": (Path, "rename", lambda path, _: path.name == PRUNED),
    "before the hidden is removed": (
        shutil,
        "rmtree",
        lambda path, **_: Path(path).match(f".{PRUNED}.removed") and Path(path).exists(),
    ),
    "before a client's state": (
        flower_adapter.durable,
        "write_file",
        lambda path, *_: path.match(f"partition 0001/*/.round-{CUT:06d}.safetensors"),
    ),
    "before a client's state is moved": (
        Path,
        "replace",
        lambda path, _: path.match(f"partition 0001/*/.round-{CUT:06d}.safetensors"),
    ),
    "after a client's state is moved": (
        flower_adapter.durable,
        "sync",
        lambda path: (
            path.match("partition 0001/*") and (path / f"round-{CUT:06d}.safetensors").exists()
        ),
    ),
}


@pytest.mark.parametrize("moment", CALLS)
def test_a_run_that_is_cut_off_while_it_writes_is_the_uninterrupted_one(
    moment: str, tmp_path: Path
) -> None:
    place, attribute, is_last = CALLS[moment]
    original = getattr(place, attribute)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_last(*args, **kwargs):
            return original(*args, **kwargs)
        if attribute == "write_file":
            args[0].write_bytes(b"torn")
        if attribute == "rmtree":
            next(Path(args[0]).iterdir()).unlink()
        raise Cut

    directory, app = tmp_path / "checkpoints", client_app(tmp_path / "state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, attribute, call)
        with pytest.raises(Cut):
            start(Checkpointed(STRATEGIES["Wired 2-bit"](), directory), app)
    assert rounds_in(directory)[-1] in (CUT - 1, CUT)
    resumed = Checkpointed(STRATEGIES["Wired 2-bit"](), directory, resume_from=directory)
    assert figures(start(resumed, app, seed=7)) == uninterrupted()
    assert sorted(path.name for path in directory.iterdir()) == [
        f"round-{at:06d}" for at in (ROUNDS - 2, ROUNDS - 1, ROUNDS)
    ]


@pytest.mark.parametrize("partition", [0, 1, 2])
@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_run_that_is_cut_off_while_clients_work_is_the_uninterrupted_one(
    phase: str, partition: int, tmp_path: Path
) -> None:
    def look(*now: Any) -> None:
        if now == (phase, partition, CUT):
            raise Cut

    directory, state = tmp_path / "checkpoints", tmp_path / "state"
    with pytest.raises(Cut):
        start(
            Checkpointed(STRATEGIES["Wired 2-bit"](), directory),
            client_app(state, look),
        )
    resumed = Checkpointed(STRATEGIES["Wired 2-bit"](), directory, resume_from=directory)
    assert figures(start(resumed, client_app(state), seed=7)) == uninterrupted()


def test_a_run_goes_on_from_an_older_checkpoint_into_another_directory(tmp_path: Path) -> None:
    first, second, state = tmp_path / "first", tmp_path / "second", tmp_path / "state"
    name = "Wired 2-bit"
    start(Checkpointed(STRATEGIES[name](), first), client_app(state))
    older = first / f"round-{CUT:06d}"
    resumed = Checkpointed(STRATEGIES[name](), second, resume_from=older)
    assert figures(start(resumed, client_app(state), seed=7)) == uninterrupted(name)
    assert rounds_in(second) == [CUT + 1, CUT + 2]


def test_a_run_goes_on_to_more_rounds_than_it_was_begun_with(tmp_path: Path) -> None:
    directory, app = tmp_path / "checkpoints", client_app(tmp_path / "state")
    start(Checkpointed(average(), directory), app, rounds=2)
    resumed = Checkpointed(average(), directory, resume_from=directory)
    assert figures(start(resumed, app, seed=7)) == uninterrupted("StreamingFedAvg")


def test_a_finished_run_gives_its_result_again_without_a_message(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = files_in(tmp_path)
    grid = LocalGrid(client_app(), 3, seed=5)
    strategy = Checkpointed(average(), tmp_path, resume_from=tmp_path)
    again = strategy.start(grid, to_arrays(new_model()), ROUNDS, evaluate_fn=server_loss)
    assert figures(again) == figures(first)
    assert grid.sent == []
    assert files_in(tmp_path) == before


def test_an_empty_directory_to_go_on_from_starts_at_round_one(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    result = run(tmp_path, resume_from=tmp_path)
    assert figures(result) == uninterrupted("StreamingFedAvg")
    assert "holds no checkpoint yet: starting at round 1" in flower_log.text


def test_the_random_states_of_the_server_go_on(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []

    def draw(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        drawn.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
        return server_loss(server_round, arrays)

    run(tmp_path / "whole", evaluate_fn=draw)
    whole, drawn = drawn, []
    run(tmp_path / "cut", rounds=2, evaluate_fn=draw)
    resumed = Checkpointed(average(), tmp_path / "cut", resume_from=tmp_path / "cut")
    start(resumed, client_app(), seed=5, evaluate_fn=draw)
    assert drawn == whole


def test_each_checkpoint_is_shown_and_the_one_that_is_resumed_too(tmp_path: Path) -> None:
    shown: list[tuple[int, list[int]]] = []

    def show(checkpoint: Checkpoint) -> None:
        written = read_checkpoint(tmp_path)
        assert written.server_round == checkpoint.server_round
        assert list(written.arrays.items()) == list(checkpoint.arrays.items())
        shown.append((checkpoint.server_round, list(checkpoint.train_metrics)))

    run(tmp_path, rounds=2, on_round=show)
    assert shown == [(0, []), (1, [1]), (2, [1, 2])]
    shown.clear()
    run(tmp_path, rounds=3, on_round=show, resume_from=tmp_path)
    assert shown == [(2, [1, 2]), (3, [1, 2, 3])]


def scripted(losses: list[float | None]) -> Callable[[int, ArrayRecord], MetricRecord | None]:
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        loss = losses[server_round]
        return None if loss is None else MetricRecord({"loss": loss})

    return evaluate


NAN = float("nan")


@pytest.mark.parametrize(
    ("losses", "options", "kept"),
    [
        ([5, 4, 3, 2, 6, 7, 8], {}, [4, 5, 6]),
        ([5, 4, 3, 2, 6, 7, 8], {"keep": 1}, [6]),
        ([5, 4, 3, 2, 6, 7, 8], {"keep": 100}, [0, 1, 2, 3, 4, 5, 6]),
        ([5, 4, 1, 2, 6, 7, 8], {"keep": 2, "best": "loss"}, [2, 5, 6]),
        ([5, 4, 1, 2, 6, 7, 0], {"keep": 2, "best": "loss"}, [5, 6]),
        ([5, 4, 1, 2, 1, 7, 8], {"keep": 1, "best": "loss"}, [2, 6]),
        ([1, 4, 5, 2, 6, 7, 8], {"keep": 2, "best": "loss"}, [0, 5, 6]),
        ([5, 9, 3, 2, 6, 7, 8], {"keep": 2, "best": "loss", "highest_is_best": True}, [1, 5, 6]),
        ([5, NAN, 3, 2, NAN, 7, 8], {"keep": 1, "best": "loss"}, [3, 6]),
        ([None, 2, None, 3, 4, 5, None], {"keep": 1, "best": "loss"}, [1, 6]),
        ([5, 4, 1, 2, 6, 7, 8], {"keep": 2, "best": "perplexity"}, [5, 6]),
    ],
)
def test_the_last_checkpoints_and_the_best_are_kept(
    losses: list[float | None], options: dict[str, Any], kept: list[int], tmp_path: Path
) -> None:
    run(tmp_path, evaluate_fn=scripted(losses), **options)
    assert rounds_in(tmp_path) == kept


def test_without_a_figure_of_the_server_the_clients_tell_the_best(tmp_path: Path) -> None:
    result = run(
        tmp_path, keep=1, best="client-loss", highest_is_best=True, evaluate_fn=lambda *_: None
    )
    by_round = {
        r: float(m["client-loss"])  # type: ignore[arg-type]
        for r, m in result.evaluate_metrics_clientapp.items()
    }
    assert rounds_in(tmp_path) == sorted({max(by_round, key=by_round.__getitem__), ROUNDS})


def test_the_best_of_before_stays_when_a_run_goes_on(tmp_path: Path) -> None:
    evaluate = scripted([5, 1, 3, 4, 6, 7, 8])
    run(tmp_path, rounds=3, evaluate_fn=evaluate, keep=1, best="loss")
    run(tmp_path, evaluate_fn=evaluate, keep=1, best="loss", resume_from=tmp_path)
    assert rounds_in(tmp_path) == [1, 6]


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_checkpoint_is_kept(keep: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"keep is {keep}, should be a whole number of at least 1"):
        Checkpointed(FedAvg(), tmp_path, keep=keep)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    run(tmp_path, rounds=2)
    for name in (".round-000003.partial", ".round-000001.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "arrays.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, rounds=2, resume_from=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", "round-000000", "round-000001", "round-000002"]


def test_the_arrays_are_a_safetensors_file_for_anyone(tmp_path: Path) -> None:
    result = run(tmp_path)
    written = load_file(tmp_path / f"round-{ROUNDS:06d}" / "arrays.safetensors")
    assert written.keys() == new_model().state_dict().keys()
    for name, array in result.arrays.items():
        assert written[name].dtype == np.float32
        assert np.array_equal(written[name], array.numpy())


def test_round_json_tells_the_run_the_round_and_its_metrics(tmp_path: Path) -> None:
    result = run(tmp_path)
    about = json.loads((tmp_path / f"round-{ROUNDS:06d}" / "round.json").read_text())
    assert (about["run"], about["round"]) == ("1", ROUNDS)
    assert about["server-metrics"] == dict(result.evaluate_metrics_serverapp[ROUNDS])
    assert about["train-metrics"] == dict(result.train_metrics_clientapp[ROUNDS])
    assert about["evaluate-metrics"] == dict(result.evaluate_metrics_clientapp[ROUNDS])


def test_round_json_is_json_whatever_the_metrics_are(tmp_path: Path) -> None:
    run(tmp_path, evaluate_fn=scripted([NAN] * (ROUNDS + 1)))

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    text = (tmp_path / f"round-{ROUNDS:06d}" / "round.json").read_text()
    json.loads(text, parse_constant=refuse)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    run(tmp_path, name="FedAdam")
    found = {path.name for path in (tmp_path / f"round-{ROUNDS:06d}").iterdir()}
    assert found == set(FILES)
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata()


def test_another_model_is_refused_and_named(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    before = files_in(tmp_path)
    with pytest.raises(CheckpointError, match="the run was of another model") as caught:
        run(tmp_path, resume_from=tmp_path, model=new_model(width=5))
    assert "0.weight was float32 (4, 6), is float32 (5, 6)" in str(caught.value)
    assert "2.bias" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"2\.weight was float32 .*, is not there"):
        run(tmp_path, resume_from=tmp_path, model=new_model()[:1])  # type: ignore[index]
    assert files_in(tmp_path) == before


def test_another_strategy_is_refused_and_named(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, resume_from=tmp_path, name="FedAdam")
    assert str(caught.value) == (
        "the run was of the strategy Seeded(Guarded(StreamingFedAvg)), "
        "this is Seeded(Guarded(FedAdam))"
    )


def test_a_new_run_does_not_overwrite_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, rounds=2)
    before = files_in(tmp_path)
    with pytest.raises(CheckpointError, match="holds checkpoints up to round 2; give another"):
        run(tmp_path)
    assert files_in(tmp_path) == before


def test_an_older_checkpoint_is_not_gone_on_from_in_its_own_directory(tmp_path: Path) -> None:
    run(tmp_path, rounds=2)
    with pytest.raises(CheckpointError, match=r"up to round 2, which going on from round 1 would"):
        run(tmp_path, resume_from=tmp_path / "round-000001")


def test_a_run_does_not_go_on_among_the_checkpoints_of_another(tmp_path: Path) -> None:
    run(tmp_path / "here", rounds=2)
    strategy = Checkpointed(average(), tmp_path / "there")
    start(strategy, client_app(), seed=5, rounds=2)
    with pytest.raises(CheckpointError, match="here"):
        run(tmp_path / "here", resume_from=tmp_path / "there")


@pytest.mark.parametrize("path", ["nowhere", "round-000007", "old/round-000007"])
def test_a_path_that_does_not_exist_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=path):
        run(tmp_path / "new", resume_from=tmp_path / path)
    assert checkpoints(tmp_path / "new") == []


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_at_every_length(name: str, tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    path = tmp_path / "round-000001" / name
    whole = path.read_bytes().rstrip()
    for size in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="round-000001"):
            run(tmp_path, resume_from=tmp_path)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_one_of_its_files_is_damaged(
    name: str, elsewhere: bool, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    run(old, rounds=1)
    (old / "round-000001" / name).unlink()
    with pytest.raises(CheckpointError, match=f"round-000001.*{name}"):
        run(tmp_path / "new" if elsewhere else old, resume_from=old)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    path = tmp_path / "round-000001" / "round.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="is of format 99, should be of format 1"):
        read_checkpoint(tmp_path)


class Hoarding(FedAvg):
    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept


@pytest.mark.parametrize("kept", [object(), {"inside": [object()]}])
def test_an_attribute_that_cannot_be_saved_is_named_before_the_first_round(
    kept: Any, tmp_path: Path
) -> None:
    grid = LocalGrid(client_app(), 3)
    with pytest.raises(TypeError, match=r"kept.* is a.* object\b.* cannot be saved") as caught:
        Checkpointed(Hoarding(kept), tmp_path).start(grid, to_arrays(new_model()))
    assert "Hoarding" in str(caught.value)
    assert grid.sent == []


class Drawing(FedAvg):
    """It keeps generators and an object with a state_dict, and uses them in each round."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = random.Random(1), np.random.default_rng(1)
        self.three = torch.Generator().manual_seed(1)
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.log: tuple[float, ...] = ()
        self.count = 0

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.count += 1
        with torch.no_grad():
            self.model.weight += torch.rand((), generator=self.three)
        now = (self.one.random(), self.two.random(), self.model.weight.item(), self.count)
        self.log = (*self.log, *now)
        return super().aggregate_train(server_round, replies)


def test_generators_and_modules_of_a_strategy_go_on(tmp_path: Path) -> None:
    whole = Drawing()
    start(whole, client_app())
    start(Checkpointed(Drawing(), tmp_path), client_app(), rounds=2)
    resumed = Drawing()
    start(Checkpointed(resumed, tmp_path, resume_from=tmp_path), client_app(), seed=4)
    assert resumed.log == whole.log


def test_a_setting_that_is_changed_before_going_on_counts(tmp_path: Path) -> None:
    start(Checkpointed(Guarded(FedAdam(eta=0.1)), tmp_path), client_app(), rounds=1)
    resumed = FedAdam(eta=0.2)
    start(Checkpointed(Guarded(resumed), tmp_path, resume_from=tmp_path), client_app(), rounds=2)
    assert resumed.eta == 0.2


def test_a_strategy_that_widens_its_arrays_goes_on(tmp_path: Path) -> None:
    """Flower's adaptive strategies make float64 of float32, where no `Guarded` narrows it."""
    app = client_app(tmp_path / "state")
    directory = tmp_path / "checkpoints"
    start(Checkpointed(Seeded(FedAdam(), seed=3), directory), app, rounds=2)
    resumed = Checkpointed(Seeded(FedAdam(), seed=3), directory, resume_from=directory)
    whole = start(Seeded(FedAdam(), seed=3), client_app())
    assert figures(start(resumed, app, seed=7)) == figures(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_the_previous_checkpoints_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, bytes] = {}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == CUT:
            before.update(files_in(tmp_path))
            write, text = flower_adapter.checkpoint.write_file, Path.write_text

            def write_file(path: Path, *args: Any) -> None:
                if path.name == name:
                    raise full
                write(path, *args)

            def write_text(path: Path, *args: Any, **kwargs: Any) -> int:
                if path.name == name:
                    raise full
                return text(path, *args, **kwargs)

            monkeypatch.setattr(flower_adapter.checkpoint, "write_file", write_file)
            monkeypatch.setattr(Path, "write_text", write_text)
        return server_loss(server_round, arrays)

    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, evaluate_fn=fill)
    whole = {path: data for path, data in files_in(tmp_path).items() if ".partial" not in path}
    assert whole == before
    assert read_checkpoint(tmp_path).server_round == CUT - 1


def test_failed_rounds_in_a_row_are_counted_over_a_cut(tmp_path: Path) -> None:
    def look(phase: str, partition: int, server_round: int) -> None:
        if phase == "train" and server_round in (3, 4):
            raise ValueError("ill")

    def stop(checkpoint: Checkpoint) -> None:
        if checkpoint.server_round == 3:
            raise Cut

    def guarded() -> Guarded:
        return Guarded(StreamingFedAvg(fraction_evaluate=0.0), max_failed_rounds=2)

    app = client_app(look=look)
    with pytest.raises(Cut):
        start(Checkpointed(guarded(), tmp_path, on_round=stop), app)
    assert read_checkpoint(tmp_path).train_metrics[3] == {"num-replies": 0, "num-dropped": 3}
    with pytest.raises(RoundFailed, match="train round 4: 0 good of 3 replies"):
        start(Checkpointed(guarded(), tmp_path, resume_from=tmp_path), app)
    assert read_checkpoint(tmp_path).server_round == 3


KILLS = 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_run_that_is_killed_at_random_moments_is_the_uninterrupted_one(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout.splitlines()[-1])
    assert told["killed"] >= 3, told  # the others may have found the run finished
    last = read_checkpoint(tmp_path / "checkpoints")
    assert last.server_round == ROUNDS
    assert figures(last.result()) == uninterrupted(rounds=ROUNDS)


def run_until_finished(directory: Path) -> None:
    """Resume a run in child processes, of which the first are killed, until one ends by itself."""
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # what a killed process has written is there without
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 1)
    chance, killed = random.Random(os.getpid()), 0
    for name in ("warm-up", "unharmed"):
        began = time.monotonic()
        attempt_to_finish(directory / name, 0)
        duration = time.monotonic() - began
    for number in range(KILLS + 1):
        child = os.fork()
        if child == 0:
            attempt_to_finish(directory, number)
            os._exit(0)
        if number < KILLS:
            time.sleep(chance.uniform(0, 0.18) * duration)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    print(json.dumps({"killed": killed, "seconds": duration}))


def attempt_to_finish(directory: Path, number: int) -> None:
    place = directory / "checkpoints"
    place.mkdir(parents=True, exist_ok=True)
    strategy = Checkpointed(STRATEGIES["Wired 2-bit"](), place, resume_from=place)
    start(strategy, client_app(directory / "state"), seed=number, rounds=ROUNDS)


if __name__ == "__main__":
    run_until_finished(Path(sys.argv[1]))
