"""`numpy.ndarray` to Flower's `Array` and back with one copy and none.

Flower's `Array` holds the bytes of `numpy.save`. `numpy.save` into memory copies in chunks and
`numpy.load` copies again; here the bytes are joined once and read in place.
"""

import math
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

STYPE = "numpy.ndarray"


def to_array(values: NDArray[Any]) -> Array:
    """`values` as an `Array`, with the same bytes as `numpy.save` writes."""
    values = np.asarray(values, order="C")
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    return Array(
        dtype=str(values.dtype),
        shape=values.shape,
        stype=STYPE,
        data=b"".join((header.getvalue(), values.data)),
    )


def from_array(array: Array) -> NDArray[Any]:
    """The values of `array` as a read-only view of its bytes.

    Raises:
        ValueError: the bytes are not one whole array in numpy's format 1.0 or 2.0, or would need
            pickle.
    """
    if array.stype != STYPE:
        raise ValueError(f"is serialized as {array.stype!r}, should be {STYPE!r}")
    stream = BytesIO(array.data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"is in numpy format {version}, should be (1, 0) or (2, 0)")
    if dtype.hasobject:
        raise ValueError(f"has dtype {dtype}, which holds Python objects")
    size, held = math.prod(shape) * dtype.itemsize, len(array.data) - stream.tell()
    if size != held:
        raise ValueError(f"holds {held} bytes, should hold {size} for {dtype} {shape}")
    if size == 0:
        return np.empty(shape, dtype)
    flat = np.frombuffer(array.data, dtype, offset=stream.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")
