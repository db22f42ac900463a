"""The weighted mean of replies, each folded in as it comes and then let go."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from flower_adapter import npy
from flower_adapter.arrays import WIRE_DTYPES

BLOCK = 128  # records averaged among themselves before they join the total

_DTYPES = frozenset(map(np.dtype, WIRE_DTYPES.values()))

Values = Mapping[str, NDArray[Any]]


class Average:
    """A running weighted mean of `ArrayRecord`s of the same names, shapes and dtypes.

    Memory does not grow with the number of records: the mean so far, and from the 129th record on a
    second one. Floats and complex numbers are averaged in their own precision, half precision in
    single, in blocks of 128 records and then over the blocks, so that the rounding error of ten
    thousand records is that of some hundred (a cascade sum: Higham, "The accuracy of floating point
    summation", 1993; the running mean: Welford, 1962); the difference of two records must be within
    the range of their dtype. Integers and bools are averaged in double precision and rounded to the
    nearest, ties to even.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._block = _Mean()
        self._total = _Mean()

    def add(self, arrays: ArrayRecord, weight: float) -> None:
        """Fold in one record.

        Raises:
            ValueError: the weight is not a positive number, or names, shapes or dtypes are not
                those of the first record. The mean is as before.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight is {weight}, should be a positive number")
        values = {name: npy.from_array(array) for name, array in arrays.items()}
        self._check(values)
        self._block.fold(values, weight)
        if self._block.count == BLOCK:
            self._close_block()

    def result(self) -> ArrayRecord:
        """The mean, in the dtypes of the records; afterwards there is nothing in it any more.

        Raises:
            ValueError: nothing was added.
        """
        if not self._dtypes:
            raise ValueError("nothing was added, so there is no mean")
        if self._total.count and self._block.count:
            self._close_block()
        mean = self._total if self._total.count else self._block
        record = ArrayRecord(
            {name: _rounded(mean.arrays[name], dtype) for name, dtype in self._dtypes.items()}
        )
        self._begin()
        return record

    def _check(self, values: Values) -> None:
        if not self._dtypes:
            wrong = [
                f"{name} is {array.dtype}, which has no mean"
                for name, array in values.items()
                if array.dtype not in _DTYPES
            ]
            if not wrong:
                self._dtypes = {name: array.dtype for name, array in values.items()}
                self._shapes = {name: array.shape for name, array in values.items()}
        else:
            wrong = [f"{name} is missing" for name in self._dtypes if name not in values]
            for name, array in values.items():
                if name not in self._dtypes:
                    wrong.append(f"{name} was not in the first record")
                elif (array.dtype, array.shape) != (self._dtypes[name], self._shapes[name]):
                    wrong.append(
                        f"{name} is {array.dtype} {array.shape}, in the first record "
                        f"{self._dtypes[name]} {self._shapes[name]}"
                    )
        if wrong:
            raise ValueError("; ".join(wrong))

    def _close_block(self) -> None:
        values = {name: npy.from_array(array) for name, array in self._block.arrays.items()}
        self._total.fold(values, self._block.weight)
        self._block.restart()


class _Mean:
    """The mean of what was folded in, in memory that ends as the arrays of a record."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self._tensors: dict[str, Tensor] = {}  # of the memory of the arrays
        self.restart()

    def restart(self) -> None:
        """Begin anew in the same memory."""
        self.weight = 0.0
        self.count = 0

    def fold(self, values: Values, weight: float) -> None:
        self.weight += weight
        for name, array in values.items():
            operand = _operand(array)
            if name not in self.arrays:
                dtype = np.dtype(str(operand.dtype).removeprefix("torch."))
                self.arrays[name], self._tensors[name] = npy.allocate(dtype, array.shape)
            if self.count:
                self._tensors[name].lerp_(operand, weight / self.weight)
            else:
                self._tensors[name].copy_(operand)
        self.count += 1


def average_arrays(weighted: Iterable[tuple[ArrayRecord, float]]) -> ArrayRecord:
    """The weighted mean of an iterable of records and weights, taken one at a time.

    Raises:
        ValueError: as in `Average.add`, or the iterable is empty.
    """
    average = Average()
    for arrays, weight in weighted:
        average.add(arrays, weight)
    return average.result()


def _operand(values: NDArray[Any]) -> Tensor:
    """`values` as torch can average them: integers in double, half precision in single."""
    if values.dtype.kind in "biu":
        return torch.from_numpy(np.asarray(values, np.float64))
    if values.dtype == np.float16:
        return torch.from_numpy(np.asarray(values, np.float32))
    return npy.tensor_view(values)


def _rounded(mean: Array, dtype: np.dtype[Any]) -> Array:
    if mean.dtype == str(dtype):
        return mean
    return npy.to_array(npy.cast(npy.from_array(mean), dtype))
