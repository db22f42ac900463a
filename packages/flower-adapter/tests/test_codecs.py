"""The error, the size and the refusals of each codec, and the deltas that go through it."""

import contextlib
import math
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from flower_adapter import CodecError
from flower_adapter.arrays import codecs, deltas, npy

Floats = NDArray[np.float32]

NAMES = ["fp32", "bf16", "int8", "int4", "2-bit", "top-k", "top-k:0.1", "top-k:1"]
TINY = 2.0**-126  # the smallest float32 with all its bits


@st.composite
def spread(draw: st.DrawFn) -> Floats:
    """Draw a tensor of several blocks, over many orders of magnitude, with zeros."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, max_side=12))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    low = draw(st.floats(-44, 29))
    exponents = generator.uniform(low, draw(st.floats(low, 29)), shape)
    values = generator.uniform(-1, 1, shape) * 10.0**exponents
    values[generator.random(shape) < draw(st.sampled_from([0, 0.5, 0.95]))] = 0
    return values.astype(np.float32)


def plain() -> st.SearchStrategy[Floats]:
    """Draw a small tensor, value by value."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=4, max_side=6)
    largest = float(np.float32(1e30))
    magnitudes = st.floats(-largest, largest, width=32)
    return hnp.arrays(np.float32, shapes, elements=magnitudes)


tensors = st.one_of(plain(), spread())
few = settings(deadline=None, max_examples=25)


def decoded(name: str, values: Floats) -> Floats:
    """Encode and decode `values`."""
    codec = codecs.codec(name)
    result = codec.decode(codec.encode(torch.from_numpy(values)), values.shape)
    assert result.dtype == torch.float32
    assert tuple(result.shape) == values.shape
    return result.numpy()


def error(name: str, values: Floats) -> NDArray[np.float64]:
    return np.abs(decoded(name, values).astype(np.float64) - values)


def blocks(values: NDArray[np.floating], length: int = 128) -> list[NDArray[np.float64]]:
    flat = values.reshape(-1).astype(np.float64)
    return [flat[start : start + length] for start in range(0, flat.size, length)]


def outlier(size: int, value: float = 1.0) -> Floats:
    values = np.zeros((1, size), np.float32)
    values[0, size // 2] = value
    return values


@few
@given(tensors)
def test_fp32_restores_every_bit(values: Floats) -> None:
    assert decoded("fp32", values).tobytes() == values.tobytes()


@few
@given(tensors)
def test_bf16_is_off_by_half_a_unit_of_its_last_place(values: Floats) -> None:
    assert (error("bf16", values) <= 2.0**-8 * np.abs(values) + 2.0**-134).all()


@few
@given(tensors)
def test_bf16_keeps_a_value_of_16_bits_exactly(values: Floats) -> None:
    upper = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert decoded("bf16", upper).tobytes() == upper.tobytes()


@few
@given(tensors)
def test_int8_is_off_by_half_a_step_of_its_channel(values: Floats) -> None:
    largest = np.abs(values.reshape(len(values), -1)).max(1).astype(np.float64)
    assume(((largest == 0) | (largest > 127 * TINY)).all())
    wrong = error("int8", values).reshape(len(values), -1)
    assert (wrong <= 0.5001 * largest[:, None] / 127).all()


@pytest.mark.parametrize("units", [190, 300, 5000])
def test_the_error_of_int8_on_the_smallest_numbers_is_at_most_the_number(units: int) -> None:
    values = np.full((1, 2), units * 2.0**-149, np.float32)
    assert (error("int8", values) <= values).all()


@few
@given(tensors)
@example(outlier(129, 1e30))
def test_int4_is_off_by_half_a_step_of_its_block_and_its_rounded_scale(
    values: Floats,
) -> None:
    for wrong, block in zip(blocks(error("int4", values)), blocks(values), strict=True):
        # bfloat16 has 8 bits, so the scale is off by 2^-9. It cannot go below 2^-133.
        bound = (0.5 / 7 + 2.0**-8) * np.abs(block).max() + 8 * 2.0**-133
        assert (wrong <= bound).all()


@few
@given(tensors)
@example(outlier(128))
@example(outlier(128, 1e-44))
@example(outlier(300, -1e30))
@example(np.full((2, 64), 3.0, np.float32))
@example(np.full((2, 64), 1e-44, np.float32))
@example(np.zeros((3, 50), np.float32))
@example(np.linspace(-1, 1, 384, dtype=np.float32).reshape(3, 128))
def test_the_error_of_2_bit_is_never_larger_than_the_block(values: Floats) -> None:
    pairs = zip(blocks(error("2-bit", values), 512), blocks(values, 512), strict=True)
    for wrong, block in pairs:
        assert math.hypot(*wrong) <= math.hypot(*block) * (1 + 1e-6)


@few
@given(tensors)
@example(outlier(512))
@example(outlier(1))
@example(np.eye(128, dtype=np.float32))
@example(np.array([[19.4] + [0.516] * 511], np.float32))
def test_2_bit_keeps_at_least_half_of_the_energy(values: Floats) -> None:
    """The worst blocks have one large value, and others that are just not rounded to 0."""
    pairs = zip(blocks(error("2-bit", values), 512), blocks(values, 512), strict=True)
    for wrong, block in pairs:
        if 1e-15 < np.abs(block).max() < 1e15:
            assert math.hypot(*wrong) <= math.sqrt(0.5) * math.hypot(*block)


def test_2_bit_of_a_normal_distribution_is_better_than_any_four_levels() -> None:
    """Max, "Quantizing for minimum distortion", 1960, table I: 0.1175 for the best 4 levels.

    No code of 2.13 bits a value has an error below 2^(-2 * 2.13) = 0.052 (Shannon 1959).
    """
    values = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    mean_square = float((error("2-bit", values) ** 2).mean() / (values.astype(float) ** 2).mean())
    bits = 8 * len(codecs.codec("2-bit").encode(torch.from_numpy(values))) / values.size
    assert 2.1 < bits < 2.15
    assert 2 ** (-2 * bits) < mean_square < 0.7 * 0.1175


@few
@given(tensors)
def test_2_bit_never_takes_more_than_4_bits_a_value_and_its_scales(values: Floats) -> None:
    size = 512 * math.ceil(values.size / 512)
    overhead = 2 * size / 512 + 200  # scales, and the tables of the Huffman code
    assert len(codecs.codec("2-bit").encode(torch.from_numpy(values))) <= size / 2 + overhead


def test_2_bit_data_that_would_fill_the_memory_is_refused() -> None:
    bomb = zlib.compress(bytes(10**8), 9, -zlib.MAX_WBITS)
    assert len(bomb) < 10**5
    tracemalloc.start()
    with pytest.raises(CodecError, match="does not hold 160 values"):
        codecs.codec("2-bit").decode(bytes(2) + bomb, (4, 40))
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@given(st.binary(max_size=400))
def test_any_bytes_as_2_bit_data_are_decoded_or_refused(data: bytes) -> None:
    with contextlib.suppress(CodecError):
        assert codecs.codec("2-bit").decode(data, (4, 40)).shape == (4, 40)


def test_2_bit_restores_a_constant_block() -> None:
    values = np.full((4, 128), -0.7, np.float32)
    np.testing.assert_allclose(decoded("2-bit", values), values, rtol=2.0**-8)


@pytest.mark.parametrize("shape", [(2, 1), (3, 3), (8, 8), (3, 43)])
def test_2_bit_restores_a_constant_tensor_of_any_size(shape: tuple[int, int]) -> None:
    values = np.full(shape, -0.7, np.float32)
    np.testing.assert_allclose(decoded("2-bit", values), values, rtol=2.0**-8)


@few
@given(tensors, st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_top_k_keeps_the_largest_exactly_and_nothing_else(values: Floats, kept: float) -> None:
    result = decoded(f"top-k:{kept}", values).reshape(-1)
    flat = values.reshape(-1)
    count = math.ceil(kept * flat.size)
    largest = np.sort(np.abs(flat))[::-1][:count]
    np.testing.assert_array_equal(np.sort(np.abs(result))[::-1][:count], largest)
    nonzero = result != 0
    assert nonzero.sum() <= count
    np.testing.assert_array_equal(result[nonzero], flat[nonzero])


def test_top_k_keeps_one_percent_by_default() -> None:
    values = np.arange(1, 1001, dtype=np.float32).reshape(10, 100)
    assert np.flatnonzero(decoded("top-k", values)).tolist() == list(range(990, 1000))


@few
@given(tensors)
def test_each_codec_takes_the_bytes_that_its_table_gives(values: Floats) -> None:
    size = values.size
    num_blocks = math.ceil(size / 128)
    expected = {
        "fp32": 4 * size,
        "bf16": 2 * size,
        "int8": size + 4 * len(values),
        "int4": num_blocks * (128 * 4.125 / 8),
        "top-k": 8 * math.ceil(0.01 * size),
        "top-k:0.1": 8 * math.ceil(0.1 * size),
        "top-k:1": 8 * size,
    }
    for name, length in expected.items():
        assert len(codecs.codec(name).encode(torch.from_numpy(values))) == length, name


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 128), (129, 1), (5, 7, 11), (2, 1, 3, 1)])
def test_encoding_is_the_same_for_any_strides(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    strided = torch.empty(shape[::-1]).permute(*range(len(shape))[::-1]).copy_(values)
    for name in NAMES:
        codec = codecs.codec(name)
        assert codec.encode(strided) == codec.encode(values), name


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    assert not decoded(name, np.zeros((3, 50), np.float32)).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["cut", "more", "nothing", "half"])
def test_data_of_another_length_is_refused(name: str, damage: str) -> None:
    codec = codecs.codec(name)
    data = codec.encode(torch.randn(4, 40))
    damaged = {
        "cut": data[:-1],
        "more": data + b"\0",
        "nothing": b"",
        "half": data[: len(data) // 2],
    }[damage]
    message = rf"{name} data has {len(damaged)} bytes, should have"
    if name == "2-bit":
        message = rf"2-bit data (is damaged|of {len(damaged)} bytes does not hold 160 values)"
    with pytest.raises(CodecError, match=message):
        codec.decode(damaged, (4, 40))


@pytest.mark.parametrize("index", [-1, 160, 2**31 - 1, -(2**31)])
def test_indices_outside_the_tensor_are_refused(index: int) -> None:
    codec = codecs.codec("top-k:0.01")
    data = np.array([3, index], np.int32).tobytes() + np.ones(2, np.float32).tobytes()
    with pytest.raises(CodecError, match="indices outside the 160 values"):
        codec.decode(data, (4, 40))


@pytest.mark.parametrize("name", ["", "zip", "INT8", "int8:4", "fp32:", "topk", "2bit", "int8/1"])
def test_an_unknown_codec_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(CodecError) as caught:
        codecs.codec(name)
    assert repr(name) in str(caught.value)
    for known in ("fp32", "bf16", "int8", "int4", "2-bit", "top-k"):
        assert known in str(caught.value)


@pytest.mark.parametrize("fraction", ["0", "2", "x", "", "-0.1", "nan", "inf", "1.01", "0.1:0.2"])
def test_an_invalid_fraction_of_top_k_is_refused(fraction: str) -> None:
    with pytest.raises(CodecError, match=rf"'top-k:{fraction}' should be top-k:FRACTION"):
        codecs.codec(f"top-k:{fraction}")


def record(**values: NDArray[np.generic]) -> ArrayRecord:
    return ArrayRecord({name: npy.to_array(np.asarray(held)) for name, held in values.items()})


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.nan, np.float32),
        (np.inf, np.float32),
        (-np.inf, np.float16),
        (np.nan, np.float64),
        (1e300, np.float64),
    ],
)
def test_a_delta_that_is_not_finite_in_float32_is_refused_by_name(
    value: float, dtype: type[np.floating]
) -> None:
    shape = (4, 64)  # large enough that no codec falls back to fp32, except top-k:1
    base = record(first=np.zeros(shape, dtype), wrong=np.zeros(shape, dtype))
    moved = np.ones(shape, dtype)
    moved[1, 2] = value
    arrays = record(first=np.ones(shape, dtype), wrong=moved)
    for name in NAMES:
        message = rf"^wrong has moved by NaN, Inf or values too large for {name}$"
        with pytest.raises(CodecError, match=message):
            deltas.encode(arrays, base, name)


@pytest.mark.parametrize("name", ["bf16", "2-bit"])
def test_a_delta_that_the_codec_rounds_to_infinity_is_refused_by_name(name: str) -> None:
    base, moved = np.zeros((2, 512), np.float32), np.full((2, 512), 3.4e38, np.float32)
    with pytest.raises(CodecError, match="w has moved by"):
        deltas.encode(record(w=moved), record(w=base), name)


def test_a_delta_that_would_decode_to_infinity_is_refused_by_name() -> None:
    base, moved = np.full((2, 64), -65504, np.float16), np.full((2, 64), 65504, np.float16)
    with pytest.raises(CodecError, match="w has moved by"):
        deltas.encode(record(w=moved), record(w=base), "bf16")  # 131008 becomes 131072


@few
@given(st.integers(0, 2**32), st.floats(-3, 3), st.floats(-3, 3))
def test_decoded_arrays_and_residual_add_up_to_the_wanted_arrays(
    seed: int, base_exponent: float, delta_exponent: float
) -> None:
    generator = np.random.default_rng(seed)
    base, delta, last_residual = generator.standard_normal((3, 7, 30)).astype(np.float32)
    base *= np.float32(10**base_exponent)
    delta *= np.float32(10**delta_exponent)
    wanted = (base + delta).astype(np.float64) + last_residual
    residual = {"w": torch.from_numpy(last_residual), "another": torch.ones(2, 2)}
    largest = max(np.abs(base).max(), np.abs(delta).max(), np.abs(last_residual).max())
    for name in NAMES:
        encoded = deltas.encode(record(w=base + delta), record(w=base), name, residual)
        got = encoded.decoded["w"].numpy() + encoded.residual["w"].numpy().astype(np.float64)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=8 * largest * 2.0**-23, err_msg=name)
        assert list(encoded.residual) == ["w"]


@pytest.mark.parametrize("name", ["int4", "2-bit", "top-k:0.1"])
def test_error_feedback_reaches_the_target(name: str) -> None:
    target = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).numpy()
    model, residual = record(w=np.zeros((6, 50), np.float32)), None
    for _ in range(100):
        step = (target - model["w"].numpy()) * np.float32(0.2)
        encoded = deltas.encode(record(w=model["w"].numpy() + step), model, name, residual)
        model, residual = encoded.decoded, encoded.residual
    assert np.linalg.norm(model["w"].numpy() - target) < 1e-3 * np.linalg.norm(target)


@pytest.mark.parametrize(
    ("dtype", "step"),
    [(np.float16, 2.0**-10), (np.float64, 2.0**-30)],
)
def test_a_small_change_is_either_decoded_or_in_the_residual(
    dtype: type[np.floating], step: float
) -> None:
    generator = np.random.default_rng(1)
    base = np.ones((8, 16), dtype)
    moved = (base + step * generator.integers(0, 4, base.shape)).astype(dtype)
    encoded = deltas.encode(record(w=moved), record(w=base), "2-bit")
    change = encoded.decoded["w"].numpy().astype(np.float64) - base
    got = change + encoded.residual["w"].numpy()
    np.testing.assert_allclose(got, moved.astype(np.float64) - base, rtol=1e-3, atol=step / 100)


def test_a_residual_of_another_shape_is_not_added() -> None:
    base, moved = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    encoded = deltas.encode(record(w=moved), record(w=base), "fp32", {"w": torch.ones(3, 2)})
    assert (encoded.decoded["w"].numpy() == 1).all()


@pytest.mark.parametrize(
    "base",
    [{}, {"w": np.zeros((3, 2), np.float32)}, {"w": np.zeros((2, 3), np.float64)}],
)
def test_an_array_that_the_base_lacks_travels_whole_and_cannot_be_decoded(
    base: dict[str, NDArray[np.generic]],
) -> None:
    moved, whole = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    encoded = deltas.encode(record(w=moved), record(**base), "int4")
    assert encoded.arrays == encoded.decoded == record(w=moved)
    assert not encoded.residual
    delta = deltas.encode(record(w=moved), record(w=whole), "int4").arrays
    with pytest.raises(CodecError, match=r"w is float32 \(2, 3\), compressed; the model here has"):
        deltas.decode(delta, record(**base))


def test_an_array_whose_scales_outweigh_its_values_is_sent_in_fp32() -> None:
    base, moved = np.zeros((3, 1), np.float32), np.ones((3, 1), np.float32)
    for name in ("int8", "int4", "2-bit"):
        encoded = deltas.encode(record(w=moved), record(w=base), name)
        assert encoded.arrays["w"].stype == "flower-adapter/fp32/2"
        assert deltas.decode(encoded.arrays, record(w=base)) == record(w=moved)


def test_a_compressed_array_cannot_be_read_as_numbers() -> None:
    encoded = deltas.encode(record(w=np.ones((2, 3))), record(w=np.zeros((2, 3))), "int8")
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        encoded.arrays["w"].numpy()
    with pytest.raises(ValueError, match="serialized as 'flower-adapter/int8/2'"):
        npy.from_array(encoded.arrays["w"])


def decoded_array(
    stype: str, shape: tuple[int, ...], data: bytes, dtype: str = "float32"
) -> NDArray[np.generic]:
    array = Array(dtype, shape, stype, data)
    base = record(w=np.zeros((2, 3), dtype))
    return deltas.decode(ArrayRecord({"w": array}), base)["w"].numpy()


@pytest.mark.parametrize(
    ("stype", "message"),
    [
        ("flower-adapter/zip/2", "w: codec 'zip' is unknown"),
        ("flower-adapter/int8/1", "w: is int8 of compression format 1, this side knows 2"),
        ("flower-adapter/int8", "w: is int8 of compression format none, this side knows 2"),
    ],
)
def test_an_unknown_codec_or_version_of_an_array_is_named(stype: str, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decoded_array(stype, (2, 3), bytes(14))


@pytest.mark.parametrize(
    ("stype", "shape", "data", "dtype"),
    [
        ("flower-adapter/int8/2", (), bytes(4), "float32"),
        ("flower-adapter/top-k:1e-300/2", (2**50, 3), bytes(8), "float32"),
        ("flower-adapter/int8/2", (0, 3), b"", "float32"),
        ("flower-adapter/fp32/2", (2, 3), bytes(24), "int64"),
    ],
    ids=["no dimension", "too large for memory", "empty", "integers"],
)
def test_an_array_that_encode_never_makes_is_refused(
    stype: str, shape: tuple[int, ...], data: bytes, dtype: str
) -> None:
    with pytest.raises(CodecError):
        decoded_array(stype, shape, data, dtype)


def test_records_are_the_same_if_names_order_and_bytes_are() -> None:
    one, zero = np.ones(2), np.zeros(2)
    arrays = record(a=one, b=zero)
    assert deltas.same_arrays(arrays, arrays)
    assert deltas.same_arrays(arrays, record(a=one, b=zero))
    for other in (record(a=one, b=one), record(b=zero, a=one), record(a=one)):
        assert not deltas.same_arrays(arrays, other)
