"""Every kind of module in `zoo` travels whole, averaged and through every codec."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor, nn
from zoo import ZOO, build

from flower_adapter import load_arrays, to_arrays
from flower_adapter.arrays import deltas, npy
from flower_adapter.arrays.average import average_arrays
from flower_adapter.protocol import is_compressed

REFUSED = {
    "uninitialised lazy": (TypeError, r"1\.weight is not initialized"),
    "sparse buffer": (TypeError, r"^adjacency is float32 \(3, 3\), layout torch\.sparse_coo"),
    "extra state": (TypeError, r"^1\._extra_state is a dict, should be a tensor"),
    "extra state of a tensor": (TypeError, r"^_extra_state is extra state, should be a parameter"),
    "meta": (TypeError, r"^weight is float32 \(3, 4\), .* on meta; should be a dense tensor"),
    "quantized tensor": (TypeError, r"^codes is qint8 \(3, 4\), .*; should be a dense tensor"),
    "complex32": (TypeError, r"^phase is complex32 \(3,\), .*; should be a dense tensor"),
    "names that collide": (ValueError, r"differ only in _orig_mod: weight$"),
}
TRAVELS = [name for name in ZOO if name not in REFUSED]
CODECS = ["fp32", "bf16", "int8", "int4", "2-bit", "top-k:0.1"]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().resolve_conj().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def contents(module: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (t.dtype, t.shape, bits(t)) for name, t in module.state_dict().items()}


def dense(module: nn.Module) -> list[bytes]:
    """Return the bytes of the dense tensors. A refused module also holds tensors without values."""
    tensors = [*module.parameters(), *module.buffers()]
    strided = [tensor for tensor in tensors if tensor.layout == torch.strided]
    plain = [t for t in strided if not nn.parameter.is_lazy(t) and not t.is_meta]
    return [bits(tensor) for tensor in plain if not tensor.is_quantized]


@pytest.mark.parametrize("name", TRAVELS)
def test_a_module_loads_every_bit_of_another_in_place(name: str) -> None:
    source, target = build(name, 1), build(name, 2)
    addresses = {key: tensor.data_ptr() for key, tensor in target.state_dict().items()}
    load_arrays(target, to_arrays(source))
    assert contents(target) == contents(source)
    for key, tensor in target.state_dict().items():
        assert tensor.data_ptr() == addresses[key], key


@pytest.mark.parametrize("name", TRAVELS)
def test_two_records_are_equal_exactly_if_the_state_dicts_are(name: str) -> None:
    one, two = build(name, 1), build(name, 2)
    assert (to_arrays(one) == to_arrays(two)) == (contents(one) == contents(two))


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_cannot_travel_is_refused_and_unchanged(name: str) -> None:
    error, message = REFUSED[name]
    module = build(name, 1)
    before = dense(module)
    with pytest.raises(error, match=message):
        to_arrays(module)
    with pytest.raises(error, match=message):
        load_arrays(module, to_arrays(nn.Linear(2, 2)))
    assert dense(module) == before


@pytest.mark.parametrize("name", [name for name in TRAVELS if name != "no parameters"])
def test_the_average_of_three_modules_is_the_mean_in_double_precision(name: str) -> None:
    weights = (1, 2, 3)
    modules = [build(name, seed) for seed in weights]
    result = build(name, 4)
    mean = average_arrays(
        (to_arrays(module), weight) for module, weight in zip(modules, weights, strict=True)
    )

    load_arrays(result, mean)

    for key, tensor in result.state_dict().items():
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        values = [module.state_dict()[key].to(wide) for module in modules]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        if not (tensor.is_floating_point() or tensor.is_complex()):
            assert torch.equal(tensor.to(wide), expected.round()), key
            continue
        # The result is rounded once, and so is each step of the mean, in float32 or wider.
        largest = max((float(value.abs().max()) for value in values if value.numel()), default=0)
        info = torch.finfo(tensor.dtype)
        atol = largest * 8 * min(info.eps, torch.finfo(torch.float32).eps) + info.tiny * info.eps
        torch.testing.assert_close(tensor.to(wide), expected, rtol=info.eps, atol=atol, msg=key)


def test_the_average_of_batch_norm_counters_is_an_integer() -> None:
    modules = [build("batch norm", seed) for seed in (1, 2, 3)]
    for module, count in zip(modules, (10, 20, 41), strict=True):
        module[1].num_batches_tracked.fill_(count)
    mean = average_arrays((to_arrays(module), 1.0) for module in modules)
    assert mean["1.num_batches_tracked"].dtype == "int64"
    load_arrays(modules[0], mean)
    assert modules[0][1].num_batches_tracked.dtype == torch.int64
    assert modules[0][1].num_batches_tracked.item() == 24  # 23.67


def allowed_error(codec: str, delta: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest error of each value that the codec's description allows."""
    magnitude = np.abs(delta)
    if codec == "fp32":
        return np.zeros_like(delta)
    if codec == "bf16":
        return magnitude * 2.0**-8
    if codec == "int8":
        step = magnitude.reshape(len(delta), -1).max(1) / 127
        return np.broadcast_to(0.501 * step.reshape(-1, *[1] * (delta.ndim - 1)), delta.shape)
    if codec == "int4":
        flat = magnitude.reshape(-1)
        starts = np.arange(0, len(flat), 128)
        largest = np.maximum.reduceat(flat, starts)[np.arange(len(flat)) // 128]
        # Half a step. bfloat16 rounds the scale by up to 2^-9.
        return ((0.5 / 7 + 2.0**-8) * largest).reshape(delta.shape)
    if codec == "top-k:0.1":
        kept = math.ceil(0.1 * delta.size)
        smallest_kept = np.sort(magnitude.reshape(-1))[-kept]
        return np.where(magnitude > smallest_kept, 0, magnitude)
    return np.full(delta.shape, np.linalg.norm(delta))


def should_be_compressed(values: NDArray[np.generic]) -> bool:
    return values.ndim > 1 and values.size > 0 and values.dtype.kind == "f"


@pytest.mark.parametrize("name", TRAVELS)
def test_every_codec_stays_within_its_error_bound(name: str) -> None:
    module = build(name, 1)
    base, trained = to_arrays(module), to_arrays(build(name, 2))
    for codec in CODECS:
        encoded = deltas.encode(trained, base, codec)
        decoded = deltas.decode(encoded.arrays, base)
        assert list(decoded) == list(trained)
        assert decoded == encoded.decoded
        load_arrays(module, decoded)
        for key in trained:
            where = f"{codec}: {key}"
            expected, got, before = (npy.from_array(r[key]) for r in (trained, decoded, base))
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape), where
            compressed = should_be_compressed(expected)
            assert is_compressed(encoded.arrays[key].stype) == compressed, where
            if not compressed:
                assert got.tobytes() == expected.tobytes(), where
                continue
            delta = expected.astype(np.float64) - before
            error = np.abs(got.astype(np.float64) - expected)
            # The subtraction is in float32, the addition in the dtype of the array.
            largest = np.max([np.abs(expected), np.abs(before), np.abs(got)], axis=0)
            rounding = np.spacing(largest) + 2 * np.spacing(largest.astype(np.float32))
            assert (error <= allowed_error(codec, delta) + rounding).all(), where
            if codec == "2-bit" and delta.any():
                assert np.linalg.norm(error) < np.linalg.norm(delta), where


def test_a_compressed_message_is_smaller_than_the_whole_model() -> None:
    def size(record: ArrayRecord) -> int:
        return sum(len(array.data) for array in record.values())

    base, trained = (to_arrays(nn.Linear(256, 64)) for _ in range(2))
    sizes = [size(deltas.encode(trained, base, codec).arrays) for codec in CODECS[:5]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < size(trained) / 12
