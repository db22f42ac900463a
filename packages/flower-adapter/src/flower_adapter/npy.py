"""`numpy.ndarray` or tensor to Flower's `Array` and back with one copy and none.

Flower's `Array` holds the bytes of `numpy.save`. `numpy.save` into memory copies in chunks and
`numpy.load` copies again; here the bytes are written once and read in place.
"""

import ctypes
import math
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

STYPE = "numpy.ndarray"
_MAX_HEADER = 10_000  # bytes, as in numpy.load


def to_array(values: NDArray[Any]) -> Array:
    """`values` as an `Array`, with the same bytes as `numpy.save` writes."""
    values = np.asarray(values, order="C")
    data = b"".join((_header(values.dtype, values.shape), values.data))
    return Array(dtype=str(values.dtype), shape=values.shape, stype=STYPE, data=data)


def allocate(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[Array, Tensor]:
    """An `Array` of zeros and the tensor of its own memory, to be filled before it is handed on.

    Whatever ends in an `Array` can so be computed where it will stay: `Array` holds `bytes`, into
    which a finished tensor would have to be copied. Bytes must not change once others have them.
    """
    header = _header(dtype, shape)
    data = bytes(len(header) + math.prod(shape) * dtype.itemsize)
    raw = np.frombuffer(data, np.uint8)
    ctypes.memmove(raw.ctypes.data, header, len(header))
    values = raw[len(header) :].view(dtype).reshape(shape)
    return Array(dtype=str(dtype), shape=shape, stype=STYPE, data=data), tensor_view(values)


def from_array(array: Array) -> NDArray[Any]:
    """The values of `array` as a read-only view of its bytes.

    Raises:
        ValueError: the bytes are not one whole array in numpy's format 1.0 or 2.0, or would need
            pickle.
    """
    if array.stype != STYPE:
        raise ValueError(f"is serialized as {array.stype!r}, should be {STYPE!r}")
    start = _header_size(array.data)
    shape, fortran_order, dtype = _read_header(array.data[:start])
    if dtype.hasobject:
        raise ValueError(f"has dtype {dtype}, which holds Python objects")
    size, held = math.prod(shape) * dtype.itemsize, len(array.data) - start
    if size != held:
        raise ValueError(f"holds {held} bytes, should hold {size} for {dtype} {shape}")
    if size == 0:
        return np.empty(shape, dtype)
    flat = np.frombuffer(array.data, dtype, offset=start)
    return flat.reshape(shape, order="F" if fortran_order else "C")


def cast(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`values` in `dtype`: floats to integers rounded to the nearest, and kept within its range."""
    if dtype.kind in "iu" and values.dtype.kind == "f":
        # The largest double below 2**63 or 2**64, which a mean in double precision can round to.
        most = np.nextafter(2.0 ** (8 * dtype.itemsize - (dtype.kind == "i")), 0)
        values = np.clip(np.rint(values), np.iinfo(dtype).min, most)
    elif dtype.kind == "b":
        values = np.rint(values)
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def tensor_view(values: NDArray[Any]) -> Tensor:
    """A tensor of the memory of `values`, to be read only; of a copy if that is not in C order.

    torch has no read-only tensors: it warns of a read-only array, and would let it be written to.
    The tensor keeps `values` alive.
    """
    values = np.asarray(values, order="C")
    if values.flags.writeable or values.size == 0:
        return torch.from_numpy(np.require(values, requirements="W"))
    held: Any = (ctypes.c_uint8 * values.nbytes).from_address(values.ctypes.data)
    held._owner = values
    return torch.from_numpy(np.frombuffer(held, values.dtype).reshape(values.shape))


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    about = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def _header_size(data: bytes) -> int:
    """Bytes before the values: magic, version, length and header."""
    version = np.lib.format.read_magic(BytesIO(data[:8]))
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is in numpy format {version}, should be (1, 0) or (2, 0)")
    width = 2 if version == (1, 0) else 4
    size = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if size > _MAX_HEADER:
        raise ValueError(f"has a header of {size} bytes, should have at most {_MAX_HEADER}")
    return size


@lru_cache(maxsize=1024)
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype: numpy parses a header in more time than it takes to add an array."""
    stream = BytesIO(header)
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)
