"""Compute the weighted mean of records, one record at a time."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from flower_adapter.arrays import npy
from flower_adapter.arrays.convert import ARRAY_DTYPES, describe

BLOCK = 128  # records that are averaged as one block before the block joins the total

_DTYPES = frozenset(map(np.dtype, ARRAY_DTYPES.values()))


class Average:
    """A running weighted mean of `ArrayRecord`s with equal names, shapes and dtypes.

    Each block of 128 records has a running mean (Welford, 1962). When a block is complete, its mean
    joins a second running mean, which averages the blocks (Higham, "The accuracy of floating point
    summation", 1993). The rounding error of ten thousand records is therefore only as large as that
    of a few hundred records. Before the 128th record only one mean is in memory. From then on there
    are two, and memory does not grow further.

    Floats and complex numbers are averaged in their own dtype, but float16 is averaged in float32.
    The mean can overflow if two values differ by more than the largest number of the dtype in which
    they are averaged. Integers and bools are averaged in float64 and rounded to the nearest
    integer, ties to even.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._expected: dict[str, str] = {}  # dtype and shape of each array of the first record
        self._block = _Mean()
        self._total = _Mean()

    def add(self, arrays: ArrayRecord, weight: float) -> None:
        """Add one record to the mean.

        Raises:
            ValueError: the weight is not a positive number, or the names, shapes or dtypes differ
                from those in the first record. The mean is then unchanged.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight is {weight}, should be a positive number")
        values = {name: npy.from_array(array) for name, array in arrays.items()}
        self._check(values)
        self._block.add(values, weight)
        if self._block.count == BLOCK:
            self._close_block()

    def result(self) -> ArrayRecord:
        """Return the mean in the dtypes of the records, and begin a new mean.

        Raises:
            ValueError: no record was added.
        """
        if not self._dtypes:
            raise ValueError("no record was added, so there is no mean")
        if self._total.count and self._block.count:
            self._close_block()
        mean = (self._total if self._total.count else self._block).means
        record = ArrayRecord()
        for name, dtype in self._dtypes.items():
            # `pop` removes each mean from the dict, so only one array at a time is in memory twice.
            record[name] = npy.to_array(npy.cast(mean.pop(name).numpy(), dtype))
        self._begin()
        return record

    def _check(self, values: Mapping[str, NDArray[Any]]) -> None:
        here = {name: describe(array) for name, array in values.items()}
        if not self._expected:
            for name, array in values.items():
                if array.dtype not in _DTYPES:
                    raise ValueError(f"{name} is {array.dtype}, which has no mean")
            self._dtypes = {name: array.dtype for name, array in values.items()}
            self._expected = here
        for name in {**self._expected, **here}:
            found, expected = here.get(name, "missing"), self._expected.get(name, "not there")
            if found != expected:
                raise ValueError(f"{name} is {found}, in the first record it is {expected}")

    def _close_block(self) -> None:
        block = {name: mean.numpy() for name, mean in self._block.means.items()}
        self._total.add(block, self._block.weight)
        self._block.restart()


class _Mean:
    """A running weighted mean of each array. `_operand` chooses the dtype of the mean."""

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Begin a new mean in the same memory."""
        self.weight = 0.0
        self.count = 0

    def add(self, values: Mapping[str, NDArray[Any]], weight: float) -> None:
        self.weight += weight
        for name, array in values.items():
            operand = _operand(array)
            if name not in self.means:
                self.means[name] = torch.empty_like(operand)
            if self.count:
                self.means[name].lerp_(operand, weight / self.weight)
            else:
                self.means[name].copy_(operand)
        self.count += 1


def average_arrays(weighted: Iterable[tuple[ArrayRecord, float]]) -> ArrayRecord:
    """Return the weighted mean. The iterable yields pairs of a record and its weight.

    Raises:
        ValueError: `Average.add` rejects a record, or the iterable is empty.
    """
    average = Average()
    for arrays, weight in weighted:
        average.add(arrays, weight)
    return average.result()


def _operand(values: NDArray[Any]) -> Tensor:
    """Return `values` as a tensor in the dtype of their mean.

    Integers and bools become float64, and float16 becomes float32. All other dtypes stay.
    """
    if values.dtype.kind in "biu":
        return torch.from_numpy(np.asarray(values, np.float64))
    if values.dtype == np.float16:
        return torch.from_numpy(np.asarray(values, np.float32))
    return npy.tensor_view(values)
