"""Broken replies are dropped by name, and a round without enough good ones fails the run."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flower_adapter import npy
from flower_adapter.strategies.wrapper import Wrapper, logger, weight_key


class RoundFailed(RuntimeError):
    """A round with fewer good replies than it needs.

    Attributes:
        phase: "train" or "evaluate".
        server_round: the round, from 1.
        shortage: how many good replies there were and should be.
        reasons: node id and reason of each node without a good reply.
    """

    def __init__(
        self, phase: str, server_round: int, shortage: str, reasons: list[tuple[int, str]]
    ) -> None:
        super().__init__(phase, server_round, shortage, reasons)
        self.phase = phase
        self.server_round = server_round
        self.shortage = shortage
        self.reasons = reasons

    def __str__(self) -> str:
        lines = [f"  node {node}: {reason}" for node, reason in self.reasons]
        return "\n".join([f"{self.phase} round {self.server_round}: {self.shortage}", *lines])


class Dropped(NamedTuple):
    """A reply that was left out."""

    phase: str  # "train" or "evaluate"
    server_round: int
    node: int
    reason: str


class Guarded(Wrapper):
    """`strategy`, given only replies that it can average.

    A train reply is dropped if it carries an error, does not hold exactly one ArrayRecord and one
    MetricRecord, has arrays of other names, shapes or dtypes than the global ones of the round or
    with NaN or Inf in them, or if its weight (the strategy's `weighted_by_key`, else
    "num-examples") is missing, zero or negative, or a metric is not finite. An evaluate reply is
    dropped for its error, its metrics or its weight. Each dropped reply is logged as a warning with
    its node and the reason, and kept in `dropped`, as is a node that did not answer. The metrics of
    a train round get "num-dropped", the number of dropped replies.

    The aggregated arrays come back in the dtypes that were sent: an integer buffer that averaging
    made a float is rounded, and a float64 that an optimizer on the server made is narrowed.

    Raises:
        RoundFailed: from `aggregate_train` and `aggregate_evaluate` (hence `start`), if messages
            were sent and fewer than `min_replies` good replies came back.
    """

    def __init__(self, strategy: Strategy, *, min_replies: int = 1) -> None:
        if min_replies < 1:
            raise ValueError(f"min_replies is {min_replies}, should be at least 1")
        super().__init__(strategy)
        self.min_replies = min_replies
        self.dropped: list[Dropped] = []
        self._sent_arrays = ArrayRecord()
        self._sent_to: list[int] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._sent_arrays = arrays
        self._sent_to = [message.metadata.dst_node_id for message in messages]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        good, num_dropped = self._good_replies("train", server_round, replies)
        arrays, metrics = super().aggregate_train(server_round, good)
        if metrics is not None:
            metrics["num-dropped"] = num_dropped
        if arrays is not None:
            arrays = _in_dtypes_of(self._sent_arrays, arrays)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        self._sent_to = [message.metadata.dst_node_id for message in messages]
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        good, _ = self._good_replies("evaluate", server_round, replies)
        return super().aggregate_evaluate(server_round, good)

    def _good_replies(
        self, phase: str, server_round: int, replies: Iterable[Message]
    ) -> tuple[list[Message], int]:
        good: list[Message] = []
        dropped: list[tuple[int, str]] = []
        for reply in replies:
            reason = self._fault(phase, reply)
            if reason is None:
                good.append(reply)
            else:
                dropped.append((reply.metadata.src_node_id, reason))
        answered = {node for node, _ in dropped} | {r.metadata.src_node_id for r in good}
        silent = [(node, "no reply in time") for node in self._sent_to if node not in answered]
        for node, reason in dropped + silent:
            logger.warning("%s round %d: dropped node %d: %s", phase, server_round, node, reason)
            self.dropped.append(Dropped(phase, server_round, node, reason))
        if (self._sent_to or dropped) and len(good) < self.min_replies:
            shortage = f"{len(good)} good of {len(self._sent_to)} replies, needs {self.min_replies}"
            raise RoundFailed(phase, server_round, shortage, dropped + silent)
        return good, len(dropped)

    def _fault(self, phase: str, reply: Message) -> str | None:
        """Why `reply` cannot be used, or None if it can."""
        if reply.has_error():
            return reply.error.reason or f"error code {reply.error.code}"
        metrics = list(reply.content.metric_records.values())
        if len(metrics) != 1:
            return f"holds {len(metrics)} MetricRecords, should hold one"
        if fault := _metrics_fault(metrics[0], weight_key(self.strategy)):
            return fault
        if phase == "evaluate":
            return None
        arrays = list(reply.content.array_records.values())
        if len(arrays) != 1:
            return f"holds {len(arrays)} ArrayRecords, should hold one"
        faults = _array_faults(arrays[0], self._sent_arrays)
        return "; ".join(faults) if faults else None


def _metrics_fault(metrics: MetricRecord, key: str) -> str | None:
    weight = metrics.get(key)
    if weight is None:
        return f"{key} is missing from the metrics"
    if isinstance(weight, list) or not math.isfinite(weight) or weight <= 0:
        return f"{key} is {weight}, should be a positive number"
    for name, value in metrics.items():
        if not np.isfinite(value).all():
            return f"{name} is {value}, should be finite"
    return None


def _array_faults(arrays: ArrayRecord, sent: ArrayRecord) -> list[str]:
    faults = [f"{name} is missing" for name in sent if name not in arrays]
    for name, array in arrays.items():
        if name not in sent:
            faults.append(f"{name} was not sent")
        elif fault := _array_fault(array, sent[name]):
            faults.append(f"{name} {fault}")
    return faults


def _array_fault(array: Array, sent: Array) -> str | None:
    try:
        values = npy.from_array(array)
    except ValueError as err:
        return str(err)
    if str(values.dtype) != sent.dtype or values.shape != tuple(sent.shape):
        return f"is {values.dtype} {values.shape}, should be {sent.dtype} {tuple(sent.shape)}"
    if values.dtype.kind in "fc":
        wrong = values.size - int(np.count_nonzero(np.isfinite(values)))
        if wrong:
            return f"holds NaN or Inf ({wrong} of {values.size} values)"
    return None


def _in_dtypes_of(sent: ArrayRecord, arrays: ArrayRecord) -> ArrayRecord:
    return ArrayRecord(
        {
            name: _in_dtype(array, np.dtype(sent[name].dtype))
            if name in sent and array.dtype != sent[name].dtype
            else array
            for name, array in arrays.items()
        }
    )


def _in_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    values = npy.from_array(array)
    return npy.to_array((np.rint(values) if dtype.kind in "biu" else values).astype(dtype))
