"""Decide which replies count. Check each reply alone, then compare all replies of a round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from flower_adapter.arrays import npy

FEWEST_OTHERS = 2  # how many other norms above 0 a comparison needs


@dataclass(frozen=True)
class Guard:
    """The rules that decide which replies of a round count.

    A train reply is left out if
    - it carries an error or cannot be decoded,
    - it does not hold exactly one ArrayRecord and one MetricRecord,
    - its arrays have other names, shapes or dtypes than the arrays that were sent,
    - its arrays hold NaN or Inf,
    - its weight (the strategy's `weighted_by_key`, else "num-examples") is not a positive number,
    - another metric is NaN or Inf,
    - the L2 norm of its update is above `max_norm_ratio` times the median of the other norms.

    The last rule ignores updates of norm 0. It needs at least three updates with a norm above 0,
    because two updates cannot show which one is wrong. An evaluate reply holds no arrays, so only
    the rules for errors and metrics apply to it. The weight is one of the metrics.

    Args:
        min_replies: how many good replies a phase (training or evaluation) needs, at least 1. A
            phase with fewer good replies has failed, and the global arrays stay as they were.
        max_failed_rounds: how many failed rounds in a row end the run, at least 1.
        max_norm_ratio: the ratio in the last rule, above 1. None switches the last rule off.
    """

    min_replies: int = 1
    max_failed_rounds: int = 3
    max_norm_ratio: float | None = 100.0

    def __post_init__(self) -> None:
        for name in ("min_replies", "max_failed_rounds"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, should be a whole number of at least 1")
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise ValueError(f"max_norm_ratio is {self.max_norm_ratio}, should be above 1, or None")

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
        _check_arrays(arrays[0], sent)
        norm = update_norm(arrays[0], sent)
        if not math.isfinite(norm):
            reason = not_finite(arrays[0])
            raise ValueError(reason or f"its update has norm {norm}, should be finite")
        return norm

    def outliers(self, norms: Sequence[float]) -> dict[int, str]:
        """Compare the norms of a round's updates, and return each outlier's index and reason.

        Each norm is compared with the median of the other positive norms. The order of the norms
        does not matter.
        """
        if self.max_norm_ratio is None:
            return {}
        reasons = {}
        for index, norm in enumerate(norms):
            others = [other for other in (*norms[:index], *norms[index + 1 :]) if other > 0]
            if len(others) < FEWEST_OTHERS:
                continue
            usual = median_high(others)
            if norm > usual * self.max_norm_ratio:
                reasons[index] = (
                    f"its update has norm {norm:.4g}, should be at most {self.max_norm_ratio:g} "
                    f"times {usual:.4g}, the median of the others"
                )
        return reasons

    def shortage(self, good: int, asked: int) -> str | None:
        """Return the reason if `good` replies from `asked` clients are too few, else None."""
        if asked and good < self.min_replies:
            return f"{good} good of {asked} replies, needs {self.min_replies}"
        return None


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
    if isinstance(weight, list) or not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"{weight_key} is {weight}, should be a positive number")
    for name, value in metrics.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{name} is {value}, should be finite")


def _check_arrays(arrays: ArrayRecord, sent: ArrayRecord) -> None:
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
