"""This module defines the codecs. A codec packs one float32 tensor into fewer bytes.

The tensor has two or more dimensions.

| codec | bits per value | scale |
|---|---|---|
| fp32 | 32 | none: the values are exact |
| bf16 | 16 | none: each value is rounded to the nearest bfloat16, ties to even |
| int8 | 8 | a float32 for each channel (first dimension), from its largest magnitude |
| int4 | 4.125 | a bfloat16 for each block of 128 values, from their largest magnitude |
| 2-bit | 2.125 | a bfloat16 for each block of 128 values, by least squares |
| top-k | 64 per kept value | none: keeps the largest 1 % exactly ("top-k:0.05" keeps 5 %) |

int4 and 2-bit follow the blockwise quantization of MuLoCo (arXiv 2505.23725). "2-bit" has the four
levels of the Lloyd-Max quantizer for a normal distribution (Max, "Quantizing for minimum
distortion", 1960). First each value of a block gets one of the levels. Then the scale of the block
is chosen by least squares, so that the scaled levels are as close to the values as possible. The
norm of a block's error is therefore never larger than the norm of the block. Error feedback needs
this bound (arXiv 1901.09847).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flower_adapter.arrays import npy

BLOCK = 128  # values that share a scale in int4 and 2-bit
KEPT = 0.01  # fraction of a tensor's values that top-k keeps by default
LEAST_KEPT = 1e-6  # a smaller fraction would let a few bytes stand for any number of values
# The levels of 2-bit, and the threshold between the levels, in standard deviations.
_LOW, _HIGH, _THRESHOLD = 0.4528, 1.5104, 0.9816

Shape = tuple[int, ...]


class CodecError(ValueError):
    """An error: arrays cannot be encoded or decoded.

    The message names the codec or the array, and gives the cause.
    """


@dataclass(frozen=True)
class Codec:
    """`encode` packs a float32 tensor into bytes, and `decode` makes a tensor from the bytes.

    A client adds the share `feedback` of what one reply has lost to its next reply. With 1, all
    changes of a client arrive sooner or later, which top-k needs. "2-bit" loses a third of each
    change. The client's next training starts from a model without that third and makes up for a
    part of it, so adding all of it would do that part twice. Decayed feedback is from Wu et al.
    2018, arXiv 1806.08054.
    """

    name: str
    encode: Callable[[Tensor], bytes]  # the values must be finite
    decode: Callable[[bytes, Shape], Tensor]  # gives float32
    feedback: float = 1.0


def codec(name: str) -> Codec:
    """Return the codec "fp32", "bf16", "int8", "int4", "2-bit", "top-k" or "top-k:0.05".

    Raises:
        CodecError: there is no such codec. The message says what the name should be.
    """
    if not isinstance(name, str):
        raise CodecError(f"codec is {name!r}, should be a name such as '2-bit'")
    base, _, parameter = name.partition(":")
    if base == "top-k":
        return _top_k(name, parameter)
    if name not in _CODECS:
        known = ", ".join([*_CODECS, "top-k", "top-k:FRACTION"])
        raise CodecError(f"codec {name!r} is unknown here, should be one of {known}")
    return _CODECS[name]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Return `data[start:stop]` as a tensor of `dtype`. The caller must not write to the tensor."""
    raw = npy.tensor_view(np.frombuffer(data, np.uint8)[start:stop])
    # A view in a wider dtype must be aligned. Data that is not aligned is copied.
    return raw.view(dtype) if start % dtype.itemsize == 0 else raw.clone().view(dtype)


def _expect(name: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise CodecError(f"{name} data has {len(data)} bytes, should have {size}")


def _encode_fp32(values: Tensor) -> bytes:
    return _bytes(values)


def _decode_fp32(data: bytes, shape: Shape) -> Tensor:
    _expect("fp32", data, 4 * math.prod(shape))
    return _tensor(data, torch.float32, 0, len(data)).view(shape)


def _encode_bf16(values: Tensor) -> bytes:
    return _bytes(values.to(torch.bfloat16))


def _decode_bf16(data: bytes, shape: Shape) -> Tensor:
    _expect("bf16", data, 2 * math.prod(shape))
    return _tensor(data, torch.bfloat16, 0, len(data)).view(shape).float()


def _encode_int8(values: Tensor) -> bytes:
    channels = values.reshape(values.shape[0], -1)
    scales = channels.abs().amax(1, keepdim=True) / 127
    # A scale near the smallest floats can be rounded down so far that a quotient exceeds 127. The
    # quotients are therefore clamped.
    quantized = (channels / _divisor(scales)).round_().clamp_(-127, 127).to(torch.int8)
    return _bytes(scales) + _bytes(quantized)


def _decode_int8(data: bytes, shape: Shape) -> Tensor:
    _expect("int8", data, 4 * shape[0] + math.prod(shape))
    scales = _tensor(data, torch.float32, 0, 4 * shape[0])
    quantized = _tensor(data, torch.int8, 4 * shape[0], len(data)).view(shape[0], -1)
    return (quantized.float() * scales[:, None]).view(shape)


def _encode_int4(values: Tensor) -> bytes:
    blocks = _blocks(values)
    scales = (blocks.abs().amax(1, keepdim=True) / 7).to(torch.bfloat16)
    quantized = (blocks / _divisor(scales.float())).round_().clamp_(-7, 7)
    codes = quantized.add_(8).to(torch.uint8).view(-1, 2)
    packed = codes[:, 0] | codes[:, 1] << 4
    return _bytes(scales) + _bytes(packed)


def _decode_int4(data: bytes, shape: Shape) -> Tensor:
    count = _num_blocks(shape)
    _expect("int4", data, count * (2 + BLOCK // 2))
    packed = _tensor(data, torch.uint8, 2 * count, len(data))
    codes = torch.stack((packed & 15, packed >> 4), 1)
    return _scaled(codes.view(count, BLOCK).float().sub_(8), data, shape)


def _encode_2bit(values: Tensor) -> bytes:
    blocks = _blocks(values)
    magnitudes = blocks.abs()
    count = torch.full((len(blocks), 1), float(BLOCK))
    count[-1] -= blocks.numel() - values.numel()  # the last block is filled with zeros
    deviation = torch.linalg.vector_norm(blocks, dim=1, keepdim=True) / count.sqrt()
    large = magnitudes > _THRESHOLD * deviation
    # scale = <x, q> / <q, q>, where q are the chosen levels with the signs of x
    num_large = large.sum(1, keepdim=True)
    sum_large = (magnitudes * large).sum(1, keepdim=True)
    product = _LOW * (magnitudes.sum(1, keepdim=True) - sum_large) + _HIGH * sum_large
    scales = product / (_LOW**2 * (count - num_large) + _HIGH**2 * num_large)
    codes = (large.to(torch.uint8) | torch.signbit(blocks).to(torch.uint8) << 1).view(-1, 4)
    packed = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
    return _bytes(scales.to(torch.bfloat16)) + _bytes(packed)


def _decode_2bit(data: bytes, shape: Shape) -> Tensor:
    count = _num_blocks(shape)
    _expect("2-bit", data, count * (2 + BLOCK // 4))
    packed = np.frombuffer(data, np.uint8, offset=2 * count)
    # One look-up gives the four values of a byte. A look-up is faster than shifting and masking.
    levels = torch.from_numpy(_FOUR_LEVELS.take(packed).view(np.float32))
    return _scaled(levels.view(count, BLOCK), data, shape)


def _scaled(levels: Tensor, data: bytes, shape: Shape) -> Tensor:
    scales = _tensor(data, torch.bfloat16, 0, 2 * len(levels)).float()
    return levels.mul_(scales[:, None]).view(-1)[: math.prod(shape)].view(shape)


def _blocks(values: Tensor) -> Tensor:
    """Return `values` as rows of `BLOCK` values. Zeros fill the last row."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _num_blocks(shape: Shape) -> int:
    return -(-math.prod(shape) // BLOCK)


def _divisor(scales: Tensor) -> Tensor:
    """Return `scales` with 1 in place of 0, so that values with scale 0 are encoded as zeros."""
    return torch.where(scales == 0, 1.0, scales)


def _top_k(name: str, parameter: str) -> Codec:
    try:
        kept = float(parameter) if parameter else KEPT
    except ValueError:
        kept = math.nan
    if not LEAST_KEPT <= kept <= 1 or name.endswith(":"):
        raise CodecError(f"codec {name!r} should be top-k:FRACTION, from {LEAST_KEPT:g} to 1")

    def encode(values: Tensor) -> bytes:
        flat = values.reshape(-1)
        if len(flat) >= 2**31:
            raise CodecError(f"{name} takes tensors of less than 2^31 values, not {len(flat)}")
        largest = flat.abs().topk(math.ceil(kept * len(flat)), sorted=False).indices
        largest = largest.sort().values
        return _bytes(largest.to(torch.int32)) + _bytes(flat[largest])

    def decode(data: bytes, shape: Shape) -> Tensor:
        count = len(data) // 8
        _expect(name, data, 8 * math.ceil(kept * math.prod(shape)))
        where = _tensor(data, torch.int32, 0, 4 * count).long()
        flat = torch.zeros(math.prod(shape))
        if count and not 0 <= int(where.min()) <= int(where.max()) < len(flat):
            raise CodecError(f"{name} data has indices outside the {len(flat)} values")
        flat[where] = _tensor(data, torch.float32, 4 * count, len(data))
        return flat.view(shape)

    return Codec(name, encode, decode)


def _four_levels() -> NDArray[np.complex128]:
    """Return a table (256,) that decodes a byte of the codec "2-bit".

    A byte holds four codes, which stand for four float32 values. The table holds these 16 bytes as
    one complex128, because numpy looks up single numbers ten times as fast as rows of four.
    """
    levels = np.array([_LOW, _HIGH, -_LOW, -_HIGH], np.float32)
    codes = np.arange(256)[:, None] >> np.array([0, 2, 4, 6]) & 3  # (256, 4)
    four: NDArray[np.complex128] = levels[codes].view(np.complex128).reshape(256)
    return four


_FOUR_LEVELS = _four_levels()

_CODECS = {
    "fp32": Codec("fp32", _encode_fp32, _decode_fp32),
    "bf16": Codec("bf16", _encode_bf16, _decode_bf16),
    "int8": Codec("int8", _encode_int8, _decode_int8),
    "int4": Codec("int4", _encode_int4, _decode_int4),
    "2-bit": Codec("2-bit", _encode_2bit, _decode_2bit, feedback=0.5),
}
