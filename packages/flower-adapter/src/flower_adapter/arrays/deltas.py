"""Compress arrays as deltas to a model that both sides hold, and decode compressed arrays.

A compressed array keeps its name, dtype and shape. Its `stype` names the codec and the version of
the format, so a reader that does not know the format fails with Flower's "Unsupported
serialization type".

Only float arrays of two or more dimensions are compressed. Biases, normalization weights, running
statistics and integers travel without compression. They take few bytes, and a lossy codec could
make a variance negative.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from flower_adapter import protocol
from flower_adapter.arrays import npy
from flower_adapter.arrays.codecs import CodecError, codec

Residual = Mapping[str, Tensor]  # the loss by array name; float32 or float64


class Encoded(NamedTuple):
    """Compressed arrays, the same arrays decoded, and the residual (what compression has lost)."""

    arrays: ArrayRecord  # to be sent
    decoded: ArrayRecord  # the arrays that the other side will have after decoding
    residual: dict[str, Tensor]  # the loss, to be added to the next delta (error feedback)


def encode(
    arrays: ArrayRecord, base: ArrayRecord, codec_name: str, residual: Residual | None = None
) -> Encoded:
    """Compress `arrays` as deltas to `base`.

    The `residual` of the last call is first added to the deltas (error feedback). Only float arrays
    of two or more dimensions are compressed, and only if `base` has an array with the same name,
    dtype and shape. All other arrays stay as they are.

    Raises:
        CodecError: the codec is unknown, or a delta holds NaN, Inf or values that are too large for
            the codec.
    """
    chosen = codec(codec_name)
    encoded, decoded, lost = ArrayRecord(), ArrayRecord(), {}
    for name, array in arrays.items():
        before = base.get(name)
        if before is None or not _is_compressible(array) or not _alike(array, before):
            encoded[name] = decoded[name] = array
            continue
        delta = _wide(array) - _wide(before)
        if residual is not None and name in residual and residual[name].shape == delta.shape:
            delta += residual[name]
        used, data = chosen, chosen.encode(delta.float())
        if len(data) > 4 * delta.numel():  # scales can make a small array larger than fp32
            used = codec("fp32")
            data = used.encode(delta.float())
        decoded[name] = _moved(before, used.decode(data, array.shape))
        # The loss includes the rounding to the dtype of the array.
        lost[name] = delta.sub_(_wide(decoded[name]) - _wide(before))
        if not torch.isfinite(lost[name].abs().amax()):
            raise CodecError(f"{name} has moved by NaN, Inf or values too large for {chosen.name}")
        stype = protocol.compressed_stype(used.name)
        encoded[name] = Array(array.dtype, array.shape, stype, data)
    return Encoded(encoded, decoded, lost)


def decode(arrays: ArrayRecord, base: ArrayRecord) -> ArrayRecord:
    """Decode the deltas from `encode` and add them to `base`. Uncompressed arrays stay unchanged.

    Raises:
        CodecError: the codec or its version is unknown, the data is damaged, or `base` has no
            array with the same name, dtype and shape.
    """
    decoded = ArrayRecord()
    for name, array in arrays.items():
        if not protocol.is_compressed(array.stype):
            decoded[name] = array
            continue
        before = base.get(name)
        if before is None or not _alike(array, before) or not _is_compressible(array):
            have = "none" if before is None else f"{before.dtype} {before.shape}"
            raise CodecError(
                f"{name} is {array.dtype} {array.shape}, compressed; the model here has {have}"
            )
        try:
            chosen = codec(protocol.codec_of(array.stype))
            delta = chosen.decode(array.data, tuple(array.shape))
        except ValueError as error:
            raise CodecError(f"{name}: {error}") from error
        decoded[name] = _moved(before, delta)
    return decoded


def same_arrays(arrays: ArrayRecord, others: ArrayRecord) -> bool:
    """Tell whether two records hold the same bytes under the same names in the same order."""
    if arrays is others:
        return True
    return list(arrays) == list(others) and all(
        array.data == others[name].data for name, array in arrays.items()
    )


def _is_compressible(array: Array) -> bool:
    is_float = array.dtype in ("float16", "float32", "float64")
    return is_float and len(array.shape) > 1 and 0 not in array.shape


def _alike(array: Array, base: Array) -> bool:
    return (array.dtype, tuple(array.shape)) == (base.dtype, tuple(base.shape))


def _wide(array: Array) -> Tensor:
    """Return the values, with float16 as float32. The caller must not write to the tensor."""
    values = npy.array_view(array)
    return values.float() if values.dtype == torch.float16 else values


def _moved(base: Array, delta: Tensor) -> Array:
    """Return `base` + `delta`. This is one addition, so server and client get the same bits."""
    values = npy.array_view(base)
    moved = torch.empty_like(values)
    torch.add(values, delta, out=moved)
    return npy.to_array(moved.numpy())
