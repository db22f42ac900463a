"""Decide which replies count. Check each reply alone, then compare all replies of a round."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from flower_adapter.arrays import npy

FEWEST_OTHERS = 2  # how many other values above 0 a comparison needs
LARGEST_WEIGHT = 2.0**53  # up to here, double precision counts examples exactly


@dataclass(frozen=True)
class Guard:
    """The rules that decide which replies of a round count.

    A train reply is left out if
    - it carries an error or cannot be decoded,
    - it does not hold exactly one ArrayRecord and one MetricRecord,
    - its arrays have other names, shapes or dtypes than the arrays that were sent,
    - its arrays hold NaN or Inf,
    - its weight (the strategy's `weighted_by_key`, else "num-examples") is not a positive number
      of at most 2^53,
    - another metric is NaN or Inf,
    - its weight is above `max_weight_ratio` times the median of the other weights, or
    - the L2 norm of its update is above `max_norm_ratio` times the median of the other norms.

    The last two rules compare all replies of a round. They need at least three replies, because two
    replies cannot show which one is wrong. Updates of norm 0 do not take part in the comparison. An
    evaluate reply holds no arrays, so only the rules for errors and metrics apply to it. The weight
    is one of the metrics.

    Args:
        min_replies: how many good replies a phase (training or evaluation) needs, at least 1. A
            phase with fewer good replies has failed, and the global arrays stay as they were.
        max_failed_rounds: how many failed rounds in a row end the run, at least 1.
        max_norm_ratio: the ratio in the rule for norms, above 1. None switches the rule off.
        max_weight_ratio: the ratio in the rule for weights, above 1. None switches the rule off.
    """

    min_replies: int = 1
    max_failed_rounds: int = 3
    max_norm_ratio: float | None = 100.0
    max_weight_ratio: float | None = 1000.0

    def __post_init__(self) -> None:
        for name in ("min_replies", "max_failed_rounds"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, should be a whole number of at least 1")
        for name in ("max_norm_ratio", "max_weight_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not ratio > 1:
                raise ValueError(f"{name} is {ratio}, should be above 1, or None")

    def check(self, reply: RecordDict, weight_key: str, sent: ArrayRecord | None) -> float:
        """Check one reply alone, and return the L2 norm of its update.

        Args:
            reply: the decoded content of the reply.
            weight_key: the name of the metric that the strategy uses as the reply's weight.
            sent: the global arrays that were sent to the client, or None for an evaluate reply.
                With None the method returns 0.

        Raises:
            ValueError: the reply cannot be used. The message says why.
        """
        # This code does not use Flower's typed views, such as `reply.array_records`. A view keeps
        # the arrays in memory until the next garbage collection.
        metrics = [record for record in reply.values() if isinstance(record, MetricRecord)]
        arrays = [record for record in reply.values() if isinstance(record, ArrayRecord)]
        if len(metrics) != 1:
            raise ValueError(f"holds {len(metrics)} MetricRecords, should hold one")
        _check_metrics(metrics[0], weight_key)
        if sent is None:
            return 0.0
        if len(arrays) != 1:
            raise ValueError(f"holds {len(arrays)} ArrayRecords, should hold one")
        check_arrays(arrays[0], sent)
        norm = update_norm(arrays[0], sent)
        if not math.isfinite(norm):
            reason = not_finite(arrays[0])
            raise ValueError(reason or f"its update has norm {norm}, should be finite")
        return norm

    def outliers(self, norms: Sequence[float], weights: Sequence[float]) -> dict[int, str]:
        """Compare the updates of a round, and return each outlier's index and reason.

        Args:
            norms: the L2 norm of each update.
            weights: the weight of each update, in the same order. The order does not matter.
        """
        return {
            **_above_the_others(weights, self.max_weight_ratio, "its weight is"),
            **_above_the_others(norms, self.max_norm_ratio, "its update has norm"),
        }

    def shortage(self, good: int, asked: int) -> str | None:
        """Return a message if too few of the `asked` clients gave a good reply, else None."""
        if asked and good < self.min_replies:
            return f"{good} good of {asked} replies, needs {self.min_replies}"
        return None


def _above_the_others(values: Sequence[float], ratio: float | None, what: str) -> dict[int, str]:
    """Return the index and the reason for each value that is far above the other values.

    A value is far above if it is above `ratio` times the median of the other positive values.
    """
    if ratio is None:
        return {}
    positive = sorted(value for value in values if value > 0)
    reasons = {}
    for index, value in enumerate(values):
        num_others = len(positive) - (value > 0)
        if num_others < FEWEST_OTHERS:
            continue
        middle = num_others // 2  # the index of the upper median among the others
        if value > 0 and bisect_left(positive, value) <= middle:
            middle += 1  # the value itself stands before the median
        usual = positive[middle]
        if value > usual * ratio:
            reasons[index] = (
                f"{what} {value:.4g}, should be at most {ratio:g} times {usual:.4g}, the median of "
                "the others"
            )
    return reasons


def not_finite(arrays: ArrayRecord) -> str:
    """Return a text that names the arrays with NaN or Inf, or "" if there are none."""
    faults = []
    for name, array in arrays.items():
        values = npy.from_array(array)
        if values.dtype.kind in "fc":
            wrong = values.size - int(np.count_nonzero(np.isfinite(values)))
            if wrong:
                faults.append(f"{name} holds NaN or Inf ({wrong} of {values.size} values)")
    return "; ".join(faults)


def update_norm(arrays: ArrayRecord, sent: ArrayRecord) -> float:
    """Return the L2 norm of `arrays` - `sent` over all float and complex arrays.

    If `arrays` hold NaN or Inf, the norm is NaN or Inf.
    """
    total = 0.0
    for name, array in arrays.items():
        values = npy.from_array(array)
        if values.dtype.kind not in "fc":
            continue
        now, before = npy.tensor_view(values), npy.array_view(sent[name])
        norm = float(torch.linalg.vector_norm(now - before))
        if math.isinf(norm):  # a difference or a square of finite values can overflow
            wide = torch.complex128 if now.is_complex() else torch.float64
            norm = float(torch.linalg.vector_norm(now.to(wide) - before.to(wide)))
        total = math.hypot(total, norm)
    return total


def _check_metrics(metrics: MetricRecord, weight_key: str) -> None:
    weight = metrics.get(weight_key)
    if weight is None:
        raise ValueError(f"{weight_key} is missing from the metrics")
    if isinstance(weight, list) or not 0 < weight <= LARGEST_WEIGHT:
        raise ValueError(f"{weight_key} is {weight}, should be a positive number of at most 2^53")
    for name, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int) or math.isfinite(number) for number in numbers):
            raise ValueError(f"{name} is {value}, should be finite")


def check_arrays(arrays: ArrayRecord, sent: ArrayRecord) -> None:
    faults = [f"{name} is missing" for name in sent if name not in arrays]
    for name, array in arrays.items():
        if name not in sent:
            faults.append(f"{name} should not be there")
        elif fault := _array_fault(array, sent[name]):
            faults.append(f"{name} {fault}")
    if faults:
        raise ValueError("; ".join(faults))


def _array_fault(array: Array, sent: Array) -> str | None:
    try:
        values = npy.from_array(array)
    except ValueError as err:
        return str(err)
    if str(values.dtype) != sent.dtype or values.shape != tuple(sent.shape):
        return f"is {values.dtype} {values.shape}, should be {sent.dtype} {tuple(sent.shape)}"
    return None
