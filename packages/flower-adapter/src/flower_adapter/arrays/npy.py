"""Convert a numpy array to Flower's `Array` with one copy, and read an `Array` without a copy.

Flower's `Array` holds the bytes that `numpy.save` writes. `numpy.save` copies in chunks and
`numpy.load` copies the bytes again. The functions here write the bytes once and read them in
place.
"""

import ctypes
import math
import re
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

STYPE = "numpy.ndarray"  # Flower's name for this serialization
_MAX_HEADER = 10_000  # bytes, the limit of numpy.load
_HEADER = re.compile(
    r"\{'descr': '([<>|=][a-zA-Z]\d*(?:\[\d*\w+\])?)', 'fortran_order': (True|False), "
    r"'shape': \((\d+,|\d+(?:, \d+)+)?\), \} *\n"
)


def to_array(values: NDArray[Any]) -> Array:
    """Return `values` as an `Array` with the bytes that `numpy.save` writes."""
    values = np.asarray(values, order="C")
    data = b"".join((_header(values.dtype, values.shape), values.data))
    return Array(dtype=str(values.dtype), shape=values.shape, stype=STYPE, data=data)


def from_array(array: Array) -> NDArray[Any]:
    """Return the values of `array` as a read-only view of its bytes.

    Raises:
        ValueError: the bytes are not exactly one array in numpy's format 1.0 or 2.0, the array
            would need pickle, or its dtype or shape is not the one that `array` declares.
    """
    if array.stype != STYPE:
        raise ValueError(f"is serialized as {array.stype!r}, should be {STYPE!r}")
    start = _header_size(array.data)
    shape, fortran_order, dtype = _read_header(array.data[:start])
    if dtype.hasobject:
        raise ValueError(f"has dtype {dtype}, which holds Python objects")
    if dtype.itemsize == 0:  # no number of bytes limits the shape
        raise ValueError(f"has dtype {dtype}, whose values take no bytes")
    if array.dtype != str(dtype) or tuple(array.shape) != shape:
        raise ValueError(f"says {array.dtype} {tuple(array.shape)}, but holds {dtype} {shape}")
    size, available = math.prod(shape) * dtype.itemsize, len(array.data) - start
    if size != available:
        raise ValueError(f"holds {available} bytes, should hold {size} for {dtype} {shape}")
    if size == 0:
        return np.empty(shape, dtype)
    flat = np.frombuffer(array.data, dtype, offset=start)
    return flat.reshape(shape, order="F" if fortran_order else "C")


def cast(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return `values` in `dtype`. For an integer `dtype`, round and clip floats."""
    if dtype.kind in "iu" and values.dtype.kind == "f":
        # `most` is the largest double below the limit of the dtype, such as 2**63 for int64.
        # A mean in double precision can be rounded up to this limit, which the dtype cannot hold.
        most = np.nextafter(2.0 ** (8 * dtype.itemsize - (dtype.kind == "i")), 0)
        values = np.clip(np.rint(values), np.iinfo(dtype).min, most)
    elif dtype.kind == "b":
        values = np.rint(values)
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def tensor_view(values: NDArray[Any]) -> Tensor:
    """Return a tensor that shares the memory of `values`. The caller must not write to the tensor.

    Values that are not in C order are copied. torch has no read-only tensors, so it warns about a
    read-only array. To avoid this warning, a read-only array is first wrapped in a ctypes view,
    which does not have the read-only flag. The tensor keeps `values` alive.
    """
    values = np.asarray(values, order="C")
    if values.flags.writeable or values.size == 0:
        return torch.from_numpy(np.require(values, requirements="W"))
    view: Any = (ctypes.c_uint8 * values.nbytes).from_address(values.ctypes.data)
    view._owner = values
    return torch.from_numpy(np.frombuffer(view, values.dtype).reshape(values.shape))


def array_view(array: Array) -> Tensor:
    """Return a tensor that shares the bytes of `array`. The caller must not write to the tensor."""
    return tensor_view(from_array(array))


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    fields = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def _header_size(data: bytes) -> int:
    """Return the number of bytes before the values: magic, version, length and header."""
    version = np.lib.format.read_magic(BytesIO(data[:8]))
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"is in numpy format {version}, should be (1, 0) or (2, 0)")
    width = 2 if version == (1, 0) else 4
    size = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if size > _MAX_HEADER:
        raise ValueError(f"has a header of {size} bytes, should have at most {_MAX_HEADER}")
    return size


@lru_cache(maxsize=1024)  # parsing a header takes longer than adding an array to a sum
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read a header. Return the shape, whether the order is Fortran order, and the dtype.

    numpy's own reader parses the header as Python code, which can fail in many ways. This reader
    takes only the form that `numpy.save` writes for an array without fields.
    """
    text = header[10 if header[6] == 1 else 12 :].decode("latin-1")
    match = _HEADER.fullmatch(text)
    if match is None:
        raise ValueError(f"has the header {text[:80]!r}, should have one that numpy.save writes")
    descr, fortran_order, shape = match.groups()
    try:
        dtype = np.dtype(descr)
    except (TypeError, ArithmeticError, MemoryError, RuntimeError, SyntaxError) as error:
        raise ValueError(f"has the unknown dtype {descr!r}") from error
    sizes = tuple(int(size) for size in (shape or "").split(",") if size.strip())
    return sizes, fortran_order == "True", dtype
