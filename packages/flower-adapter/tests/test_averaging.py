"""Weighted means of records, compared with numpy's mean in double precision."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from flower_adapter.arrays.average import BLOCK, Average, average_arrays

Values = dict[str, NDArray[Any]]


def record(**arrays: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def average(values: list[NDArray[Any]], weights: list[float]) -> NDArray[Any]:
    pairs = ((record(x=v), w) for v, w in zip(values, weights, strict=True))
    return average_arrays(pairs)["x"].numpy()


def exact(values: list[NDArray[Any]], weights: list[float]) -> NDArray[Any]:
    """Return numpy's weighted mean of all values in double precision."""
    wide = np.complex128 if values[0].dtype.kind == "c" else np.float64
    stacked = np.stack([v.astype(wide) for v in values])
    return np.asarray(np.average(stacked, axis=0, weights=weights))


FLOATS = ["float16", "float32", "float64", "complex64", "complex128"]
# Relative to the largest of the values: half an ulp for float16, which is averaged in float32.
TOLERANCE = dict(zip(FLOATS, [5e-4, 1e-6, 1e-14, 1e-6, 1e-14], strict=True))
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
WEIGHTS = st.floats(1e-3, 1e6)


@st.composite
def weighted(draw: st.DrawFn, dtypes: list[str]) -> tuple[list[NDArray[Any]], list[float]]:
    """Draw up to 8 arrays of one dtype and shape, and their weights."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    count, shape = draw(st.integers(1, 8)), draw(SHAPES)
    width: Any = 8 * dtype.itemsize
    elements: st.SearchStrategy[Any]
    if dtype.kind == "f":
        elements = st.floats(-1000, 1000, width=width)
    elif dtype.kind == "c":
        elements = st.complex_numbers(max_magnitude=1000, width=width)
    else:
        elements = hnp.from_dtype(dtype)
    arrays = [draw(hnp.arrays(dtype, shape, elements=elements)) for _ in range(count)]
    return arrays, draw(st.lists(WEIGHTS, min_size=count, max_size=count))


@settings(deadline=None, max_examples=60)
@given(weighted(FLOATS))
def test_floats_average_as_in_double_precision(
    weighted: tuple[list[NDArray[Any]], list[float]],
) -> None:
    values, weights = weighted
    mean = average(values, weights)
    assert mean.dtype == values[0].dtype
    assert mean.shape == values[0].shape
    largest = max((float(np.abs(v).max()) for v in values if v.size), default=0.0)
    atol = TOLERANCE[str(mean.dtype)] * largest + 1e-7
    np.testing.assert_allclose(mean, exact(values, weights), rtol=0, atol=atol)


@settings(deadline=None, max_examples=60)
@given(weighted(["bool", "int8", "uint8", "int32", "uint32", "int64", "uint64"]))
def test_integers_average_to_the_nearest(
    weighted: tuple[list[NDArray[Any]], list[float]],
) -> None:
    values, weights = weighted
    mean = average(values, weights)
    assert mean.dtype == values[0].dtype
    off = np.abs(mean.astype(np.float64) - exact(values, weights))
    if mean.dtype.itemsize == 8:
        assert (off <= 2.0**64 * 2**-49).all()  # beyond double precision
    else:
        # At most half away from the true mean, plus the rounding error of the mean itself.
        assert (off <= 0.5 + 1e-5).all()


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint64"])
def test_the_extremes_of_an_integer_do_not_wrap_around(dtype: str) -> None:
    info = np.iinfo(dtype)
    for count in (1, 3, BLOCK + 2):
        for extreme in (info.min, info.max):
            values = [np.array([extreme], dtype)] * count
            [mean] = average(values, [1.0 + i % 3 for i in range(count)])
            assert float(mean) == pytest.approx(float(extreme), rel=2**-50)


def test_halves_are_rounded_to_even() -> None:
    values = [np.array([0, 1, 2, -1]), np.array([1, 2, 3, -2])]
    assert average(values, [1, 1]).tolist() == [0, 2, 2, -2]
    assert average([np.array([True, True]), np.array([False, True])], [1, 1]).tolist() == [
        False,
        True,
    ]


def test_one_record_is_its_own_mean() -> None:
    values = np.array([0.1, -3e30, np.finfo(np.float32).tiny], np.float32)
    assert average([values], [0.3]).tobytes() == values.tobytes()


def test_fortran_order_and_views_average_by_index() -> None:
    # Flower writes the first two with fortran_order in the header. The mean is in C order.
    values = [np.asfortranarray(np.arange(12.0).reshape(3, 4) * k) for k in (1, 2)]
    values.append(np.arange(24.0).reshape(4, 6).T[::2])
    np.testing.assert_allclose(average(values, [1, 1, 1]), exact(values, [1, 1, 1]), rtol=1e-14)


@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_hundreds_of_records_average_as_in_double_precision(count: int, dtype: str) -> None:
    chance = np.random.default_rng(count)
    values = [(100 * chance.normal(size=20)).astype(dtype) for _ in range(count)]
    weights = [float(w) for w in chance.integers(1, 1000, count)]
    mean, true = average(values, weights), exact(values, weights)
    tolerance = {"float32": 3e-5, "float16": 0.02, "int64": 0.5 + 1e-9}[dtype]
    np.testing.assert_allclose(mean, true, rtol=0, atol=tolerance)


def test_the_error_of_thousands_of_records_is_that_of_hundreds() -> None:
    count = 3000
    records = [record(x=np.array([1000 + i], np.float32)) for i in range(7)]
    mean = average_arrays((records[i % 7], 1.0) for i in range(count))["x"].numpy()
    true = np.mean([1000.0 + i % 7 for i in range(count)])
    assert abs(float(mean[0]) - true) < 1e-3  # an ulp is 6e-5


def test_the_mean_is_empty_at_first_and_after_its_result() -> None:
    mean = Average()
    with pytest.raises(ValueError, match="no record was added"):
        mean.result()
    mean.add(record(x=np.array([2.0])), 1)
    first = mean.result()
    with pytest.raises(ValueError, match="no record was added"):
        mean.result()
    mean.add(record(y=np.array([5], np.int8)), 3)
    assert mean.result()["y"].numpy().tolist() == [5]
    assert first["x"].numpy().tolist() == [2.0]
    with pytest.raises(ValueError, match="no record was added"):
        average_arrays([])


def test_an_empty_array_has_an_empty_mean() -> None:
    assert average([np.empty((0, 3))], [1.0]).shape == (0, 3)


MISMATCHES: dict[str, tuple[Values, str]] = {
    "missing": ({"b": np.zeros(2)}, "a is missing"),
    "more": (
        {"a": np.zeros(2), "b": np.zeros(2), "c": np.ones(1)},
        "c is float64 .*, in the first record it is not there",
    ),
    "shape": (
        {"a": np.zeros(3), "b": np.zeros(2)},
        r"a is float64 \(3,\), in the first record it is float64 \(2,\)",
    ),
    "dtype": ({"a": np.zeros(2, np.float32), "b": np.zeros(2)}, r"a is float32 \(2,\), in the"),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_a_record_that_does_not_fit_is_named_and_changes_nothing(kind: str) -> None:
    values, message = MISMATCHES[kind]
    mean = Average()
    mean.add(record(a=np.array([1.0, 2.0]), b=np.array([3.0, 4.0])), 1)
    with pytest.raises(ValueError, match=message):
        mean.add(record(**values), 1)
    mean.add(record(a=np.array([3.0, 4.0]), b=np.array([5.0, 6.0])), 1)
    result = mean.result()
    assert result["a"].numpy().tolist() == [2.0, 3.0]
    assert result["b"].numpy().tolist() == [4.0, 5.0]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_a_positive_number(weight: float) -> None:
    mean = Average()
    mean.add(record(x=np.array([1.0])), 1)
    with pytest.raises(ValueError, match=f"weight is {weight}"):
        mean.add(record(x=np.array([9.0])), weight)
    assert mean.result()["x"].numpy().tolist() == [1.0]


@pytest.mark.parametrize(
    "values",
    [
        np.array(["a"]),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.zeros(2, np.longdouble),
        np.zeros(2, np.dtype("f8").newbyteorder()),
    ],
    ids=lambda values: str(values.dtype),
)
def test_an_array_without_a_mean_is_named_and_changes_nothing(values: NDArray[Any]) -> None:
    if values.dtype == np.float64:
        pytest.skip("double precision is the longest here")
    mean = Average()
    with pytest.raises(ValueError, match="x "):
        mean.add(record(x=values), 1)
    mean.add(record(x=np.array([1.0])), 1)
    assert mean.result()["x"].numpy().tolist() == [1.0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool", "complex64"])
def test_the_added_records_are_not_changed(dtype: str) -> None:
    records = [record(x=np.arange(5).astype(dtype) + np.array(i, dtype)) for i in range(BLOCK + 2)]
    before = [bytes(bytearray(r["x"].data)) for r in records]  # slices of bytes are no copies
    result = average_arrays((r, 1.0 + i) for i, r in enumerate(records))
    assert [r["x"].data for r in records] == before
    assert all(result["x"].data is not r["x"].data for r in records)


def test_the_mean_of_one_record_does_not_share_its_memory() -> None:
    one = record(x=np.array([1.0]))
    mean = Average()
    mean.add(one, 1)
    mean.add(record(x=np.array([3.0])), 1)
    assert one["x"].numpy().tolist() == [1.0]
    assert mean.result()["x"].numpy().tolist() == [2.0]
