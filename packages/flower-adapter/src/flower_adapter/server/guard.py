"""Decide which replies count. Check each reply alone, then compare all replies of a round."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flower_adapter import protocol
from flower_adapter.arrays import npy
from flower_adapter.arrays.convert import describe

FEWEST_OTHERS = 2  # how many other values above 0 a comparison needs
FEWEST_NORMS = 3  # how many norms above 0 a median needs
LARGEST_WHOLE = 2**53  # up to here, double precision counts every whole number
LARGEST_METRIC = 1e100  # a weighted mean of such metrics cannot overflow
MOST_METRICS = 100  # in a reply
LONGEST_NAME = 100  # characters in the name of a metric
LONGEST_LIST = 1000  # values in a metric

# For each record and metric of a reply, by text and name: the length of a list, else None.
Kinds = dict[tuple[str, str], int | None]


class Update(NamedTuple):
    """The size of the update in a reply."""

    norm: float  # the L2 norm over all float and complex arrays
    integer_change: float  # the largest absolute change in the integer arrays


NO_UPDATE = Update(0.0, 0.0)


@dataclass(frozen=True)
class Guard:
    """The rules that decide which replies of a round count, and how much.

    A reply is left out if
    - it carries an error or cannot be decoded,
    - it does not hold exactly one MetricRecord and, after training, exactly one ArrayRecord,
    - it holds other records than these and those of this package,
    - its weight (the strategy's `weighted_by_key`, else "num-examples") is not a whole number from
      1 to 2^53,
    - another metric is NaN, Inf or beyond 1e100 in magnitude, or there are more than 100 metrics,
      a list of more than 1,000 values, or a name that is not 1 to 100 printable characters,
    - its arrays have other names, shapes or dtypes than the arrays that were sent. This is checked
      before they are decoded,
    - its arrays hold NaN or Inf, or an integer beyond 2^53 in magnitude.

    The other rules look at all replies of a round together. Neither the order in which the replies
    arrive nor the labels of the clients matter.
    - All replies must have the same metrics, and records of the same names. The set that most
      replies have counts. If several sets are equally frequent, the one with the metrics of the
      last round counts, else the one of the first client in the order of labels. Other replies are
      left out.
    - A reply is left out if the L2 norm of its update is above `max_norm_ratio` times the median of
      the other norms. This also holds for the largest change of an integer. Here a median below 1
      counts as 1.
    - If the norm of an update is above `clip_norm_ratio` times the median of all norms, the update
      is scaled down to this length. Integers are not scaled.
    - If a weight is above `max_weight_ratio` times the median of all weights, it is reduced to this
      bound. For an even number of weights the median is the lower one of the two in the middle, so
      the rule holds for two clients as well.

    The rules for norms and integers need at least three replies, because two replies cannot show
    which one is wrong. Updates of norm 0 do not take part in these medians. An evaluate reply holds
    no arrays, so only the rules for records, metrics and weights apply to it. The median is sound
    as long as more than half of the clients are.

    Args:
        min_replies: how many good replies a phase (training or evaluation) needs, at least 1. A
            phase with fewer good replies has failed, and the global arrays stay as they were.
        max_failed_rounds: how many failed rounds in a row end the run, at least 1.
        max_norm_ratio: the ratio above which a reply is left out, above 1. None switches the rules
            for norms and integers off.
        max_weight_ratio: the ratio to which a weight is reduced, above 1. None switches the rule
            off.
        clip_norm_ratio: the ratio to which an update is scaled down, above 1. None switches the
            rule off.
    """

    min_replies: int = 1
    max_failed_rounds: int = 3
    max_norm_ratio: float | None = 100.0
    max_weight_ratio: float | None = 10.0
    clip_norm_ratio: float | None = 3.0

    def __post_init__(self) -> None:
        for name in ("min_replies", "max_failed_rounds"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, should be a whole number of at least 1")
        for name in ("max_norm_ratio", "max_weight_ratio", "clip_norm_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not ratio > 1:
                raise ValueError(f"{name} is {ratio}, should be above 1, or None")

    def check_declared(self, reply: RecordDict, weight_key: str, sent: ArrayRecord | None) -> None:
        """Check the records, the metrics and the declared arrays of a reply. Decode nothing.

        Args:
            reply: the content of the reply. Its arrays may be compressed.
            weight_key: the name of the metric that the strategy uses as the reply's weight.
            sent: the global arrays that were sent to the client, or None for an evaluate reply.

        Raises:
            ValueError: the reply cannot be used. The message says why.
        """
        # This code does not use Flower's typed views, such as `reply.array_records`. A view keeps
        # the arrays in memory until the next garbage collection.
        metrics = [record for record in reply.values() if isinstance(record, MetricRecord)]
        arrays = [record for record in reply.values() if isinstance(record, ArrayRecord)]
        for kind, count, expected in (
            ("MetricRecord", len(metrics), 1),
            ("ArrayRecord", len(arrays), int(sent is not None)),
        ):
            if count != expected:
                should = "one" if expected else "none"
                raise ValueError(f"holds {count} {kind}s, should hold {should}")
        for name, record in reply.items():
            if isinstance(record, ConfigRecord) and name not in protocol.REPLY_RECORDS:
                raise ValueError(f"holds the ConfigRecord {name[:LONGEST_NAME]!r}, should not")
        _check_metrics(metrics[0], weight_key)
        if sent is not None:
            _check_declared(arrays[0], sent)

    def check(self, reply: RecordDict, weight_key: str, sent: ArrayRecord | None) -> Update:
        """Check one reply alone, and return the size of its update.

        The arguments are those of `check_declared`, but the arrays are decoded. Without arrays the
        size is 0.

        Raises:
            ValueError: the reply cannot be used. The message says why.
        """
        self.check_declared(reply, weight_key, sent)
        if sent is None:
            return NO_UPDATE
        [arrays] = [record for record in reply.values() if isinstance(record, ArrayRecord)]
        check_arrays(arrays, sent)
        norm = update_norm(arrays, sent)
        if not math.isfinite(norm):
            reason = not_finite(arrays)
            raise ValueError(reason or f"its update has norm {norm}, should be finite")
        return Update(norm, _integer_change(arrays, sent))

    def strangers(
        self,
        metrics: Sequence[Mapping[str, Any]],
        records: Sequence[Sequence[str]],
        usual: Mapping[str, Any] | None,
    ) -> dict[int, str]:
        """Compare the replies of a round, and return the index and reason of each that differs.

        Args:
            metrics: the metrics of each reply, in the order of the clients' labels.
            records: the names of the records with arrays and metrics in each reply.
            usual: the metrics of a client in the last round, or None.
        """
        kinds = [_kinds(*reply) for reply in zip(metrics, records, strict=True)]
        if not kinds:
            return {}
        most = max(map(kinds.count, kinds))
        frequent = [found for found in kinds if kinds.count(found) == most]
        known = {} if usual is None else _kinds(usual, ())
        expected = next((found for found in frequent if known.items() <= found.items()), None)
        if usual is None or expected is None or len(known) != _num_metrics(expected):
            expected = frequent[0]
        return {
            index: _difference(found, expected)
            for index, found in enumerate(kinds)
            if found != expected
        }

    def outliers(self, updates: Sequence[Update]) -> dict[int, str]:
        """Compare the updates of a round, and return the index and reason of each outlier."""
        if self.max_norm_ratio is None:
            return {}
        norms = [update.norm for update in updates]
        changes = [update.integer_change for update in updates]
        return {
            **_integer_outliers(changes, self.max_norm_ratio),
            **_above_the_others(norms, self.max_norm_ratio, "its update has norm"),
        }

    def scales(self, norms: Sequence[float]) -> list[float]:
        """Return the factor for each update of a round: 1, or less if the update is too long."""
        positive = sorted(norm for norm in norms if norm > 0)
        if self.clip_norm_ratio is None or len(positive) < FEWEST_NORMS:
            return [1.0] * len(norms)
        bound = self.clip_norm_ratio * median_low(positive)
        return [bound / norm if norm > bound else 1.0 for norm in norms]

    def weights(self, weights: Sequence[float]) -> list[float]:
        """Return the weight that counts for each reply of a round: its own, or the bound."""
        if self.max_weight_ratio is None or not weights:
            return list(weights)
        bound = math.floor(self.max_weight_ratio * median_low(weights))
        return [min(weight, type(weight)(bound)) for weight in weights]

    def shortage(self, good: int, asked: int) -> str | None:
        """Return a message if too few of the `asked` clients gave a good reply, else None."""
        if asked and good < self.min_replies:
            return f"{good} good of {asked} replies, needs {self.min_replies}"
        return None


def scale_update(arrays: ArrayRecord, sent: ArrayRecord, factor: float) -> None:
    """Replace each float and complex array by `sent` + `factor` (array - `sent`), in place."""
    for name, array in list(arrays.items()):
        now, before = npy.from_array(array), npy.from_array(sent[name])
        if now.dtype.kind in "fc":
            wide = np.complex128 if now.dtype.kind == "c" else np.float64
            start = before.astype(wide)
            moved = start + factor * (now.astype(wide) - start)
            arrays[name] = npy.to_array(moved.astype(now.dtype))


def _kinds(metrics: Mapping[str, Any], records: Sequence[str]) -> Kinds:
    lengths: Kinds = {
        ("metric", name): len(value) if isinstance(value, list) else None
        for name, value in metrics.items()
    }
    return {**dict.fromkeys(("record", name) for name in records), **lengths}


def _num_metrics(kinds: Kinds) -> int:
    return sum(what == "metric" for what, _ in kinds)


def _difference(found: Kinds, expected: Kinds) -> str:
    """Return a text that names the metrics and records in which a reply differs from most."""
    missing = [f"lacks the {what} {name}" for what, name in sorted(expected.keys() - found.keys())]
    extra = [f"has the {what} {name}" for what, name in sorted(found.keys() - expected.keys())]
    other = [
        f"has {_kind(found[what, name])} for the {what} {name}, not {_kind(expected[what, name])}"
        for what, name in sorted(found.keys() & expected.keys())
        if found[what, name] != expected[what, name]
    ]
    return f"differs from most replies: {', '.join(missing + extra + other)}"


def _kind(length: int | None) -> str:
    return "a number" if length is None else f"a list of {length}"


def _integer_outliers(changes: Sequence[float], ratio: float) -> dict[int, str]:
    """Return the index and the reason for each reply with a far too large change of an integer."""
    reasons = {}
    for index, change in enumerate(changes):
        others = sorted(other for place, other in enumerate(changes) if place != index)
        if len(others) < FEWEST_OTHERS:
            continue
        usual = max(1.0, others[len(others) // 2])
        if change > usual * ratio:
            reasons[index] = (
                f"an integer has changed by {change:.4g}, should be at most {ratio:g} times "
                f"{usual:.4g}, the median of the others"
            )
    return reasons


def _above_the_others(values: Sequence[float], ratio: float, what: str) -> dict[int, str]:
    """Return the index and the reason for each value that is far above the other values.

    A value is far above if it is above `ratio` times the median of the other positive values.
    """
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


def _integer_change(arrays: ArrayRecord, sent: ArrayRecord) -> float:
    """Return the largest absolute change in the integer arrays.

    Raises:
        ValueError: an integer is beyond 2^53 in magnitude.
    """
    largest = 0.0
    for name, array in arrays.items():
        values = npy.from_array(array)
        if values.dtype.kind not in "iu" or values.size == 0:
            continue
        extreme = max(int(values.max()), int(values.min()), key=abs)
        if abs(extreme) > LARGEST_WHOLE:
            raise ValueError(f"{name} holds {extreme}, should be at most 2^53 in magnitude")
        change = values.astype(np.float64) - npy.from_array(sent[name])
        largest = max(largest, float(np.abs(change).max()))
    return largest


def _check_metrics(metrics: MetricRecord, weight_key: str) -> None:
    if len(metrics) > MOST_METRICS:
        raise ValueError(f"holds {len(metrics)} metrics, should hold at most {MOST_METRICS}")
    weight = metrics.get(weight_key)
    if weight is None:
        raise ValueError(f"{weight_key} is missing from the metrics")
    for name, value in metrics.items():
        numbers = value if isinstance(value, list) else [value]
        if not (0 < len(name) <= LONGEST_NAME and name.isprintable()):
            raise ValueError(
                f"a metric is named {name[:LONGEST_NAME]!r}, should be 1 to {LONGEST_NAME} "
                "printable characters"
            )
        if len(numbers) > LONGEST_LIST:
            raise ValueError(
                f"{name} is a list of {len(numbers)}, should have at most {LONGEST_LIST} values"
            )
        if name == weight_key and not _is_count(value):
            raise ValueError(f"{name} is {value}, should be a whole number from 1 to 2^53")
        if not all(abs(number) <= LARGEST_METRIC for number in numbers):  # not true for NaN
            raise ValueError(
                f"{name} is {value}, should be finite and at most {LARGEST_METRIC:g} in magnitude"
            )


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, int | float)
    return is_number and 1 <= value <= LARGEST_WHOLE and value == int(value)


def _check_declared(arrays: ArrayRecord, sent: ArrayRecord) -> None:
    """Raise ValueError unless `arrays` declare the names, dtypes and shapes of `sent`."""
    faults = [f"{name} is missing" for name in sent if name not in arrays]
    for name, array in arrays.items():
        if name not in sent:
            faults.append(f"{name} should not be there")
        elif (array.dtype, tuple(array.shape)) != (sent[name].dtype, tuple(sent[name].shape)):
            faults.append(f"{name} is {describe(array)}, should be {describe(sent[name])}")
    if faults:
        raise ValueError("; ".join(faults))


def check_arrays(arrays: ArrayRecord, sent: ArrayRecord) -> None:
    """Raise ValueError unless `arrays` declare and hold the names, dtypes and shapes of `sent`."""
    _check_declared(arrays, sent)
    faults = [f"{name} {fault}" for name in sent if (fault := _fault(arrays[name]))]
    if faults:
        raise ValueError("; ".join(faults))


def _fault(array: Array) -> str | None:
    try:
        npy.from_array(array)
    except ValueError as error:
        return str(error)
    return None
