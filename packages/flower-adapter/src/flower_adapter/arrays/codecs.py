"""This module defines the codecs. A codec packs one float32 tensor into fewer bytes.

The tensor has two or more dimensions.

| codec | bits per value | scale |
|---|---|---|
| fp32 | 32 | none: the values are exact |
| bf16 | 16 | none: each value is rounded to the nearest bfloat16, ties to even |
| int8 | 8 | a float32 for each channel (first dimension), from its largest magnitude |
| int4 | 4.125 | a bfloat16 for each block of 128 values, from their largest magnitude |
| 2-bit | about 2.1 | a bfloat16 for each block of 512 values, by least squares |
| top-k | 64 per kept value | none: keeps the largest 1 % exactly ("top-k:0.05" keeps 5 %) |

int4 follows the blockwise quantization of MuLoCo (arXiv 2505.23725).

"2-bit" rounds each value to one of 15 levels at equal distances, and a Huffman code stores frequent
levels in fewer bits. For normally distributed values it stores 2.1 bits a value, and the error has
8 % of the values' energy. With four levels of 2 bits each, it would have at least 12 % (Max,
"Quantizing for minimum distortion", 1960; for the gain of an entropy code see Gish and Pierce,
"Asymptotically efficient quantizing", 1968). The scale of a block is chosen by least squares, so
the norm of a block's error is never larger than the norm of the block. Error feedback needs this
bound (arXiv 1901.09847).
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flower_adapter.arrays import npy

BLOCK = 128  # values that share a scale in int4
LONG_BLOCK = 512  # values that share a scale in 2-bit
KEPT = 0.01  # fraction of a tensor's values that top-k keeps by default
LEAST_KEPT = 1e-6  # a smaller fraction would let a few bytes stand for any number of values
_STEP = 1.03  # distance between the levels of 2-bit, in standard deviations: gives 2.1 bits a value

Shape = tuple[int, ...]


class CodecError(ValueError):
    """An error: arrays cannot be encoded or decoded.

    The message names the codec or the array, and gives the cause.
    """


@dataclass(frozen=True)
class Codec:
    """`encode` packs a float32 tensor into bytes, and `decode` makes a tensor from the bytes.

    A client adds the share `feedback` of what one reply has lost to its next reply. With 1, all
    changes of a client arrive sooner or later, which top-k needs. "2-bit" loses more than
    a quarter of each change's norm. The client's next training starts from a model without that
    loss and makes up for a part of it, so adding all of it would do that part twice. Decayed
    feedback is from Wu et al. 2018, arXiv 1806.08054.
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
    blocks = _blocks(values, BLOCK)
    scales = (blocks.abs().amax(1, keepdim=True) / 7).to(torch.bfloat16)
    quantized = (blocks / _divisor(scales.float())).round_().clamp_(-7, 7)
    codes = quantized.add_(8).to(torch.uint8).view(-1, 2)
    packed = codes[:, 0] | codes[:, 1] << 4
    return _bytes(scales) + _bytes(packed)


def _decode_int4(data: bytes, shape: Shape) -> Tensor:
    count = _num_blocks(shape, BLOCK)
    _expect("int4", data, count * (2 + BLOCK // 2))
    packed = _tensor(data, torch.uint8, 2 * count, len(data))
    codes = torch.stack((packed & 15, packed >> 4), 1)
    return _scaled(codes.view(count, BLOCK).float().sub_(8), data, shape)


def _encode_2bit(values: Tensor) -> bytes:
    blocks = _blocks(values, LONG_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    units = blocks / _divisor(largest)  # so that no square is too large or too small for a float
    count = torch.full((len(blocks), 1), float(LONG_BLOCK))
    count[-1] -= blocks.numel() - values.numel()  # the last block is filled with zeros
    deviation = torch.linalg.vector_norm(units, dim=1, keepdim=True) / count.sqrt()
    levels = (units / _divisor(_STEP * deviation)).round_().clamp_(-7, 7)
    # scale = <x, q> / <q, q>, where q are the chosen levels
    product, energy = ((x * levels).sum(1, keepdim=True) for x in (units, levels))
    scales = product / _divisor(energy) * largest
    codes = levels.add_(8).to(torch.uint8).view(-1, 2)
    packed = _bytes(codes[:, 0] | codes[:, 1] << 4)
    huffman = zlib.compressobj(1, wbits=-zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
    return _bytes(scales.to(torch.bfloat16)) + huffman.compress(packed) + huffman.flush()


def _decode_2bit(data: bytes, shape: Shape) -> Tensor:
    count = _num_blocks(shape, LONG_BLOCK)
    size = count * LONG_BLOCK // 2  # of the levels without the Huffman code
    problem = CodecError(f"2-bit data of {len(data)} bytes does not hold {math.prod(shape)} values")
    if len(data) < 2 * count or 8 * len(data) < size:  # a byte takes at least one bit
        raise problem
    huffman = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        packed = huffman.decompress(data[2 * count :], size + 1)  # and no gigabytes from few bytes
    except zlib.error as error:
        raise CodecError(f"2-bit data is damaged: {error}") from error
    if len(packed) != size or not huffman.eof or huffman.unused_data:
        raise problem
    codes = _tensor(packed, torch.uint8, 0, size)
    levels = torch.stack((codes & 15, codes >> 4), 1).view(count, LONG_BLOCK).float().sub_(8)
    return _scaled(levels, data, shape)


def _scaled(levels: Tensor, data: bytes, shape: Shape) -> Tensor:
    scales = _tensor(data, torch.bfloat16, 0, 2 * len(levels)).float()
    return levels.mul_(scales[:, None]).view(-1)[: math.prod(shape)].view(shape)


def _blocks(values: Tensor, length: int) -> Tensor:
    """Return `values` as rows of `length` values. Zeros fill the last row."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % length)).view(-1, length)


def _num_blocks(shape: Shape, length: int) -> int:
    return -(-math.prod(shape) // length)


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


_CODECS = {
    "fp32": Codec("fp32", _encode_fp32, _decode_fp32),
    "bf16": Codec("bf16", _encode_bf16, _decode_bf16),
    "int8": Codec("int8", _encode_int8, _decode_int8),
    "int4": Codec("int4", _encode_int4, _decode_int4),
    "2-bit": Codec("2-bit", _encode_2bit, _decode_2bit, feedback=0.5),
}
