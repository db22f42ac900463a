"""Runs that are cut off and resumed, compared with runs that nothing interrupts."""

import copy
import errno
import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Result, Strategy
from flwr.supercore.privacy_accounting import PrivacySpent, SamplingMethod
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn

import flower_adapter.client.disk
import flower_adapter.server.checkpoints
from flower_adapter import (
    CheckpointError,
    Checkpoints,
    Compression,
    DiskState,
    Guard,
    OuterOptimizer,
    Refusal,
    RoundFailed,
    RoundRecord,
    StreamingFedAvg,
    compression_mod,
    load_arrays,
    restore_state,
    run_rounds,
    save_state,
    to_arrays,
    torch_client_app,
)
from flower_adapter.packing import pack
from flower_adapter.server.checkpoints import (
    _summary_text,
    list_checkpoints,
    read_checkpoint,
    round_of,
)
from flower_adapter.server.strategy_state import STATE_ATTRIBUTES, with_inner
from flower_adapter.testing import LocalGrid

ROUNDS = 4
CUT = 3  # the round in which runs of one cut are cut off
FILES = ("arrays.safetensors", "round.json", "state.safetensors")
NAN = float("nan")

Parts = dict[str, Any]  # arguments of `run_rounds`
Watch = Callable[[str, int, int], None]  # is called with phase, partition and round
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class CutOff(BaseException):
    """Ends a run as a crash would. No client and no strategy catches it."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    # Some strategies of Flower collect garbage after each array, which takes 0.1 s here.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    monkeypatch.setattr(logging.getLogger("flwr"), "level", logging.WARNING)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Let torch use one thread: threads that wait for each other slow down these tiny models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the federation


@lru_cache
def initial_model(width: int) -> nn.Module:
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2))


def new_model(width: int = 4) -> nn.Module:
    return copy.deepcopy(initial_model(width))  # draws no random numbers


@lru_cache
def shared_model() -> nn.Module:
    """Return one module for all clients. Each of them loads the global arrays into it."""
    return new_model()


def loss_of(model: nn.Module, partition: int, server_round: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * partition + server_round)
    x = torch.randn(8, 6, generator=generator)
    return nn.functional.mse_loss(model(x), x[:, :2].sin() + partition)


def client_app(
    state: Path | None = None,
    watch: Watch = lambda *_: None,
    mods: Sequence[Mod] = (compression_mod,),
) -> ClientApp:
    """Return clients that keep momentum from round to round, on disk if `state` is given."""

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        partition, at = int(context.node_config["partition-id"]), int(config["server-round"])
        watch("train", partition, at)
        # Momentum by hand: torch.optim would first import torch._dynamo, which takes seconds.
        parameters = list(model.parameters())
        state = restore_state(context)
        velocities = state["velocities"] if state else [torch.zeros_like(p) for p in parameters]
        for _ in range(2):
            loss = loss_of(model, partition, at)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, velocity, gradient in zip(
                    parameters, velocities, gradients, strict=True
                ):
                    velocity.mul_(0.9).add_(gradient)
                    parameter -= 0.05 * velocity
        save_state(context, velocities=velocities)
        return {"num-examples": 8 + partition, "train_loss": loss.item()}

    def evaluate(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        partition, at = int(context.node_config["partition-id"]), int(config["server-round"])
        watch("evaluate", partition, at)
        with torch.no_grad():
            return {"num-examples": 8, "client-loss": loss_of(model, partition, 0).item()}

    if state is not None:
        mods = [DiskState(state, keep_ended=True), *mods]
    return torch_client_app(lambda config, context: shared_model(), train, evaluate, mods=mods)


def server_loss(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    model = shared_model()
    load_arrays(model, arrays)
    with torch.no_grad():
        return MetricRecord({"server-loss": loss_of(model, 9, 0).item()})


def two_bits() -> Compression:
    return Compression(uplink="2-bit", downlink="2-bit")


NO_CLIENTS = "no clients"
PARTS: dict[str, Callable[[], Parts]] = {
    NO_CLIENTS: lambda: {"strategy": StreamingFedAvg(fraction_train=0.0, fraction_evaluate=0.0)},
    "FedAvg without a guard": lambda: {"strategy": FedAvg(), "guard": None},
    "StreamingFedAvg": lambda: {"strategy": StreamingFedAvg()},
    "FedAvgM": lambda: {"strategy": FedAvgM(server_learning_rate=0.5, server_momentum=0.9)},
    "FedAdam": lambda: {"strategy": FedAdam(eta=0.02)},
    # Without a guard the global arrays become float64, as in Flower.
    "FedAdam without a guard": lambda: {"strategy": FedAdam(eta=0.02), "guard": None},
    "FedYogi": lambda: {"strategy": FedYogi(eta=0.02)},
    "FedAdagrad": lambda: {"strategy": FedAdagrad(eta=0.02)},
    "outer": lambda: {"strategy": StreamingFedAvg(), "outer": OuterOptimizer()},
    "outer, 2-bit": lambda: {
        "strategy": StreamingFedAvg(),
        "outer": OuterOptimizer(),
        "compression": two_bits(),
    },
    "2-bit without evaluation": lambda: {
        "strategy": StreamingFedAvg(fraction_evaluate=0.0),
        "compression": two_bits(),
    },
    "2-bit up, exact down": lambda: {
        "strategy": StreamingFedAvg(),
        "compression": Compression(uplink="2-bit", downlink="fp32"),
    },
    "2-bit of a fraction": lambda: {
        "strategy": StreamingFedAvg(fraction_train=0.4),
        "compression": two_bits(),
    },
    "adaptive clipping with noise": lambda: {
        "strategy": flower.DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.05, 3, 0.3),
        "guard": None,
    },
    "fraction": lambda: {
        "strategy": StreamingFedAvg(
            fraction_train=0.4, fraction_evaluate=0.6, min_train_nodes=1, min_evaluate_nodes=1
        )
    },
}


def start(
    parts: Parts,
    app: ClientApp,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
    evaluate_fn: EvaluateFn = server_loss,
    model: nn.Module | None = None,
    **options: Any,
) -> Result:
    """Run as in a process of its own: `seed` decides node ids, contexts and random states."""
    grid = LocalGrid(app, 3, seed=seed, run_id=1 + seed)
    arrays = to_arrays(new_model() if model is None else model)
    set_random_seeds(seed)
    return run_rounds(
        grid,
        arrays=arrays,
        num_rounds=rounds,
        seed=3,
        evaluate_fn=evaluate_fn,
        **parts,
        **options,
    )


def set_random_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def run(
    directory: Path,
    *,
    name: str = "StreamingFedAvg",
    rounds: int = ROUNDS,
    evaluate_fn: EvaluateFn = server_loss,
    model: nn.Module | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
    **options: Any,
) -> Result:
    """Run with checkpoints, and with clients that keep nothing on disk."""
    return start(
        PARTS[name](),
        client_app(),
        rounds=rounds,
        evaluate_fn=evaluate_fn,
        model=model,
        on_round=on_round,
        checkpoints=Checkpoints(directory, **options),
    )


def outcome(result: Result) -> dict[str, Any]:
    return {
        "arrays": {name: array.numpy().tobytes() for name, array in result.arrays.items()},
        "train": result.train_metrics_clientapp,
        "evaluate": result.evaluate_metrics_clientapp,
        "server": result.evaluate_metrics_serverapp,
    }


@lru_cache
def uninterrupted(name: str) -> dict[str, Any]:
    """Return the outcome of a run without checkpoints and without `DiskState`."""
    return outcome(start(PARTS[name](), client_app()))


def cut_after(server_round: int) -> EvaluateFn:
    """Return an evaluation that ends the run in the round after this checkpoint."""

    def evaluate(at: int, arrays: ArrayRecord) -> MetricRecord:
        if at == server_round + 1:
            raise CutOff
        return server_loss(at, arrays)

    return evaluate


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def rounds_in(directory: Path) -> list[int]:
    return [round_of(path) for path in list_checkpoints(directory)]


# --- a run that is cut off goes on as if nothing had happened


@pytest.mark.parametrize("name", PARTS)
def test_a_run_that_is_cut_off_in_every_round_equals_the_uninterrupted_one(
    name: str, tmp_path: Path
) -> None:
    def attempt(number: int, evaluate_fn: EvaluateFn) -> Result:
        checkpoints = Checkpoints(tmp_path / "checkpoints", resume=True)
        app = client_app(tmp_path / "state")
        return start(
            PARTS[name](), app, seed=number, evaluate_fn=evaluate_fn, checkpoints=checkpoints
        )

    for k in range(ROUNDS):
        with pytest.raises(CutOff):
            attempt(k, cut_after(k))
        assert rounds_in(tmp_path / "checkpoints")[-1] == k
    assert outcome(attempt(99, server_loss)) == uninterrupted(name)


def test_without_disk_state_the_clients_of_a_resumed_run_start_anew(tmp_path: Path) -> None:
    with pytest.raises(CutOff):
        run(tmp_path, evaluate_fn=cut_after(2))
    resumed = outcome(run(tmp_path, resume=True))
    expected = uninterrupted("StreamingFedAvg")
    assert resumed["server"][2] == expected["server"][2]
    assert resumed["server"][3] != expected["server"][3]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the first rounds of a run: its checkpoints and its clients' state."""
    directory = tmp_path_factory.mktemp("begun")
    checkpoints = Checkpoints(directory / "checkpoints")
    app = client_app(directory / "state")
    start(PARTS["outer, 2-bit"](), app, rounds=CUT - 1, checkpoints=checkpoints)
    return directory


PARTIAL, PRUNED = f".round-{CUT:06d}.partial", f"round-{CUT - 3:06d}"
# Moments at which a process may end: an attribute to replace, and which call of it is the last.
MOMENTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "before the arrays are written": (
        flower_adapter.server.checkpoints,
        "write_file",
        lambda path, *_: path.match(f"{PARTIAL}/arrays.safetensors"),
    ),
    "before the state is written": (
        flower_adapter.server.checkpoints,
        "write_file",
        lambda path, *_: path.match(f"{PARTIAL}/state.safetensors"),
    ),
    "before the move": (Path, "rename", lambda path, _: path.name == PARTIAL),
    "after the move": (
        flower_adapter.server.checkpoints,
        "sync",
        lambda path: (path / f"round-{CUT:06d}").exists(),
    ),
    "before the oldest is renamed": (Path, "rename", lambda path, _: path.name == PRUNED),
    "before the renamed one is removed": (
        shutil,
        "rmtree",
        lambda path, **_: Path(path).match(f".{PRUNED}.removed") and Path(path).exists(),
    ),
    "before a client's state is written": (
        flower_adapter.client.disk,
        "write_file",
        lambda path, *_: path.match(f"runs/*/.round-{CUT:06d}*"),
    ),
    "before a client's state is moved": (
        Path,
        "replace",
        lambda path, _: path.match(f"runs/*/.round-{CUT:06d}*"),
    ),
    "after a client's state is moved": (
        flower_adapter.client.disk,
        "sync",
        lambda path: path.match("runs/*") and any(path.glob(f"round-{CUT:06d}*")),
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_cut_off_while_it_writes_equals_the_uninterrupted_one(
    moment: str, begun: Path, tmp_path: Path
) -> None:
    owner, attribute, is_last = MOMENTS[moment]
    original = getattr(owner, attribute)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_last(*args, **kwargs):
            return original(*args, **kwargs)
        if attribute == "write_file":
            args[0].write_bytes(b"torn")
        if attribute == "rmtree":
            next(Path(args[0]).iterdir()).unlink()
        raise CutOff

    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    directory, app = tmp_path / "checkpoints", client_app(tmp_path / "state")
    parts = PARTS["outer, 2-bit"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, attribute, call)
        with pytest.raises(CutOff):
            start(parts(), app, seed=5, checkpoints=Checkpoints(directory, resume=True))
    assert rounds_in(directory)[-1] in (CUT - 1, CUT)
    resumed = start(parts(), app, seed=7, checkpoints=Checkpoints(directory, resume=True))
    assert outcome(resumed) == uninterrupted("outer, 2-bit")
    assert sorted(path.name for path in directory.iterdir()) == [
        f"round-{at:06d}" for at in (ROUNDS - 2, ROUNDS - 1, ROUNDS)
    ]


@pytest.mark.parametrize("partition", [0, 1, 2])
@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_run_that_is_cut_off_while_clients_work_equals_the_uninterrupted_one(
    phase: str, partition: int, begun: Path, tmp_path: Path
) -> None:
    def watch(*now: Any) -> None:
        if now == (phase, partition, CUT):
            raise CutOff

    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    directory, state = tmp_path / "checkpoints", tmp_path / "state"
    checkpoints = Checkpoints(directory, resume=True)
    parts = PARTS["outer, 2-bit"]
    with pytest.raises(CutOff):
        start(parts(), client_app(state, watch), seed=5, checkpoints=checkpoints)
    resumed = start(parts(), client_app(state), seed=7, checkpoints=checkpoints)
    assert outcome(resumed) == uninterrupted("outer, 2-bit")


def test_a_run_resumes_from_an_older_checkpoint_into_another_directory(tmp_path: Path) -> None:
    first, second, state = tmp_path / "first", tmp_path / "second", tmp_path / "state"
    parts = PARTS["outer, 2-bit"]
    start(parts(), client_app(state), checkpoints=Checkpoints(first))
    older = Checkpoints(second, resume=first / "round-000002")
    resumed = start(parts(), client_app(state), seed=7, checkpoints=older)
    assert outcome(resumed) == uninterrupted("outer, 2-bit")
    assert rounds_in(second) == [3, 4]


def test_a_run_resumes_from_the_newest_checkpoint_of_another_directory(tmp_path: Path) -> None:
    first, second, app = tmp_path / "first", tmp_path / "second", client_app(tmp_path / "state")
    parts = PARTS["StreamingFedAvg"]
    start(parts(), app, rounds=2, checkpoints=Checkpoints(first))
    resumed = start(parts(), app, seed=7, checkpoints=Checkpoints(second, resume=str(first)))
    assert outcome(resumed) == uninterrupted("StreamingFedAvg")
    assert rounds_in(second) == [3, 4]
    assert rounds_in(first) == [0, 1, 2]


def test_a_resumed_run_may_have_more_rounds(tmp_path: Path) -> None:
    directory, app = tmp_path / "checkpoints", client_app(tmp_path / "state")
    parts = PARTS["StreamingFedAvg"]
    start(parts(), app, rounds=2, checkpoints=Checkpoints(directory))
    resumed = start(parts(), app, seed=7, checkpoints=Checkpoints(directory, resume=True))
    assert outcome(resumed) == uninterrupted("StreamingFedAvg")


def test_a_finished_run_returns_its_result_again_without_a_message(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = contents(tmp_path)
    grid = LocalGrid(client_app(), 3, seed=5)
    again = run_rounds(
        grid,
        StreamingFedAvg(),
        to_arrays(new_model()),
        num_rounds=ROUNDS,
        evaluate_fn=server_loss,
        checkpoints=Checkpoints(tmp_path, resume=True),
    )
    assert outcome(again) == outcome(first)
    assert grid.sent == []
    assert contents(tmp_path) == before


def test_a_resume_without_a_checkpoint_starts_at_round_1(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    result = run(tmp_path / "new", resume=True)
    assert outcome(result) == uninterrupted("StreamingFedAvg")
    assert "holds no checkpoint yet: starting at round 1" in flower_log.text


def test_the_random_states_of_the_server_go_on(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []

    def draw(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        drawn.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
        return server_loss(server_round, arrays)

    run(tmp_path / "whole", rounds=3, evaluate_fn=draw)
    whole, drawn = drawn, []
    run(tmp_path / "cut", rounds=1, evaluate_fn=draw)
    start(
        PARTS["StreamingFedAvg"](),
        client_app(),
        seed=5,
        rounds=3,
        evaluate_fn=draw,
        checkpoints=Checkpoints(tmp_path / "cut", resume=True),
    )
    assert drawn == whole


def test_a_changed_setting_counts_after_a_resume(tmp_path: Path) -> None:
    app = client_app()
    start({"strategy": FedAdam(eta=0.1)}, app, rounds=1, checkpoints=Checkpoints(tmp_path))
    resumed = FedAdam(eta=0.0)
    result = start(
        {"strategy": resumed}, app, rounds=2, checkpoints=Checkpoints(tmp_path, resume=True)
    )
    assert resumed.eta == 0.0
    losses = result.evaluate_metrics_serverapp
    assert losses[0] != losses[1] == losses[2]


def test_failed_rounds_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    def watch(phase: str, partition: int, server_round: int) -> None:
        if phase == "train" and server_round in (3, 4):
            raise Refusal("data", "ill")

    def stop(record: RoundRecord) -> None:
        if record.server_round == 3:
            raise CutOff

    def parts() -> Parts:
        strategy = StreamingFedAvg(fraction_evaluate=0.0)
        return {"strategy": strategy, "guard": Guard(max_failed_rounds=2)}

    app = client_app(watch=watch)
    with pytest.raises(CutOff):
        start(parts(), app, on_round=stop, checkpoints=Checkpoints(tmp_path))
    failed = read_checkpoint(tmp_path).records[3]
    assert failed.failures == ["train: 0 good of 3 replies, needs 1"]
    assert [left.reason for left in failed.left_out] == ["data: ill"] * 3
    assert failed.train_metrics is None
    with pytest.raises(RoundFailed, match="train round 4: 0 good of 3 replies"):
        start(parts(), app, checkpoints=Checkpoints(tmp_path, resume=True))
    assert read_checkpoint(tmp_path).server_round == 3


# --- the records of the rounds


def untimed(record: RoundRecord) -> dict[str, Any]:
    """Return everything in a record except seconds."""
    fields = replace(record, seconds={}).to_dict()
    for client in (*fields["train_clients"], *fields["evaluate_clients"]):
        client["seconds"] = 0.0
    return fields


def test_on_round_gets_each_record_after_its_checkpoint_is_written(tmp_path: Path) -> None:
    seen: list[int] = []

    def on_round(record: RoundRecord) -> None:
        written = read_checkpoint(tmp_path)
        assert written.server_round == record.server_round
        assert record.arrays is not None
        assert list(written.arrays.items()) == list(record.arrays.items())
        assert untimed(written.records[-1]) == untimed(record)
        seen.append(record.server_round)

    run(tmp_path, rounds=2, on_round=on_round)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("name", ["StreamingFedAvg", "outer, 2-bit"])
def test_on_round_gets_the_earlier_records_first_after_a_resume(name: str, tmp_path: Path) -> None:
    def watch(phase: str, partition: int, server_round: int) -> None:
        if (phase, partition, server_round) == ("train", 1, 2):
            raise Refusal("data", "ill")

    def records_of(resume: bool, directory: Path, evaluate_fn: EvaluateFn) -> list[RoundRecord]:
        records: list[RoundRecord] = []
        app = client_app(directory / "state", watch)
        checkpoints = Checkpoints(directory / "checkpoints", resume=resume)
        with suppress(CutOff):
            start(
                PARTS[name](),
                app,
                evaluate_fn=evaluate_fn,
                on_round=records.append,
                checkpoints=checkpoints,
            )
        return records

    whole = records_of(False, tmp_path / "whole", server_loss)
    cut = records_of(False, tmp_path / "cut", cut_after(2))
    resumed = records_of(True, tmp_path / "cut", server_loss)
    assert [record.server_round for record in cut] == [0, 1, 2]
    assert [record.server_round for record in resumed] == list(range(ROUNDS + 1))
    assert [untimed(record) for record in resumed[:3]] == [untimed(record) for record in whole[:3]]
    [left_out] = resumed[2].left_out
    assert (left_out.phase, left_out.label) == ("train", "partition 0001")
    assert len(resumed[2].train_clients) == 2
    assert [record.server_round for record in resumed if record.arrays is None] == [0, 1]
    assert list(resumed[2].arrays.items()) == list(whole[2].arrays.items())  # type: ignore[union-attr]
    # The server cannot know what its clients hold, so it sends the whole model once more.
    for record in (*resumed[3:], *whole[3:]):
        record.bytes_sent = 0
        for client in (*record.train_clients, *record.evaluate_clients):
            client.bytes_sent = 0
    assert [untimed(record) for record in resumed[3:]] == [untimed(record) for record in whole[3:]]


def test_a_record_survives_a_checkpoint_with_metrics_of_every_kind(tmp_path: Path) -> None:
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"inf": float("inf"), "list": [1, 2], "number": 3, "tiny": 1e-300})

    run(tmp_path, rounds=1, evaluate_fn=evaluate)
    metrics = read_checkpoint(tmp_path).records[1].server_metrics
    assert metrics == {"inf": float("inf"), "list": [1, 2], "number": 3, "tiny": 1e-300}
    assert type(metrics["number"]) is int


def test_the_header_of_a_state_file_does_not_grow_with_the_records(tmp_path: Path) -> None:
    """safetensors allows a header of 100 MB, which the records of a long run would exceed."""

    def header_size(metrics: dict[str, float]) -> int:
        directory = tmp_path / str(len(metrics))
        run(directory, rounds=1, evaluate_fn=lambda *_: MetricRecord(metrics))
        file = directory / "round-000001" / "state.safetensors"
        return int.from_bytes(file.read_bytes()[:8], "little")

    small, large = (header_size({str(k): k / 7 for k in range(n)}) for n in (1, 10_000))
    assert abs(large - small) < 100


# --- which checkpoints stay


def scripted(losses: list[float | None]) -> EvaluateFn:
    """Return an evaluation that gives these losses, one for each round."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        loss = losses[server_round]
        return None if loss is None else MetricRecord({"loss": loss})

    return evaluate


@pytest.mark.parametrize(
    ("losses", "options", "kept"),
    [
        ([5, 4, 3, 2, 6, 7], {}, [3, 4, 5]),
        ([5, 4, 3, 2, 6, 7], {"keep": 1}, [5]),
        ([5, 4, 3, 2, 6, 7], {"keep": 100}, [0, 1, 2, 3, 4, 5]),
        ([5, 4, 1, 2, 6, 7], {"keep": 2, "best": "loss"}, [2, 4, 5]),
        ([5, 4, 1, 2, 6, 0], {"keep": 2, "best": "loss"}, [4, 5]),
        ([5, 1, 2, 1, 7, 8], {"keep": 1, "best": "loss"}, [1, 5]),
        ([1, 4, 5, 2, 6, 7], {"keep": 2, "best": "loss"}, [0, 4, 5]),
        ([5, 9, 3, 2, 6, 7], {"keep": 2, "best": "loss", "highest_is_best": True}, [1, 4, 5]),
        ([5, NAN, 3, 2, NAN, 7], {"keep": 1, "best": "loss"}, [3, 5]),
        ([None, 2, None, 3, 4, None], {"keep": 1, "best": "loss"}, [1, 5]),
        ([5, 4, 1, 2, 6, 7], {"keep": 2, "best": "perplexity"}, [4, 5]),
    ],
)
def test_the_last_checkpoints_and_the_best_are_kept(
    losses: list[float | None], options: dict[str, Any], kept: list[int], tmp_path: Path
) -> None:
    evaluate = scripted(losses)
    run(tmp_path, name=NO_CLIENTS, rounds=len(losses) - 1, evaluate_fn=evaluate, **options)
    assert rounds_in(tmp_path) == kept


def test_without_a_metric_of_the_server_the_clients_decide_the_best(tmp_path: Path) -> None:
    result = run(
        tmp_path, keep=1, best="client-loss", highest_is_best=True, evaluate_fn=lambda *_: None
    )
    by_round = {
        r: float(m["client-loss"])  # type: ignore[arg-type]
        for r, m in result.evaluate_metrics_clientapp.items()
    }
    assert rounds_in(tmp_path) == sorted({max(by_round, key=by_round.__getitem__), ROUNDS})


def test_the_best_checkpoint_of_before_stays_after_a_resume(tmp_path: Path) -> None:
    evaluate = scripted([5, 1, 3, 4, 6, 7])
    options = {"name": NO_CLIENTS, "evaluate_fn": evaluate, "keep": 1, "best": "loss"}
    run(tmp_path, rounds=3, **options)
    run(tmp_path, rounds=5, resume=True, **options)
    assert rounds_in(tmp_path) == [1, 5]


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_checkpoint_is_kept(keep: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"keep is {keep}, should be at least 1"):
        Checkpoints(tmp_path, keep=keep)


def test_the_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    run(tmp_path, rounds=2)
    for name in (".round-000003.partial", ".round-000001.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "arrays.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, rounds=2, resume=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", "round-000000", "round-000001", "round-000002"]


# --- the files


def test_the_arrays_are_a_safetensors_file_that_anyone_can_read(tmp_path: Path) -> None:
    result = run(tmp_path, rounds=1)
    written = load_file(tmp_path / "round-000001" / "arrays.safetensors")
    assert written.keys() == new_model().state_dict().keys()
    for name, array in result.arrays.items():
        assert written[name].dtype == np.float32
        assert np.array_equal(written[name], array.numpy())


def test_round_json_holds_the_run_the_round_and_its_metrics(tmp_path: Path) -> None:
    result = run(tmp_path, rounds=2)
    summary = json.loads((tmp_path / "round-000002" / "round.json").read_text())
    assert (summary["run"], summary["server_round"]) == ("1", 2)
    assert summary["server_metrics"] == dict(result.evaluate_metrics_serverapp[2])
    assert summary["train_metrics"] == dict(result.train_metrics_clientapp[2])
    assert summary["evaluate_metrics"] == dict(result.evaluate_metrics_clientapp[2])
    labels = [client["label"] for client in summary["train_clients"]]
    assert labels == ["partition 0000", "partition 0001", "partition 0002"]


def test_round_json_is_json_whatever_the_metrics_are(tmp_path: Path) -> None:
    run(tmp_path, rounds=1, evaluate_fn=scripted([NAN, NAN]))

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    text = (tmp_path / "round-000001" / "round.json").read_text()
    assert json.loads(text, parse_constant=refuse)["server_metrics"] == {"loss": "nan"}


def test_nothing_is_pickled(tmp_path: Path) -> None:
    run(tmp_path, rounds=1, name="FedAdam")
    assert {path.name for path in (tmp_path / "round-000001").iterdir()} == set(FILES)
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata()


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_the_earlier_checkpoints_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, bytes] = {}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == CUT:
            before.update(contents(tmp_path))
            write, text = flower_adapter.server.checkpoints.write_file, Path.write_text

            def write_file(path: Path, *args: Any) -> None:
                if path.name == name:
                    raise full
                write(path, *args)

            def write_text(path: Path, *args: Any, **kwargs: Any) -> int:
                if path.name == name:
                    raise full
                return text(path, *args, **kwargs)

            monkeypatch.setattr(flower_adapter.server.checkpoints, "write_file", write_file)
            monkeypatch.setattr(Path, "write_text", write_text)
        return server_loss(server_round, arrays)

    with pytest.raises(RoundFailed, match=r"checkpoint round 4: .*No space left") as caught:
        run(tmp_path, name=NO_CLIENTS, evaluate_fn=fill)
    assert caught.value.__cause__ is full
    assert contents(tmp_path) == before  # nothing of the failed write takes space
    assert read_checkpoint(tmp_path).server_round == CUT - 1


def truncated_sizes(name: str, whole: bytes) -> set[int]:
    """Return sizes at which a truncated file might still look whole."""
    ends = {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}
    if name.endswith(".safetensors"):
        header = 8 + int.from_bytes(whole[:8], "little")
        ends |= {header - 1, header, header + 1}
    return ends


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused_at_every_size(name: str, tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    path = tmp_path / "round-000001" / name
    whole = path.read_bytes()
    for size in truncated_sizes(name, whole):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="round-000001 is damaged"):
            read_checkpoint(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_noticed_wherever_it_is(name: str, tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    path = tmp_path / "round-000001" / name
    whole = path.read_bytes()
    chance = random.Random(0)
    places = range(8 * len(whole)) if name == "round.json" else range(0, 8 * len(whole), 97)
    for place in chance.sample(places, min(300, len(places))):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="round-000001"):
            read_checkpoint(path.parent)
    path.write_bytes(whole)
    assert read_checkpoint(path.parent).server_round == 1


@pytest.mark.parametrize("text", ["[]", "1", "null", '"x"', "{}", "[" * 100_000, "\x00"])
def test_a_round_file_of_another_kind_is_damaged(text: str, tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    (tmp_path / "round-000001" / "round.json").write_text(text)
    with pytest.raises(CheckpointError, match="round-000001 is damaged"):
        read_checkpoint(tmp_path / "round-000001")


@pytest.mark.parametrize("name", FILES)
def test_a_run_goes_on_from_the_newest_sound_checkpoint(
    name: str, tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    expected = run(tmp_path / "whole", name=NO_CLIENTS)
    run(tmp_path / "cut", name=NO_CLIENTS, rounds=3)
    path = tmp_path / "cut" / "round-000003" / name
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    assert outcome(run(tmp_path / "cut", name=NO_CLIENTS, resume=True)) == outcome(expected)
    assert f"{path.parent} is damaged" in flower_log.text
    assert "the run goes on from" in flower_log.text
    aside = tmp_path / "cut" / ".damaged-round-000003" / name
    assert aside.read_bytes() == damaged
    assert read_checkpoint(path.parent).server_round == 3


def test_a_directory_of_damaged_checkpoints_alone_is_refused_and_stays(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    for place in tmp_path.glob("round-*"):
        (place / "round.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"round-000001 is damaged.*round-000000 is damaged"):
        run(tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_the_state_with_the_secret_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    secret = read_checkpoint(tmp_path).secret
    assert len(bytes.fromhex(secret)) == 32
    files = list((tmp_path / "round-000001").iterdir())
    assert [path.name for path in files if secret.encode() in path.read_bytes()] == [
        "state.safetensors"
    ]
    assert (tmp_path / "round-000001" / "state.safetensors").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_one_of_its_files_is_damaged(
    name: str, elsewhere: bool, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    run(old, rounds=1)
    (old / "round-000001" / name).unlink()
    with pytest.raises(CheckpointError, match=f"round-000001.*{name}"):
        run(tmp_path / "new" if elsewhere else old, resume=old / "round-000001")


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    path = tmp_path / "round-000001" / "round.json"
    summary = json.loads(path.read_text())
    del summary["sha256"]
    path.write_text(json.dumps({**summary, "format": 3}))
    with pytest.raises(CheckpointError, match="has format 3, should have format 4: an older"):
        read_checkpoint(tmp_path)
    path.write_text(_summary_text({**summary, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, should have format 4"):
        read_checkpoint(tmp_path)


# --- runs that do not fit


def test_another_model_is_refused_and_named(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="the run had another model") as caught:
        run(tmp_path, resume=True, model=new_model(width=5))
    assert "0.weight was float32 (4, 6), is float32 (5, 6)" in str(caught.value)
    assert "2.bias" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"2\.weight was float32 .*, is not there"):
        run(tmp_path, resume=True, model=new_model()[:1])  # type: ignore[index]
    assert contents(tmp_path) == before


def test_another_strategy_is_refused_and_named(tmp_path: Path) -> None:
    run(tmp_path, rounds=1)
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, resume=True, name="FedAdam")
    expected = "the saved run had the strategy StreamingFedAvg, this run has FedAdam"
    assert str(caught.value) == expected


def test_another_wrapped_strategy_is_refused_and_named(tmp_path: Path) -> None:
    def parts(inner: Strategy) -> Parts:
        wrapper = flower.DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 0.3, 3)
        return {"strategy": wrapper}

    start(parts(FedAvg()), client_app(), rounds=1, checkpoints=Checkpoints(tmp_path))
    checkpoints = Checkpoints(tmp_path, resume=True)
    with pytest.raises(CheckpointError) as caught:
        start(parts(FedAdam()), client_app(), rounds=1, checkpoints=checkpoints)
    name = "DifferentialPrivacyServerSideFixedClipping"
    expected = f"the saved run had the strategy {name}(FedAvg), this run has {name}(FedAdam)"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("StreamingFedAvg", "outer", "the saved run was without outer, this run is with"),
        ("outer", "StreamingFedAvg", "the saved run was with outer, this run is without"),
        ("outer", "outer, 2-bit", "the saved run was without compression, this run is with"),
        ("outer, 2-bit", "outer", "the saved run was with compression, this run is without"),
    ],
)
def test_a_resume_with_other_parts_is_refused(
    before: str, after: str, expected: str, tmp_path: Path
) -> None:
    run(tmp_path, rounds=1, name=before)
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, name=after, resume=True)
    assert str(caught.value) == expected


def test_a_new_run_does_not_overwrite_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, rounds=2)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="holds checkpoints up to round 2; use another"):
        run(tmp_path)
    assert contents(tmp_path) == before


def test_a_resume_from_an_older_checkpoint_in_its_own_directory_is_refused(tmp_path: Path) -> None:
    run(tmp_path, rounds=2)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"up to round 2, which a resume from .*\(round 1\)"):
        run(tmp_path, resume=tmp_path / "round-000001")
    assert contents(tmp_path) == before


def test_a_resume_among_the_checkpoints_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "here", rounds=2)
    run(tmp_path / "there", rounds=2)
    with pytest.raises(CheckpointError, match="here holds checkpoints up to round 2"):
        run(tmp_path / "here", resume=tmp_path / "there")


@pytest.mark.parametrize("path", ["nowhere", "round-000007", "old/round-000007"])
def test_a_path_that_does_not_exist_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=path):
        run(tmp_path / "new", resume=tmp_path / path)
    assert list_checkpoints(tmp_path / "new") == []


def test_a_second_run_in_the_same_directory_is_refused_until_the_first_ends(
    tmp_path: Path,
) -> None:
    def second_run(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="checkpoints is in use by another run"):
                run(tmp_path / "checkpoints", resume=resume)
        run(tmp_path / "others", rounds=0, resume=True)
        return server_loss(server_round, arrays)

    run(tmp_path / "checkpoints", rounds=1, evaluate_fn=second_run)
    run(tmp_path / "checkpoints", rounds=2, resume=True)
    assert rounds_in(tmp_path / "checkpoints") == [0, 1, 2]


# --- the state of a strategy


class Counting(FedAvg):
    """Changes from round to round, and does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.count += 1
        return super().aggregate_train(server_round, replies)


class Drawing(Counting):
    """Has a state of its own, with a random generator in it."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)
        self.log: list[float] = []

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.log.append(torch.rand((), generator=self.generator).item())
        return super().aggregate_train(server_round, replies)

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "log": self.log,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.log = state["count"], state["log"]
        self.generator.set_state(state["generator"])


class Hoarding(Drawing):
    def state_dict(self) -> dict[str, Any]:
        return {"kept": [object()]}


def fixed_clipping(inner: Strategy, **options: Any) -> Strategy:
    return flower.DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 0.3, 3, **options)


def refusal_of(strategy: Strategy, directory: Path) -> str:
    """Return the error of a run with a strategy, in which no client may work."""
    grid = LocalGrid(client_app(), 3)
    with pytest.raises(TypeError) as caught:
        run_rounds(grid, strategy, to_arrays(new_model()), checkpoints=Checkpoints(directory))
    assert grid.sent == []
    assert list_checkpoints(directory) == []
    return str(caught.value)


@pytest.mark.parametrize("wrap", [lambda inner: inner, fixed_clipping])
def test_a_strategy_of_unknown_state_is_refused_by_name_before_a_client_works(
    wrap: Callable[[Strategy], Strategy], tmp_path: Path
) -> None:
    assert refusal_of(wrap(Counting()), tmp_path) == (
        "Counting is not a strategy of Flower, so checkpoints need its methods state_dict and "
        "load_state_dict"
    )


def test_a_state_that_cannot_be_saved_is_named_before_a_client_works(tmp_path: Path) -> None:
    text = refusal_of(Hoarding(), tmp_path)
    assert "['kept'][0] is a object, which cannot be saved" in text


def test_a_strategy_with_a_privacy_accountant_is_refused_by_name(tmp_path: Path) -> None:
    class Accountant:
        config = SimpleNamespace(
            sampling_method=SamplingMethod.NO_AMPLIFICATION, max_epsilon=1.0, target_delta=1e-5
        )

        def get_privacy_spent(self) -> PrivacySpent:
            return PrivacySpent(0.0, 1e-5, 0, "none")

    strategy = fixed_clipping(FedAvg(), accountant=Accountant())
    assert refusal_of(strategy, tmp_path) == (
        "DifferentialPrivacyServerSideFixedClipping has an accountant, whose state cannot be saved "
        "in a checkpoint"
    )


def test_a_strategy_of_unknown_state_runs_without_checkpoints() -> None:
    strategy = Counting()
    start({"strategy": strategy}, client_app(), rounds=2)
    assert strategy.count == 2


@pytest.mark.parametrize("wrap", [lambda inner: inner, fixed_clipping])
def test_the_state_dict_of_a_strategy_goes_on(
    wrap: Callable[[Strategy], Strategy], tmp_path: Path
) -> None:
    whole, resumed = Drawing(), Drawing()
    start({"strategy": wrap(whole)}, client_app(), rounds=4)
    start({"strategy": wrap(Drawing())}, client_app(), rounds=2, checkpoints=Checkpoints(tmp_path))
    checkpoints = Checkpoints(tmp_path, resume=True)
    start({"strategy": wrap(resumed)}, client_app(), rounds=4, checkpoints=checkpoints)
    assert len(set(resumed.log)) == 4
    assert (resumed.log, resumed.count) == (whole.log, whole.count)


# Attributes that `configure_train` sets anew in every round, from the global arrays.
SET_ANEW: dict[type, set[str]] = {
    FedAdam: {"current_arrays"},
    FedAdagrad: {"current_arrays"},
    FedYogi: {"current_arrays"},
    flower.QFedAvg: {"current_arrays"},
    flower.FedXgbBagging: {"current_bst"},
    flower.DifferentialPrivacyServerSideFixedClipping: {"current_arrays"},
    flower.DifferentialPrivacyServerSideAdaptiveClipping: {"current_arrays"},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "FedAvgM": {"server_learning_rate": 0.5, "server_momentum": 0.9},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.02},
    "FedProx": {"proximal_mu": 0.1},
}
EXPORTED = sorted(set(flower.__all__) - {"Result", "Strategy"})


def build(name: str) -> Strategy:
    """Return a strategy of Flower, or ours."""
    if name == "StreamingFedAvg":
        return StreamingFedAvg(fraction_evaluate=0.0)
    arguments = dict(ARGUMENTS.get(name, {}))
    if not name.startswith("FedXgb"):  # only these choose nodes by what they evaluated before
        arguments["fraction_evaluate"] = 0.0
    if name.startswith("DifferentialPrivacy"):
        norm = "initial_clipping_norm" if "Adaptive" in name else "clipping_norm"
        arguments = {
            "strategy": FedAdam(eta=0.02, fraction_evaluate=0.0),
            "noise_multiplier": 0.01,
            "num_sampled_clients": 3,
            norm: 0.3,
        }
    return getattr(flower, name)(**arguments)  # type: ignore[no-any-return]


def tree_app() -> ClientApp:
    """Return clients that answer a strategy for XGBoost with one more tree."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = message.content.copy()
        content["arrays"] = one_tree(int(context.node_config["partition-id"]))
        content["metrics"] = MetricRecord({"num-examples": 8})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        content = message.content.copy()
        del content["arrays"]
        content["metrics"] = MetricRecord({"num-examples": 8})
        return Message(content, reply_to=message)

    return app


def one_tree(value: int) -> ArrayRecord:
    forest = {
        "gbtree_model_param": {"num_trees": "1", "num_parallel_tree": "1"},
        "iteration_indptr": [0, 1],
        "trees": [{"id": 0, "value": value}],
        "tree_info": [0],
    }
    booster = {"learner": {"gradient_booster": {"model": forest}}}
    return ArrayRecord([np.frombuffer(json.dumps(booster).encode(), np.uint8)])


def past_queries(mod: Mod) -> Mod:
    """Return a mod that queries pass by. Flower's clipping mods refuse messages without arrays."""

    def passed(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type.startswith("query"):
            return call_next(message, context)
        return mod(message, context, call_next)

    return passed


CLIPPING_MODS: dict[str, Mod] = {
    "ClientSideFixed": past_queries(fixedclipping_mod),
    "ClientSideAdaptive": past_queries(adaptiveclipping_mod),
}


def attributes(strategy: Strategy) -> dict[type, dict[str, Any]]:
    """Return copies of the attributes of a strategy and of those it wraps, by class."""
    return {
        type(inner): {
            name: value if callable(value) else pack(value, name)
            for name, value in vars(inner).items()
            if name != "strategy"
        }
        for inner in with_inner(strategy)
    }


@pytest.mark.parametrize("name", [*EXPORTED, "StreamingFedAvg"])
def test_the_table_names_every_attribute_of_a_strategy_that_changes(
    name: str, tmp_path: Path
) -> None:
    is_xgboost = name.startswith("FedXgb")
    mods = [mod for part, mod in CLIPPING_MODS.items() if part in name]

    def run_in(directory: Path, strategy: Strategy, rounds: int, resume: bool = False) -> Result:
        app = tree_app() if is_xgboost else client_app(directory / "state", mods=mods)
        set_random_seeds(int(resume))
        return run_rounds(
            LocalGrid(app, 7 if name == "Bulyan" else 3),
            strategy,
            one_tree(0) if is_xgboost else to_arrays(new_model()),
            num_rounds=rounds,
            seed=3,
            guard=None if is_xgboost else Guard(),
            checkpoints=Checkpoints(directory / "checkpoints", resume=resume),
        )

    before, after = build(name), build(name)
    run_in(tmp_path / "cut", after, rounds=2)
    for kind, values in attributes(after).items():
        first = attributes(before)[kind]
        changed = {key for key, value in values.items() if key not in first or first[key] != value}
        assert changed == {*STATE_ATTRIBUTES[kind], *SET_ANEW.get(kind, ())}

    # These attributes are enough: a new object goes on like one that has run from the start.
    whole, resumed = build(name), build(name)
    expected = run_in(tmp_path / "whole", whole, rounds=3)
    result = run_in(tmp_path / "cut", resumed, rounds=3, resume=True)
    assert outcome(result) == outcome(expected)
    assert attributes(resumed) == attributes(whole)


def test_the_table_has_an_entry_for_each_strategy_of_flower_and_no_other() -> None:
    classes = {getattr(flower, name) for name in EXPORTED}
    assert len(classes) == 18
    assert set(STATE_ATTRIBUTES) == {*classes, StreamingFedAvg}


# --- a process that is killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_equals_the_uninterrupted_one(
    kills: int, tmp_path: Path
) -> None:
    finished = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout.splitlines()[-1])
    assert report["killed"] >= 2, report  # the others may have found the run finished
    grid = LocalGrid(client_app(), 3)
    checkpoints = Checkpoints(tmp_path / "checkpoints", resume=True)
    parts, arrays = PARTS["outer, 2-bit"](), to_arrays(new_model())
    result = run_rounds(grid, arrays=arrays, num_rounds=ROUNDS, checkpoints=checkpoints, **parts)
    assert grid.sent == []  # the run has finished
    assert outcome(result) == uninterrupted("outer, 2-bit")


def run_until_finished(directory: Path, kills: int) -> None:
    """Resume a run in child processes, kill the first `kills` of them, and let the last one end."""
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # a kill loses nothing that was written
    generator, killed = random.Random(os.getpid()), 0
    for name in ("warm-up", "unharmed"):
        began = time.monotonic()
        attempt_to_finish(directory / name, 0)
        duration = time.monotonic() - began
    for number in range(kills + 1):
        child = os.fork()
        if child == 0:
            attempt_to_finish(directory, number)
            os._exit(0)
        if number < kills:
            time.sleep(generator.uniform(0, 0.3) * duration)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    print(json.dumps({"killed": killed, "seconds": duration}))


def attempt_to_finish(directory: Path, number: int) -> None:
    start(
        PARTS["outer, 2-bit"](),
        client_app(directory / "state"),
        seed=number,
        checkpoints=Checkpoints(directory / "checkpoints", resume=True),
    )


if __name__ == "__main__":
    run_until_finished(Path(sys.argv[1]), int(sys.argv[2]))
