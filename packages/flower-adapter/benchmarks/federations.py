"""Run flower-adapter in Flower's simulation, to test what a unit test cannot show.

    python benchmarks/federations.py strategies   runs every strategy of Flower, compressed
    python benchmarks/federations.py faults       runs with a client that misbehaves, in each way
    python benchmarks/federations.py resume       kills runs, resumes them and compares the results
    python benchmarks/federations.py memory       measures the averaging of 10 and of 100 replies

The model is a small CNN with BatchNorm. It learns from generated pictures. Clients keep their
optimizer's momentum from round to round. In both directions the arrays travel with two bits per
value. `memory` needs no simulation.
"""

import argparse
import hashlib
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp, strategy
from flwr.serverapp.strategy import Result, Strategy
from flwr.simulation import run_simulation
from torch import Tensor, nn

from flower_adapter import (
    Checkpoints,
    Compression,
    DiskState,
    Guard,
    OuterOptimizer,
    RoundRecord,
    StreamingFedAvg,
    compression_mod,
    load_arrays,
    protocol,
    restore_state,
    run_rounds,
    save_state,
    to_arrays,
    torch_client_app,
)
from flower_adapter._flwr import set_message_id
from flower_adapter.arrays import npy
from flower_adapter.arrays.deltas import encode
from flower_adapter.testing import LocalGrid

STATE = "FEDERATIONS_STATE"  # environment variable with the directory of the clients' states
CODEC = "2-bit"


class CNN(nn.Module):
    """A CNN for two classes of 8 x 8 pictures. It is wide, so that a checkpoint takes time."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.hidden = nn.Linear(576, 512)
        self.head = nn.Linear(512, 2)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 8, 8) -> (B, 2)
        return self.head(torch.relu(self.hidden(self.features(x).flatten(1))))


def pictures(seed: int) -> tuple[Tensor, Tensor]:
    """Return noise with one row or one column a little brighter, and the class of each picture."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(256, 1, 8, 8, generator=generator), torch.arange(256) % 2
    x[y == 0, :, 3, :] += 0.4
    x[y == 1, :, :, 3] += 0.4
    return x, y  # (256, 1, 8, 8), (256,)


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


def two_bits() -> Compression:
    return Compression(uplink=CODEC, downlink=CODEC)


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

OUTER = "StreamingFedAvg with OuterOptimizer (ours)"


def built_in() -> dict[str, Callable[[], Strategy]]:
    """Return every Flower strategy, with settings for seven clients, and `StreamingFedAvg`."""
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
        OUTER: StreamingFedAvg,
    }


def clipping(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Apply the Flower clipping mod that the server's config names. Without a name, apply none."""
    mods = {"fixed": fixedclipping_mod, "adaptive": adaptiveclipping_mod}
    mod = mods.get(str(protocol.config_of(message).get("clipping")))
    return call_next(message, context) if mod is None else mod(message, context, call_next)


def trees(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer a message from an XGBoost strategy with one more tree."""
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


def strategies(names: list[str]) -> None:
    rows: list[tuple[str, ...]] = []

    def main(grid: Grid, context: Context) -> None:
        for name, build in built_in().items():
            if not names or name in names:
                rows.append((name, *run_strategy(grid, name, build())))
                print("ROW", *rows[-1], sep=" | ", flush=True)

    mods = [start_afresh, compression_mod, trees, clipping]
    simulate(main, torch_client_app(build_model, train, evaluate, mods=mods), 7)
    show(("strategy", "loss", "two rounds"), rows)
    require(rows, lambda row: row[1] != "FAILED")


def run_strategy(grid: Grid, name: str, chosen: Strategy) -> tuple[str, str]:
    """Run two rounds, and return the loss and a text about the rounds."""
    is_xgboost = name.startswith("FedXgb")
    config = ConfigRecord()
    if "client-side" in name:
        config["clipping"] = "adaptive" if "adaptive" in name else "fixed"
    records: list[RoundRecord] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            result = run_rounds(
                grid,
                chosen,
                ArrayRecord([one_tree()]) if is_xgboost else initial_arrays(),
                num_rounds=2,
                guard=None if is_xgboost else Guard(),
                compression=two_bits(),
                outer=OuterOptimizer() if name == OUTER else None,
                checkpoints=Checkpoints(directory),
                train_config=config,
                evaluate_fn=None if is_xgboost else evaluate_on_server,
                on_round=records.append,
            )
        except Exception as error:  # the other strategies run nevertheless
            return "FAILED", f"{type(error).__name__}: {error}"
        written = len(list(Path(directory).iterdir()))
    size = len(result.arrays["0"].data) if is_xgboost else 0
    loss = f"{size} bytes of trees" if is_xgboost else f"{last_loss(result):.4f}"
    replies = [len(record.train_clients) for record in records[1:]]
    return loss, f"replies {replies}, {written} checkpoints"


# --- faults

BAD, GOOD = 0, 3  # the partition that misbehaves, and the number of the others


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
    """Apply the fault that the server's config names, but only on partition 0."""
    fault = FAULTS.get(str(protocol.config_of(message).get("fault")))
    if fault is None or int(context.node_config["partition-id"]) != BAD:
        return call_next(message, context)
    return fault(message, context, call_next)  # type: ignore[no-any-return]


def start_afresh(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clear the context in round 1, because one simulation runs many federations."""
    at = protocol.config_of(message).get(protocol.SERVER_ROUND)
    if message.metadata.message_type == MessageType.TRAIN and at == 1:
        context.state.clear()
    return call_next(message, context)


def without_bad(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Number the partitions from 1, so that they match the good clients in the other runs."""
    partition = int(context.node_config["partition-id"])
    context.node_config["partition-id"] = partition + 1
    try:
        return call_next(message, context)
    finally:
        context.node_config["partition-id"] = partition


def faults(names: list[str]) -> None:
    rows: list[tuple[str, ...]] = []
    alone: list[float] = []

    def federation(grid: Grid, fault: str) -> tuple[float, list[RoundRecord]]:
        records: list[RoundRecord] = []
        with tempfile.TemporaryDirectory() as directory:
            result = run_rounds(
                grid,
                StreamingFedAvg(),
                initial_arrays(),
                num_rounds=3,
                timeout=15 if "hangs" in fault else 120,
                seed=1,
                compression=two_bits(),
                checkpoints=Checkpoints(directory),
                train_config=ConfigRecord({"fault": fault}),
                evaluate_fn=evaluate_on_server,
                on_round=records.append,
            )
        return last_loss(result), records

    def main_without(grid: Grid, context: Context) -> None:
        alone.append(federation(grid, "")[0])

    def main(grid: Grid, context: Context) -> None:
        _, records = federation(grid, "none")
        label = f"partition {BAD:04d}"
        [bad] = [client.node for client in records[1].train_clients if client.label == label]
        for fault in names or FAULTS:
            loss, records = federation(grid, fault)
            left_out = [c for record in records for c in record.left_out if c.phase == "train"]
            is_named = [client.node for client in left_out] == [bad] * 3
            reason = left_out[0].reason.strip().splitlines()[-1][:120] if left_out else "-"
            verdict = "left out 3 of 3 times" if is_named else f"WRONG: left out {left_out}"
            rows.append((fault, f"{loss:.4f}", f"{alone[0]:.4f}", verdict, reason))
            print("ROW", *rows[-1], sep=" | ", flush=True)

    app = torch_client_app(
        build_model, train, evaluate, mods=[start_afresh, without_bad, compression_mod]
    )
    simulate(main_without, app, GOOD)
    # `misbehave` comes after compression, so it changes what the client's own code returns.
    app = torch_client_app(
        build_model, train, evaluate, mods=[start_afresh, compression_mod, misbehave]
    )
    simulate(main, app, GOOD + 1, cpus=0.25)  # all clients at once, so that nobody waits
    show(("fault", "loss", "without the client", "bad client", "reason"), rows)
    require(rows, lambda row: row[3].startswith("left out"))


# --- resume

ROUNDS = 6


def state_directory(context: Context) -> str:
    return os.environ[STATE]


def run_to_the_end(directory: Path) -> None:
    """Start or resume a run in `directory`, and write its metrics to result.json."""
    os.environ[STATE] = str(directory / "clients")

    def main(grid: Grid, context: Context) -> None:
        result = run_rounds(
            grid,
            strategy.FedAdam(eta=0.01, fraction_train=0.7, min_train_nodes=2),
            initial_arrays(),
            num_rounds=ROUNDS,
            seed=7,
            compression=two_bits(),
            outer=OuterOptimizer(),
            checkpoints=Checkpoints(directory / "checkpoints", best="val-loss", resume=True),
            evaluate_fn=evaluate_on_server,
        )
        arrays = b"".join(array.data for array in result.arrays.values())
        outcome: dict[str, Any] = {
            name: {str(r): dict(record) for r, record in by_round.items()}
            for name, by_round in vars(result).items()
            if name != "arrays"
        }
        outcome["arrays"] = hashlib.sha256(arrays).hexdigest()
        (directory / "result.json").write_text(json.dumps(outcome, sort_keys=True))

    mods = [DiskState(state_directory), compression_mod]
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
    rows: list[tuple[str, ...]] = []
    generator = random.Random(time.time_ns())
    with tempfile.TemporaryDirectory() as parent:
        whole = Path(parent) / "whole"
        began, process = time.monotonic(), start(whole)
        written = []  # seconds from the start to the checkpoint of each round
        for server_round in range(ROUNDS + 1):
            wait_for(whole, server_round, process)
            written.append(time.monotonic() - began)
        assert process.wait() == 0, (whole / "log").read_text()[-3000:]
        expected = (whole / "result.json").read_text()
        moments = ", ".join(f"{seconds:.1f}" for seconds in written)
        print(f"checkpoints of rounds 0 to {ROUNDS} after {moments} s", flush=True)
        for number in range(1, times + 1):
            directory = Path(parent) / f"attempt-{number}"
            when = kill_once(directory, generator, number, written)
            kept = newest(directory)
            status = start(directory).wait()
            found = directory / "result.json"
            same = status == 0 and found.exists() and found.read_text() == expected
            rows.append((str(number), when, kept, "equal" if same else f"DIFFERS ({status})"))
            print("ROW", *rows[-1], sep=" | ", flush=True)
            if not same:
                print((directory / "log").read_text()[-3000:], flush=True)
    header = ("kill", "when", "newest checkpoint", "metrics and arrays, to the uninterrupted run's")
    show(header, rows)
    require(rows, lambda row: row[1] != ENDED and row[3] == "equal")


ENDED = "the run had ended before"


def kill_once(directory: Path, generator: random.Random, number: int, written: list[float]) -> str:
    """Start a run, kill it at a random moment, and return the moment.

    Every third run is killed while it writes a checkpoint, and the other runs before the first
    checkpoint or during a round. `written` holds the times of all checkpoints in a complete run.
    """
    process = start(directory)
    if number % 3 == 0:
        server_round = generator.randint(1, ROUNDS - 1)
        pattern = f".round-{server_round:06d}.partial"
        while process.poll() is None and not list((directory / "checkpoints").glob(pattern)):
            pass
        when = f"while it wrote the checkpoint of round {server_round}"
    else:
        server_round = generator.randint(0, ROUNDS)
        if server_round == 0:
            seconds = generator.uniform(0.2, 0.9) * written[0]
        else:
            wait_for(directory, server_round - 1, process)
            seconds = generator.random() * (written[server_round] - written[server_round - 1])
        time.sleep(seconds)
        when = f"{seconds:.2f} s into round {server_round}"
    if process.poll() is not None:
        return ENDED
    process.send_signal(signal.SIGKILL)
    process.wait()
    return when


def wait_for(directory: Path, server_round: int, process: subprocess.Popen[bytes]) -> None:
    """Wait for the checkpoint of a round, or for the end of the process."""
    path = directory / "checkpoints" / f"round-{server_round:06d}"
    while process.poll() is None and not path.exists():
        time.sleep(0.005)


def newest(directory: Path) -> str:
    kept = directory / "checkpoints"
    names = sorted(path.name for path in kept.iterdir()) if kept.is_dir() else []
    whole = [name for name in names if not name.startswith(".")]
    partial = [name for name in names if name.startswith(".")]
    return (whole[-1] if whole else "none") + (f", and {partial[0]}" if partial else "")


# --- memory

LAYERS, WIDTH = 6, 384
SHAPES = {
    "embedding": (65, WIDTH),
    **{f"{layer}.attention": (3 * WIDTH, WIDTH) for layer in range(LAYERS)},
    **{f"{layer}.projection": (WIDTH, WIDTH) for layer in range(LAYERS)},
    **{f"{layer}.up": (4 * WIDTH, WIDTH) for layer in range(LAYERS)},
    **{f"{layer}.down": (WIDTH, 4 * WIDTH) for layer in range(LAYERS)},
    **{f"{layer}.norm": (2 * WIDTH,) for layer in range(LAYERS)},
}  # 10.65 million parameters, as the smallest GPT of nanoGPT has
REPLY_MEMORY = 2**28  # 256 MiB


def model_and_reply(codec: str) -> tuple[ArrayRecord, ArrayRecord]:
    """Return the global arrays and a client's reply to them, array by array to save memory."""
    rng = np.random.default_rng(0)
    model, reply = ArrayRecord(), ArrayRecord()
    for name, shape in SHAPES.items():
        values = rng.standard_normal(shape, np.float32)
        trained = npy.to_array(values + 0.01 * rng.standard_normal(shape, np.float32))
        model[name] = npy.to_array(values)
        one = encode(ArrayRecord({name: trained}), ArrayRecord({name: model[name]}), codec)
        reply[name] = one.arrays[name] if codec != "fp32" else trained
    return model, reply


class MakingGrid(LocalGrid):
    """A grid that makes each reply when it is pulled, so that no reply waits in memory."""

    def __init__(self, reply: ArrayRecord, num_nodes: int) -> None:
        super().__init__(ClientApp(), num_nodes)
        self._reply = reply
        self._waiting: dict[str, Message] = {}
        self.seconds = 0.0  # for making the replies

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for number, message in enumerate(messages):
            set_message_id(message, str(number))
            self._waiting[str(number)] = message
        return list(self._waiting)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.reply(self._waiting.pop(message_id)) for message_id in message_ids]

    def reply(self, message: Message) -> Message:
        started = time.perf_counter()
        arrays = ArrayRecord({name: copy_of(array) for name, array in self._reply.items()})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        if protocol.COMPRESSION in message.content:
            content[protocol.COMPRESSION] = message.content[protocol.COMPRESSION]
        self.seconds += time.perf_counter() - started
        return Message(content, reply_to=message)


def copy_of(array: Array) -> Array:
    data = bytes(memoryview(array.data))  # `bytes` of bytes would not copy
    return Array(array.dtype, array.shape, array.stype, data)


def average(averaging: str, codec: str, count: int) -> None:
    """Average replies with `run_rounds` or Flower's FedAvg, and print memory and seconds."""
    torch.set_num_threads(1)  # as many as Flower's average uses
    model, reply = model_and_reply(codec)
    grid = MakingGrid(reply, count)
    before = peak_memory()
    started = time.perf_counter()
    if averaging == "ours":
        run_rounds(
            grid,
            StreamingFedAvg(fraction_evaluate=0.0),
            model,
            num_rounds=1,
            compression=Compression(uplink=codec, downlink="fp32"),
            reply_memory=REPLY_MEMORY,
        )
    else:
        messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
        replies = [grid.reply(message) for message in messages]
        strategy.FedAvg().aggregate_train(1, replies)
    seconds = time.perf_counter() - started
    found = {
        "mebibytes": (peak_memory() - before) / 2**20,
        "seconds": seconds,
        "beyond": seconds - grid.seconds,
    }
    print(json.dumps(found))


def peak_memory() -> int:
    """Return the most memory that this process has used so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(averaging: str, codec: str, count: int) -> dict[str, float]:
    """Run `average` in a new process."""
    command = [sys.executable, __file__, "average", averaging, codec, str(count)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def memory(counts: list[int]) -> None:
    rows: list[tuple[str, ...]] = []
    for count in counts:
        flower = measure("flower", "fp32", count)
        for averaging, codec in (("flower", "fp32"), ("ours", "fp32"), ("ours", CODEC)):
            found = flower if averaging == "flower" else measure(averaging, codec, count)
            row = (
                str(count),
                averaging,
                codec,
                f"{found['mebibytes']:.0f}",
                f"{found['seconds']:.2f}",
                f"{found['beyond']:.2f}",
                f"{flower['beyond']:.2f}",
                f"{found['beyond'] / flower['beyond']:.2f}",
            )
            rows.append(row)
            print("ROW", *row, sep=" | ", flush=True)
    header = (
        "replies",
        "averaged by",
        "codec",
        "peak MiB over the start",
        "seconds",
        "beyond making the replies",
        "Flower's",
        "ratio",
    )
    show(header, rows)


# --- the command line


def show(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def require(rows: list[tuple[str, ...]], is_good: Callable[[tuple[str, ...]], bool]) -> None:
    """Exit with status 1 if a row is not good, or if there are no rows."""
    bad = [row[0] for row in rows if not is_good(row)]
    if bad or not rows:
        sys.exit(f"not as it should be: {bad or 'no row'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("strategies").add_argument("--only", nargs="*", default=[], metavar="NAME")
    commands.add_parser("faults").add_argument("--only", nargs="*", default=[], choices=FAULTS)
    commands.add_parser("resume").add_argument("--times", type=int, default=10)
    commands.add_parser("memory").add_argument("--counts", nargs="*", type=int, default=[10, 100])
    # The two below are started by `resume` and by `memory`.
    commands.add_parser("run").add_argument("directory", type=Path)
    one = commands.add_parser("average")
    one.add_argument("averaging", choices=["ours", "flower"])
    one.add_argument("codec")
    one.add_argument("count", type=int)
    options = parser.parse_args()
    if options.command == "run":
        run_to_the_end(options.directory)
        return
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if options.command == "average":
        average(options.averaging, options.codec, options.count)
    elif options.command == "strategies":
        strategies(options.only)
    elif options.command == "faults":
        faults(options.only)
    elif options.command == "resume":
        resume(options.times)
    else:
        memory(options.counts)


if __name__ == "__main__":
    main()
