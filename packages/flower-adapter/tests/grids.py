"""Grids and clients that several test files share."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from flower_adapter import RoundRecord, run_rounds
from flower_adapter.testing import LocalGrid

# The tensors of these tests are small. Threads would only wait for each other.
torch.set_num_threads(1)

Answer = RecordDict | Error

GLOBAL = {"w": np.zeros(2, np.float32), "n": np.array(3)}  # the initial arrays


def record(**arrays: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def values(arrays: ArrayRecord) -> dict[str, Any]:
    return {name: array.numpy().tolist() for name, array in arrays.items()}


def data(arrays: ArrayRecord) -> dict[str, bytes]:
    return {name: array.data for name, array in arrays.items()}


def good(value: float = 1.0, label: str | None = None) -> RecordDict:
    """Return a reply that counts."""
    return with_arrays(w=np.full(2, value, np.float32), n=np.array(4), label=label)


def with_arrays(*, label: str | None = None, **arrays: Any) -> RecordDict:
    metrics = MetricRecord({"num-examples": 1, "loss": 2.0})
    content = RecordDict({"arrays": record(**{**GLOBAL, **arrays}), "metrics": metrics})
    if label is not None:
        content["client"] = ConfigRecord({"label": label})
    return content


def with_metrics(**metrics: Any) -> RecordDict:
    named = {name.replace("_", "-"): value for name, value in metrics.items()}
    return RecordDict({**good(), "metrics": MetricRecord(named)})


def without(name: str) -> RecordDict:
    return RecordDict({key: value for key, value in good().items() if key != name})


def moved(norm: float, label: str | None = None) -> RecordDict:
    """Return a reply whose update has this norm."""
    return with_arrays(w=np.array([0.6 * norm, -0.8 * norm], np.float32), label=label)


def truncated() -> RecordDict:
    content = with_arrays()
    content["arrays"]["w"].data = content["arrays"]["w"].data[:-1]
    return content


def with_header(header: bytes) -> RecordDict:
    """Return a reply with this text in the place of the header that `numpy.save` writes."""
    content = with_arrays()
    data = content["arrays"]["w"].data
    text = header.ljust(data.index(b"\n") - 10) + b"\n"
    content["arrays"]["w"].data = data[:10] + text + data[data.index(b"\n") + 1 :]
    return content


def declared(**fields: Any) -> RecordDict:
    """Return a reply whose array declares something else than it holds."""
    content = with_arrays()
    for name, value in fields.items():
        setattr(content["arrays"]["w"], name, value)
    return content


# Replies that must not count, each with the reason.
BAD_REPLIES: dict[str, tuple[RecordDict, str]] = {
    "nan": (with_arrays(w=np.array([1, np.nan], np.float32)), "w holds NaN or Inf (1 of 2 values)"),
    "inf": (with_arrays(w=np.array([np.inf] * 2, np.float32)), "w holds NaN or Inf (2 of 2"),
    "missing array": (RecordDict({**good(), "arrays": record(n=np.array(4))}), "w is missing"),
    "foreign array": (with_arrays(x=np.ones(1)), "x should not be there"),
    "other shape": (
        with_arrays(w=np.zeros(3, np.float32)),
        "w is float32 (3,), should be float32 (2,)",
    ),
    "other dtype": (with_arrays(w=np.zeros(2)), "w is float64 (2,), should be float32 (2,)"),
    "header": (with_header(b"{[]: 1}"), "w has the header '{[]: 1}"),
    "header without end": (with_header(b"(((("), "w has the header '(((("),
    "other dtype declared": (declared(dtype="int64"), "w is int64 (2,), should be float32 (2,)"),
    "unknown dtype declared": (declared(dtype="garbage"), "w is garbage (2,), should be"),
    "other shape declared": (declared(shape=(7, 7)), "w is float32 (7, 7), should be float32 (2,)"),
    "other dtype than declared": (
        declared(data=Array(np.zeros(2, np.int64)).data),
        "w says float32 (2,), but holds int64 (2,)",
    ),
    "other shape than declared": (
        declared(data=Array(np.zeros(7, np.float32)).data),
        "w says float32 (2,), but holds float32 (7,)",
    ),
    "integer too large": (
        with_arrays(n=np.array(2**53 + 1)),
        "n holds 9007199254740993, should be at most 2^53 in magnitude",
    ),
    "integer too small": (with_arrays(n=np.array(-(2**62))), "n holds -4611686018427387904"),
    "foreign record": (
        RecordDict({**good(), "more": ConfigRecord({"x": 1})}),
        "holds the ConfigRecord 'more', should not",
    ),
    "truncated": (truncated(), "w holds 7 bytes, should hold 8"),
    "no arrays": (without("arrays"), "holds 0 ArrayRecords, should hold one"),
    "two records of arrays": (
        RecordDict({**good(), "more": record(**GLOBAL)}),
        "holds 2 ArrayRecords, should hold one",
    ),
    "no metrics": (without("metrics"), "holds 0 MetricRecords, should hold one"),
    "no weight": (with_metrics(loss=2.0), "num-examples is missing from the metrics"),
    "weight zero": (
        with_metrics(num_examples=0),
        "num-examples is 0, should be a whole number from 1 to 2^53",
    ),
    "weight too large": (with_metrics(num_examples=2.0**54), "num-examples is 1.8"),
    "weight not whole": (with_metrics(num_examples=1.5), "num-examples is 1.5, should be a whole"),
    "weight tiny": (with_metrics(num_examples=5e-324), "num-examples is 5e-324, should be a whole"),
    "weight negative": (with_metrics(num_examples=-1), "num-examples is -1"),
    "weight nan": (with_metrics(num_examples=float("nan")), "num-examples is nan"),
    "weight inf": (with_metrics(num_examples=float("inf")), "num-examples is inf"),
    "weight list": (with_metrics(num_examples=[1, 2]), "num-examples is [1, 2]"),
    "metric nan": (
        with_metrics(num_examples=1, loss=float("nan")),
        "loss is nan, should be finite",
    ),
    "metric near the largest double": (
        with_metrics(num_examples=1, loss=1.7e308),
        "loss is 1.7e+308, should be finite and at most 1e+100 in magnitude",
    ),
    "too many metrics": (
        with_metrics(num_examples=1, **{f"m{k}": 0.5 for k in range(100)}),
        "holds 101 metrics, should hold at most 100",
    ),
    "long list": (
        with_metrics(num_examples=1, losses=[0.5] * 1001),
        "losses is a list of 1001, should have at most 1000 values",
    ),
    "name with a control character": (
        RecordDict({**good(), "metrics": MetricRecord({"num-examples": 1, "\x1b[2J": 0.5})}),
        "a metric is named '\\x1b[2J', should be 1 to 100 printable characters",
    ),
    "metric list with inf": (
        with_metrics(num_examples=1, losses=[1.0, float("inf")]),
        "losses is [1.0, inf], should be finite",
    ),
}


class Answering(LocalGrid):
    """Nodes that answer with what `answer(message, partition)` returns."""

    def __init__(
        self, answer: Callable[[Message, int], Answer], num_nodes: int, *, seed: int = 0
    ) -> None:
        super().__init__(ClientApp(), num_nodes, seed=seed)
        self.answer = answer

    def reply(self, message: Message) -> Message:
        answer = self.answer(message, self.partition(message.metadata.dst_node_id))
        if isinstance(answer, Error):
            return Message(answer, reply_to=message)
        # A copy, so that no run can change what the next one gets. An evaluate reply has no arrays.
        records = {
            key: type(record)(dict(record))
            for key, record in answer.items()
            if message.metadata.message_type == "train" or not isinstance(record, ArrayRecord)
        }
        return Message(RecordDict(records), reply_to=message)


def scripted(*answers: Answer, seed: int = 0) -> Answering:
    """Return a grid whose nodes give these answers to every message, by partition."""
    return Answering(lambda _, partition: answers[partition], len(answers), seed=seed)


class Slow(Answering):
    """The reply of partition k is there after k % 3 looks for it, or never."""

    def __init__(self, num_nodes: int, never: Iterable[int] = ()) -> None:
        super().__init__(lambda *_: good(), num_nodes)
        self.never = set(never)
        self.looks: dict[str, int] = {}  # by id of the message

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        there = []
        for message_id in message_ids:
            [message] = [m for m in self.sent if m.metadata.message_id == message_id]
            partition = self.partition(message.metadata.dst_node_id)
            looks = self.looks[message_id] = self.looks.get(message_id, 0) + 1
            if partition not in self.never and looks > partition % 3:
                there.append(message_id)
        return super().pull_messages(there)


class Clock:
    """Stands in for `time` where replies are awaited, so that no test has to wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []
        monkeypatch.setattr("flower_adapter.server.replies.time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


class Metered(LocalGrid):
    """Counts the bytes of the arrays in each message and reply. A subclass may change replies."""

    def __init__(self, client_app: ClientApp, num_nodes: int = 3, *, seed: int = 0) -> None:
        super().__init__(client_app, num_nodes, seed=seed)
        self.traffic: list[tuple[str, int, int, int]] = []  # phase, partition, down, up
        self.errors: list[str] = []

    def reply(self, message: Message) -> Message:
        down = size(message.content)  # before a mod changes it
        reply = self.changed(super().reply(message))
        up = 0 if reply.has_error() else size(reply.content)
        if reply.has_error():
            self.errors.append(reply.error.reason)
        metadata = message.metadata
        self.traffic.append((metadata.message_type, self.partition(metadata.dst_node_id), down, up))
        return reply

    def changed(self, reply: Message) -> Message:
        return reply

    def bytes_down(self, phase: str, partition: int = 0) -> list[int]:
        return [down for p, k, down, _ in self.traffic if (p, k) == (phase, partition)]

    def bytes_up(self, phase: str, partition: int = 0) -> list[int]:
        return [up for p, k, _, up in self.traffic if (p, k) == (phase, partition)]


def size(content: RecordDict) -> int:
    return sum(len(a.data) for record in content.array_records.values() for a in record.values())


def run(
    grid: LocalGrid,
    strategy: Strategy | None = None,
    *,
    start: ArrayRecord | None = None,
    **arguments: Any,
) -> tuple[Result, list[RoundRecord]]:
    """Run rounds, one unless told otherwise, and return the result and all records."""
    records: list[RoundRecord] = []
    also = arguments.pop("on_round", None)

    def on_round(record: RoundRecord) -> None:
        records.append(record)
        if also is not None:
            also(record)

    strategy = FedAvg(fraction_evaluate=0.0) if strategy is None else strategy
    start = record(**GLOBAL) if start is None else start
    arguments = {"num_rounds": 1, **arguments}
    return run_rounds(grid, strategy, start, on_round=on_round, **arguments), records


def reasons(grid: LocalGrid, record: RoundRecord) -> dict[int, str]:
    """Return the reason for each partition that was left out."""
    return {grid.partition(client.node): client.reason for client in record.left_out}


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in log.records if entry.levelno == logging.WARNING]


def partitions(grid: LocalGrid, messages: Sequence[Message]) -> list[int]:
    return [grid.partition(message.metadata.dst_node_id) for message in messages]
