"""flower-adapter in Flower's Simulation Runtime: what no unit test shows.

    python benchmarks/federations.py strategies   every built-in strategy through the wrappers
    python benchmarks/federations.py faults       a client that misbehaves, in every way
    python benchmarks/federations.py resume       runs killed with SIGKILL, and what they end with
    python benchmarks/federations.py memory       of averaging, which is no federation

The model is a small CNN with BatchNorm on generated pictures, its clients keep their optimizer's
momentum from round to round, and all arrays travel in two bits both ways.
"""

import argparse
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp, strategy
from flwr.serverapp.strategy import Result, Strategy
from flwr.simulation import run_simulation
from torch import Tensor, nn

from flower_adapter import (
    Checkpointed,
    Durable,
    Guarded,
    OuterOptimizer,
    Seeded,
    StreamingFedAvg,
    Wired,
    average_arrays,
    load_arrays,
    npy,
    restore_state,
    save_state,
    to_arrays,
    torch_client_app,
    wire_mod,
)

STATE = "FEDERATIONS_STATE"  # the environment variable with the directory of the clients' states
CODEC = "2-bit"


class CNN(nn.Module):
    """Two classes of 8 x 8 pictures; wide, so that a checkpoint takes a while to write."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.hidden = nn.Linear(576, 512)
        self.head = nn.Linear(512, 2)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 8, 8) -> (B, 2)
        return self.head(torch.relu(self.hidden(self.features(x).flatten(1))))


def pictures(seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a row or a column a little brighter: (256, 1, 8, 8) and the class of each."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(256, 1, 8, 8, generator=generator), torch.arange(256) % 2
    x[y == 0, :, 3, :] += 0.4
    x[y == 1, :, :, 3] += 0.4
    return x, y


def build_model(config: ConfigRecord, context: Context) -> CNN:
    return CNN()


def train(model: CNN, config: ConfigRecord, context: Context) -> dict[str, float]:
    torch.manual_seed(int(config["server-round"]))
    x, y = pictures(int(context.node_config["partition-id"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    restore_state(context, valid_for=model, optimizer=optimizer)
    for rows in torch.randperm(256).split(32):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    save_state(context, valid_for=model, optimizer=optimizer)
    return {"train_loss": loss.item(), "num-examples": len(y)}


def evaluate(model: CNN, config: ConfigRecord, context: Context) -> dict[str, float]:
    x, y = pictures(100 + int(context.node_config["partition-id"]))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.eval()(x), y)
    return {"val-loss": loss.item(), "num-examples": len(y)}


def evaluate_on_server(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    model = CNN()
    load_arrays(model, arrays)
    x, y = pictures(1000)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.eval()(x), y)
    return MetricRecord({"val-loss": loss.item()})


def initial_arrays() -> ArrayRecord:
    torch.manual_seed(0)
    return to_arrays(CNN())


def simulate(
    main: Callable[[Grid, Context], None],
    client_app: ClientApp,
    num_supernodes: int,
    cpus: float = 1,
) -> None:
    server_app = ServerApp()
    server_app.main()(main)
    resources = {"client_resources": {"num_cpus": cpus, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, num_supernodes, backend_config=resources)


def last_loss(result: Result) -> float:
    by_round = result.evaluate_metrics_serverapp
    return float(by_round[max(by_round)]["val-loss"])  # type: ignore[arg-type]


# --- strategies


def built_in() -> dict[str, Callable[[], Strategy]]:
    """Every strategy of Flower, with settings that suit seven clients."""
    momentum = {"server_learning_rate": 1.0, "server_momentum": 0.5}
    private = {"noise_multiplier": 1e-4, "num_sampled_clients": 7}
    clipped = {**private, "clipping_norm": 10.0}
    adaptive = {**private, "initial_clipping_norm": 10.0}
    fedavg = strategy.FedAvg
    return {
        "FedAvg": fedavg,
        "FedAvgM": lambda: strategy.FedAvgM(**momentum),
        "FedAdam": lambda: strategy.FedAdam(eta=0.01),
        "FedAdagrad": lambda: strategy.FedAdagrad(eta=0.01),
        "FedYogi": lambda: strategy.FedYogi(eta=0.01),
        "FedProx": lambda: strategy.FedProx(proximal_mu=0.1),
        "FedMedian": strategy.FedMedian,
        "FedTrimmedAvg": lambda: strategy.FedTrimmedAvg(beta=0.2),
        "Krum": lambda: strategy.Krum(num_malicious_nodes=1),
        "MultiKrum": lambda: strategy.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
        "Bulyan": lambda: strategy.Bulyan(num_malicious_nodes=1),
        "QFedAvg": lambda: strategy.QFedAvg(client_learning_rate=0.02),
        "FedXgbBagging": strategy.FedXgbBagging,
        "FedXgbCyclic": lambda: strategy.FedXgbCyclic(),
        "DP server-side fixed clipping": lambda: (
            strategy.DifferentialPrivacyServerSideFixedClipping(fedavg(), **clipped)
        ),
        "DP client-side fixed clipping": lambda: (
            strategy.DifferentialPrivacyClientSideFixedClipping(fedavg(), **clipped)
        ),
        "DP server-side adaptive clipping": lambda: (
            strategy.DifferentialPrivacyServerSideAdaptiveClipping(fedavg(), **adaptive)
        ),
        "DP client-side adaptive clipping": lambda: (
            strategy.DifferentialPrivacyClientSideAdaptiveClipping(fedavg(), **adaptive)
        ),
        "StreamingFedAvg (ours)": StreamingFedAvg,
        "OuterOptimizer (ours)": lambda: OuterOptimizer(StreamingFedAvg()),
    }


def as_asked(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower's clipping mods, for the messages that are for them."""
    config = next(iter(message.content.config_records.values()), ConfigRecord())
    mods = {"fixed": fixedclipping_mod, "adaptive": adaptiveclipping_mod}
    mod = mods.get(str(config.get("clipping")))
    return call_next(message, context) if mod is None else mod(message, context, call_next)


def trees(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answers a message of a strategy for XGBoost with one more tree."""
    arrays = message.content.array_records["arrays"]
    if list(arrays) != ["0"]:
        return call_next(message, context)
    content = message.content.copy()
    metrics = {"num-examples": 256, "train_loss": 0.5, "val-loss": 0.5}
    content["metrics"] = MetricRecord(metrics)
    content["arrays"] = ArrayRecord([one_tree()])
    return Message(content, reply_to=message)


def one_tree() -> np.ndarray:
    forest = {
        "gbtree_model_param": {"num_trees": "1", "num_parallel_tree": "1"},
        "iteration_indptr": [0, 1],
        "trees": [{"id": 0}],
        "tree_info": [0],
    }
    booster = {"learner": {"gradient_booster": {"model": forest}}}
    return np.frombuffer(json.dumps(booster).encode(), np.uint8)


def strategies() -> None:
    rows: list[tuple[str, str, str]] = []

    def main(grid: Grid, context: Context) -> None:
        for name, build in built_in().items():
            xgboost = name.startswith("FedXgb")
            with tempfile.TemporaryDirectory() as directory:
                wired = Wired(build(), uplink=CODEC, downlink=CODEC)
                guarded = Guarded(wired, like_sent=not xgboost)
                clipping = "adaptive" if "side adaptive" in name else "fixed"
                config = ConfigRecord({"clipping": clipping} if "client-side" in name else {})
                try:
                    result = Checkpointed(guarded, directory).start(
                        grid,
                        ArrayRecord([one_tree()]) if xgboost else initial_arrays(),
                        num_rounds=2,
                        train_config=config,
                        evaluate_fn=None if xgboost else evaluate_on_server,
                    )
                    kept = sorted(path.name for path in Path(directory).iterdir())
                    by_round = result.train_metrics_clientapp.values()
                    replies = [metrics["num-replies"] for metrics in by_round]
                    size = len(result.arrays["0"].data) if xgboost else 0
                    loss = f"{size} bytes of trees" if xgboost else f"{last_loss(result):.4f}"
                    told = f"replies {replies}, {len(kept)} checkpoints"
                except Exception as error:  # a row of the table, whatever it is
                    loss, told = "FAILED", f"{type(error).__name__}: {error}"
            rows.append((name, loss, told))
            print("ROW", *rows[-1], sep=" | ", flush=True)

    app = torch_client_app(build_model, train, evaluate, mods=[fresh, wire_mod, trees, as_asked])
    simulate(main, app, 7)
    show(("strategy", "loss", "two rounds"), rows)


# --- faults

BAD, GOOD = 0, 3  # the partition that misbehaves, and how many others there are


def raises(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    raise RuntimeError("no space left in partition 0")


def hangs(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    time.sleep(20)
    return call_next(message, context)


def changes(change: Callable[[Message], None]) -> Any:
    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        change(reply)
        return reply

    return mod


def arrays_become(function: Callable[[str, np.ndarray], np.ndarray]) -> Any:
    def change(reply: Message) -> None:
        arrays = reply.content.array_records["arrays"]
        reply.content["arrays"] = ArrayRecord(
            {name: Array(np.asarray(function(name, a.numpy()))) for name, a in arrays.items()}
        )

    return changes(change)


def renamed(reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    reply.content["arrays"] = ArrayRecord({f"net.{name}": a for name, a in arrays.items()})


def without_examples(reply: Message) -> None:
    reply.content.metric_records["metrics"]["num-examples"] = 0


def _float(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, values: function(values) if values.dtype.kind == "f" else values


FAULTS: dict[str, Any] = {
    "raises": raises,
    "NaN": arrays_become(_float(lambda values: values * np.float32("nan"))),
    "wrong shape": arrays_become(lambda name, v: v[:1] if name == "head.weight" else v),
    "wrong names": changes(renamed),
    "float64": arrays_become(_float(lambda values: values.astype(np.float64))),
    "num-examples 0": changes(without_examples),
    "norm x 1,000": arrays_become(_float(lambda values: values * np.float32(1000))),
    "hangs past the timeout": hangs,
}


def misbehave(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Partition 0 does what the server's config says that it does wrong."""
    config = next(iter(message.content.config_records.values()), ConfigRecord())
    fault = FAULTS.get(str(config.get("fault")))
    if fault is None or int(context.node_config["partition-id"]) != BAD:
        return call_next(message, context)
    return fault(message, context, call_next)  # type: ignore[no-any-return]


def fresh(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """One simulation runs many federations: each begins without the state of the one before."""
    config = next(iter(message.content.config_records.values()), ConfigRecord())
    if message.metadata.message_type == MessageType.TRAIN and config.get("server-round") == 1:
        context.state.clear()
    return call_next(message, context)


def only_good(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Of a run without the bad client: all partitions are those of the good ones."""
    context.node_config["partition-id"] = int(context.node_config["partition-id"]) + 1
    try:
        return call_next(message, context)
    finally:
        context.node_config["partition-id"] = int(context.node_config["partition-id"]) - 1


def faults() -> None:
    rows: list[tuple[str, str, str]] = []
    alone: list[float] = []

    def federation(grid: Grid, fault: str) -> tuple[Result, Guarded]:
        guarded = Guarded(Wired(StreamingFedAvg(), uplink=CODEC, downlink=CODEC))
        with tempfile.TemporaryDirectory() as directory:
            result = Checkpointed(Seeded(guarded, seed=1), directory).start(
                grid,
                initial_arrays(),
                num_rounds=3,
                timeout=15 if "hangs" in fault else 120,
                train_config=ConfigRecord({"fault": fault}),
                evaluate_fn=evaluate_on_server,
            )
        return result, guarded

    def without(grid: Grid, context: Context) -> None:
        alone.append(last_loss(federation(grid, "")[0]))

    def main(grid: Grid, context: Context) -> None:
        for fault in ("none", *FAULTS):
            result, guarded = federation(grid, fault)
            dropped = [d for d in guarded.dropped if d.phase == "train"]
            reason = dropped[0].reason.strip().splitlines()[-1][:120] if dropped else "-"
            loss = f"{last_loss(result):.4f} ({alone[0]:.4f} without the bad client)"
            nodes = {d.node for d in dropped}
            told = f"{len(nodes)} node left out {len(dropped)} of 3 times: {reason}"
            rows.append((fault, loss, told))
            print("ROW", *rows[-1], sep=" | ", flush=True)

    app = torch_client_app(build_model, train, evaluate, mods=[fresh, only_good, wire_mod])
    simulate(without, app, GOOD)
    # The wire is outside: what is wrong is what the client's own code returns.
    app = torch_client_app(build_model, train, evaluate, mods=[fresh, wire_mod, misbehave])
    simulate(main, app, GOOD + 1, cpus=0.25)  # so that who hangs keeps nobody waiting
    show(("fault", "loss after 3 rounds", "what became of it"), rows)


# --- resume

ROUNDS = 6


def state_directory(context: Context) -> str:
    return os.environ[STATE]


def run_to_the_end(directory: Path) -> None:
    """A run, or what is left of one, in `directory`; its metrics go into result.json."""
    os.environ[STATE] = str(directory / "clients")

    def main(grid: Grid, context: Context) -> None:
        inner = OuterOptimizer(strategy.FedAdam(eta=0.01, fraction_train=0.7, min_train_nodes=2))
        wired = Wired(inner, uplink=CODEC, downlink=CODEC)
        kept = directory / "checkpoints"
        kept.mkdir(parents=True, exist_ok=True)
        result = Checkpointed(
            Seeded(Guarded(wired), seed=7), kept, best="val-loss", resume_from=kept
        ).start(grid, initial_arrays(), num_rounds=ROUNDS, evaluate_fn=evaluate_on_server)
        metrics = {
            name: {str(r): dict(record) for r, record in by_round.items()}
            for name, by_round in vars(result).items()
            if name != "arrays"
        }
        (directory / "result.json").write_text(json.dumps(metrics, sort_keys=True))

    mods = [Durable(state_directory), wire_mod]
    simulate(main, torch_client_app(build_model, train, evaluate, mods=mods), 4)


def start(directory: Path) -> subprocess.Popen[bytes]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "run", str(directory)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def resume(times: int) -> None:
    rows = []
    chance = random.Random(time.time_ns())
    with tempfile.TemporaryDirectory() as room:
        whole = Path(room) / "whole"
        began = time.monotonic()
        assert start(whole).wait() == 0, (whole / "log").read_text()[-3000:]
        took = time.monotonic() - began
        expected = (whole / "result.json").read_text()
        first = first_checkpoint_at(whole, began)
        print(f"uninterrupted: {took:.1f} s, first checkpoint after {first:.1f} s", flush=True)
        for attempt in range(times):
            directory = Path(room) / f"attempt-{attempt}"
            when = kill_once(directory, chance, attempt, first, took)
            kept = newest(directory)
            process = start(directory)
            status = process.wait()
            found = directory / "result.json"
            same = status == 0 and found.exists() and found.read_text() == expected
            rows.append((str(attempt + 1), when, kept, "equal" if same else f"DIFFERS ({status})"))
            print("ROW", *rows[-1], sep=" | ", flush=True)
            if not same:
                print((directory / "log").read_text()[-3000:], flush=True)
    show(("kill", "when", "newest checkpoint", "metrics and the uninterrupted run's"), rows)


def first_checkpoint_at(directory: Path, began: float) -> float:
    """Seconds from the start to the first checkpoint, by the log's age."""
    oldest = min((directory / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    return max(1.0, oldest.stat().st_mtime - (time.time() - (time.monotonic() - began)))


def kill_once(
    directory: Path, chance: random.Random, attempt: int, first: float, took: float
) -> str:
    """Kill a run at a random moment, or (every third) while it writes a checkpoint."""
    began, process = time.monotonic(), start(directory)
    if attempt % 3 == 2:
        nth = chance.randint(1, ROUNDS - 1)
        seen = -1
        while process.poll() is None and seen < nth:
            partial = list((directory / "checkpoints").glob(".round-*.partial"))
            seen = max([seen, *(int(path.name[7:13]) for path in partial)])
        when = f"while writing the checkpoint of round {seen}"
    else:
        moment = chance.uniform(first * 0.8, took)
        while process.poll() is None and time.monotonic() - began < moment:
            time.sleep(0.005)
        when = f"after {time.monotonic() - began:.1f} s"
    if process.poll() is not None:
        return f"{when}: it had ended"
    process.send_signal(signal.SIGKILL)
    process.wait()
    return when


def newest(directory: Path) -> str:
    kept = directory / "checkpoints"
    names = sorted(path.name for path in kept.iterdir()) if kept.is_dir() else []
    whole = [name for name in names if not name.startswith(".")]
    partial = [name for name in names if name.startswith(".")]
    return (whole[-1] if whole else "none") + (f", and {partial[0]}" if partial else "")


# --- memory


def averaging_memory(kind: str, count: int) -> None:
    """Average `count` replies that come one by one, and print the process's peak."""
    from flwr.app import RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    rng = np.random.default_rng(0)

    def replies() -> Iterator[RecordDict]:
        for _ in range(count):
            values = rng.standard_normal(10_650_000, np.float32)
            arrays = ArrayRecord({"w": npy.to_array(values)})
            yield RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1})})

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "ours":
        average_arrays((reply["a"], 1.0) for reply in replies())
    else:
        aggregate_arrayrecords(list(replies()), "num-examples")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{(peak - before) / 1024:.0f}")


def memory() -> None:
    rows = []
    for count in (10, 100):
        cells = [str(count)]
        for kind in ("ours", "flower"):
            command = [sys.executable, __file__, "average", kind, str(count)]
            cells.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(tuple(cell.strip() for cell in cells))
    show(("replies of 42.6 MB", "average_arrays, MiB more", "Flower's, MiB more"), rows)


def show(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("strategies")
    commands.add_parser("faults")
    commands.add_parser("resume").add_argument("--times", type=int, default=10)
    commands.add_parser("memory")
    average = commands.add_parser("average")
    average.add_argument("kind", choices=["ours", "flower"])
    average.add_argument("count", type=int)
    commands.add_parser("run").add_argument("directory", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        run_to_the_end(options.directory)
        return
    if options.command == "average":
        averaging_memory(options.kind, options.count)
        return
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if options.command == "resume":
        resume(options.times)
    else:
        {"strategies": strategies, "faults": faults, "memory": memory}[options.command]()


if __name__ == "__main__":
    main()
