"""Broken replies are dropped by name, and rounds without enough good ones fail the run."""

import math
from collections.abc import Callable, Iterable, Iterator
from statistics import median_high
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.app.typing import MetricRecordValues
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from flower_adapter import npy
from flower_adapter.checks import require_count
from flower_adapter.strategies.wrapper import (
    Wrapper,
    chain,
    empty,
    logger,
    weight_key,
)

NO_REPLY = "no reply in time"
ENOUGH_TO_COMPARE = 5  # replies that wait for each other until their norms are judged
FEWEST_OTHERS = 2  # norms that one is compared with


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

    A train reply is dropped if it carries an error, cannot be decoded, does not hold exactly one
    ArrayRecord and one MetricRecord, has arrays of other names, shapes or dtypes than the global
    ones of the round or with NaN or Inf in them, or if its weight (the strategy's
    `weighted_by_key`, else "num-examples") is missing, zero or negative, or a metric is not finite.
    It is dropped too if its update has more than `max_norm_ratio` times the (L2) norm that is the
    median of the others'; None lets every norm pass. The first five replies wait for each other so
    that each has others. Updates of norm 0 are no measure, and with fewer than two others there is
    no telling which is wrong, so all stay. An evaluate reply is dropped for its error, its metrics
    or its weight.

    Each dropped reply is logged as a warning with its node and the reason, and kept in `dropped`,
    as is a node that did not answer. The metrics of a train round get "num-replies", the number of
    good ones, and "num-dropped", that of dropped ones.

    A round with fewer than `min_replies` good replies, or whose aggregated arrays hold NaN or Inf,
    has failed: the global arrays and the strategy's attributes stay as they were, and a warning
    says why. Training and evaluation are counted apart.

    The strategy gets integer and bool arrays as float64, since some of Flower's cannot take them,
    and the aggregated arrays come back in the dtypes that were sent: integers are rounded, and a
    float64 that an optimizer on the server made is narrowed.
    `like_sent=False` is for strategies whose arrays are no model of fixed shape, such as Flower's
    for XGBoost: arrays are then neither compared with those sent nor narrowed.

    Raises:
        RoundFailed: from `aggregate_train` and `aggregate_evaluate` (hence `start`), after
            `max_failed_rounds` failed rounds in a row, or when all rounds of the run have failed.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        min_replies: int = 1,
        max_failed_rounds: int = 3,
        max_norm_ratio: float | None = 100.0,
        like_sent: bool = True,
    ) -> None:
        require_count("min_replies", min_replies)
        require_count("max_failed_rounds", max_failed_rounds)
        if max_norm_ratio is not None and not max_norm_ratio > 1:
            raise ValueError(f"max_norm_ratio is {max_norm_ratio}, should be above 1, or None")
        super().__init__(strategy)
        self.min_replies = min_replies
        self.max_failed_rounds = max_failed_rounds
        self.max_norm_ratio = max_norm_ratio
        self.like_sent = like_sent
        self.dropped: list[Dropped] = []
        self._failed = {"train": 0, "evaluate": 0}  # rounds in a row
        self._sent_arrays = ArrayRecord()
        self._sent_to: list[int] = []
        self._num_replies = 0
        self._num_rounds = max_failed_rounds

    def begin(self, num_rounds: int) -> None:
        self._num_rounds = num_rounds
        super().begin(num_rounds)

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
        before = len(self.dropped)
        attributes = [(part, dict(vars(part))) for part in chain(self.strategy)]
        try:
            good = self._good_replies("train", server_round, replies)
            arrays, metrics = super().aggregate_train(server_round, good)
            if arrays is not None and self.like_sent:
                arrays = _in_dtypes_of(self._sent_arrays, arrays)
            self._require_finite(server_round, arrays)
        except RoundFailed as failure:
            for part, unchanged in attributes:
                vars(part).update(unchanged)
            self._count_failure(failure)
            counts: dict[str, MetricRecordValues]
            counts = {"num-replies": self._num_replies, "num-dropped": self._num_dropped(before)}
            return None, MetricRecord(counts)
        self._failed["train"] = 0
        if metrics is not None:
            metrics["num-replies"] = self._num_replies
            metrics["num-dropped"] = self._num_dropped(before)
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
        try:
            good = self._good_replies("evaluate", server_round, replies)
            metrics = super().aggregate_evaluate(server_round, good)
        except RoundFailed as failure:
            self._count_failure(failure)
            return None
        self._failed["evaluate"] = 0
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {
            "failed": dict(self._failed),
            "dropped": [tuple(dropped) for dropped in self.dropped],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._failed = state["failed"]
        self.dropped = [Dropped(*dropped) for dropped in state["dropped"]]

    def _good_replies(
        self, phase: str, server_round: int, replies: Iterable[Message]
    ) -> Iterator[Message]:
        """The good replies as they come; RoundFailed at the end if they were too few."""
        asked, reasons, count = list(self._sent_to), [], 0
        answered: set[int] = set()

        def drop(node: int, reason: str) -> None:
            logger.warning("%s round %d: dropped node %d: %s", phase, server_round, node, reason)
            self.dropped.append(Dropped(phase, server_round, node, reason))
            reasons.append((node, reason))

        def sound() -> Iterator[Message]:
            for reply in map(self.received, replies):
                node = reply.metadata.src_node_id
                answered.add(node)
                reason = self._fault(phase, reply)
                if reason is None:
                    yield reply
                else:
                    drop(node, reason)
                    empty(reply)
                del reply

        judged = sound() if phase == "evaluate" else self._of_usual_norm(sound(), drop)
        for reply in judged:
            count += 1
            yield reply
            del reply
        self._num_replies = count
        for node in asked:
            if node not in answered:
                drop(node, NO_REPLY)
        if (asked or answered) and count < self.min_replies:
            shortage = f"{count} good of {len(asked)} replies, needs {self.min_replies}"
            raise RoundFailed(phase, server_round, shortage, reasons)

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
        faults = _array_faults(arrays[0], self._sent_arrays) if self.like_sent else []
        return "; ".join(faults) or None

    def _of_usual_norm(
        self, replies: Iterator[Message], drop: Callable[[int, str], None]
    ) -> Iterator[Message]:
        """`replies` without those whose update is not finite or far longer than the others'."""
        norms: list[float] = []
        waiting: list[tuple[Message, float]] = []

        def judge() -> Iterator[Message]:
            medians = [_usual_norm(i, [n for _, n in waiting], norms) for i in range(len(waiting))]
            judged = list(zip(waiting, medians, strict=True))
            waiting.clear()
            while judged:
                (reply, norm), usual = judged.pop(0)
                if norm > usual * (self.max_norm_ratio or math.inf):
                    reason = (
                        f"its update has norm {norm:.4g}, the others' median is {usual:.4g}, "
                        f"should be at most {self.max_norm_ratio:g} times that"
                    )
                    drop(reply.metadata.src_node_id, reason)
                    empty(reply)
                else:
                    norms.append(norm)
                    yield reply
                del reply

        for reply in replies:
            norm = self._norm(reply)
            if math.isfinite(norm):
                waiting.append((reply, norm))
            else:
                [arrays] = reply.content.array_records.values()
                drop(reply.metadata.src_node_id, "; ".join(_not_finite(arrays)))
                empty(reply)
            del reply
            if len(norms) + len(waiting) >= ENOUGH_TO_COMPARE:
                yield from judge()
        yield from judge()

    def _norm(self, reply: Message) -> float:
        """Of the update; 0 for arrays that are not like those sent."""
        if not self.like_sent:
            return 0.0
        [arrays] = reply.content.array_records.values()
        norm = _update_norm(arrays, self._sent_arrays)
        _widen_integers(arrays)
        return norm

    def _require_finite(self, server_round: int, arrays: ArrayRecord | None) -> None:
        faults = [] if arrays is None else _not_finite(arrays)
        if faults:
            raise RoundFailed("train", server_round, f"aggregated, {'; '.join(faults)}", [])

    def _count_failure(self, failure: RoundFailed) -> None:
        self._failed[failure.phase] += 1
        in_a_row = self._failed[failure.phase]
        if in_a_row >= min(self.max_failed_rounds, self._num_rounds):
            raise failure
        logger.warning(
            "%s; the model stays as it was (%d of at most %d failed rounds in a row)",
            failure,
            in_a_row,
            self.max_failed_rounds - 1,
        )

    def _num_dropped(self, before: int) -> int:
        """Replies dropped since there were `before`; nodes without a reply are none."""
        return sum(dropped.reason != NO_REPLY for dropped in self.dropped[before:])


def _usual_norm(index: int, waiting: list[float], norms: list[float]) -> float:
    """The median of the norms beside one that waits; Inf if there are too few to tell."""
    beside = [*norms, *waiting[:index], *waiting[index + 1 :]]
    others = [norm for norm in beside if norm > 0]
    return median_high(others) if len(others) >= FEWEST_OTHERS else math.inf


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
    return None


def _update_norm(arrays: ArrayRecord, sent: ArrayRecord) -> float:
    """L2 norm of what a client changed, over its floats; NaN or Inf if any of them is."""
    total = 0.0
    for name, array in arrays.items():
        values = npy.from_array(array)
        if values.dtype.kind not in "fc":
            continue
        change = npy.tensor_view(values) - npy.tensor_view(npy.from_array(sent[name]))
        norm = float(torch.linalg.vector_norm(change))
        if math.isinf(norm):  # a square may be too large where the value is not
            norm = float(torch.linalg.vector_norm(change.to(_wide(change))))
        total += norm * norm
    return math.sqrt(total)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _not_finite(arrays: ArrayRecord) -> list[str]:
    faults = []
    for name, array in arrays.items():
        values = npy.from_array(array)
        if values.dtype.kind in "fc":
            wrong = values.size - int(np.count_nonzero(np.isfinite(values)))
            if wrong:
                faults.append(f"{name} holds NaN or Inf ({wrong} of {values.size} values)")
    return faults


def _widen_integers(arrays: ArrayRecord) -> None:
    """Integers and bools as doubles: strategies scale arrays in place, which integers refuse."""
    for name, array in list(arrays.items()):
        if np.dtype(array.dtype).kind in "biu":
            arrays[name] = _in_dtype(array, np.dtype(np.float64))


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
    return npy.to_array(npy.cast(npy.from_array(array), dtype))
