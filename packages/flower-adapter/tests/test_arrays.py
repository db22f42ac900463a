import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor, nn

from flower_adapter import (
    ArrayMismatch,
    add,
    average_arrays,
    load_arrays,
    npy,
    subtract,
    to_arrays,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 7, bias=False)
        self.embedding = nn.Embedding(7, 4)
        self.head.weight = self.embedding.weight


class SharedSubmodule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.layers = nn.ModuleList([self.first, nn.Linear(3, 2), self.first])


class Odd(nn.Module):
    """A scalar, an empty, a transposed and an expanded tensor, and buffers of many dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.also_empty = nn.Parameter(torch.empty(0, 3))
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("sliced", torch.randn(4, 6)[:, ::2])
        self.register_buffer("float16", torch.randn(3).half())
        self.register_buffer("float64", torch.randn(3).double())
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64).conj())
        self.register_buffer("steps", torch.tensor(2**62 + 1))
        self.register_buffer("short", torch.randint(-99, 99, (4,)).to(torch.int8))
        self.register_buffer("mask", torch.rand(3, 3) > 0.5)
        self.register_buffer("eighth", torch.randn(5).to(torch.float8_e4m3fn))
        self.register_buffer("cache", torch.randn(3), persistent=False)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"module": nn.Linear(2, 2), "b": nn.ParameterList([torch.randn(2)])})
            for _ in range(2)
        )


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))


def partly_compiled() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(3, 3)), nn.Linear(3, 1))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "tied": Tied,
    "batch norm": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)),
    "bfloat16": lambda: nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).bfloat16(),
    "channels last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "compiled": lambda: torch.compile(nn.Linear(3, 2)),
    "partly compiled": partly_compiled,
    "wrapped": lambda: nn.DataParallel(torch.compile(nn.Linear(3, 2))),
    "nested": Nested,
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "no parameters": nn.ReLU,
    "odd": Odd,
    "shared submodule": SharedSubmodule,
    "weight norm": weight_normed,
    "attention": lambda: nn.MultiheadAttention(8, 2),
}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().resolve_conj().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", ZOO)
def test_a_module_takes_over_every_bit_of_another(name: str) -> None:
    torch.manual_seed(1)
    source = ZOO[name]()
    torch.manual_seed(2)
    target = ZOO[name]()
    places = {key: tensor.data_ptr() for key, tensor in target.state_dict().items()}

    load_arrays(target, to_arrays(source))

    for key, tensor in source.state_dict().items():
        loaded = target.state_dict()[key]
        assert bits(loaded) == bits(tensor), key
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape), key
        assert loaded.data_ptr() == places[key], key


@pytest.mark.parametrize("name", ["linear", "batch norm", "lstm", "attention", "nested"])
def test_the_record_is_what_flower_makes_where_flower_can(name: str) -> None:
    module = ZOO[name]()
    assert to_arrays(module) == ArrayRecord(dict(module.state_dict()))


def test_tied_weights_are_sent_once_under_the_first_name() -> None:
    assert list(to_arrays(Tied())) == ["head.weight"]
    assert list(to_arrays(SharedSubmodule())) == [
        "first.weight",
        "first.bias",
        "layers.1.weight",
        "layers.1.bias",
    ]


def test_tied_weights_sent_twice_by_flower_are_accepted() -> None:
    source, target = Tied(), Tied()
    load_arrays(target, ArrayRecord(dict(source.state_dict())))
    assert torch.equal(target.embedding.weight, source.embedding.weight)


def test_tied_weights_that_differ_are_refused() -> None:
    target = Tied()
    untied = {name: torch.randn(7, 4) for name in target.state_dict()}
    with pytest.raises(ArrayMismatch, match=r"embedding\.weight differs from head\.weight"):
        load_arrays(target, ArrayRecord(untied))


def test_views_of_one_storage_that_differ_are_all_sent() -> None:
    square = torch.arange(6.0).view(2, 3)
    views = {
        "square": square,
        "flat": square.view(6),
        "row": square[:1],
        "last": square[1:],
        "bits": square.view(torch.int32),
    }
    record = to_arrays(views)
    for name, view in views.items():
        np.testing.assert_array_equal(record[name].numpy(), view.numpy(), strict=True)


def test_empty_tensors_are_never_taken_for_tied() -> None:
    assert list(to_arrays({"a": torch.empty(0, 3), "b": torch.empty(0, 3)})) == ["a", "b"]


def test_names_are_those_of_the_bare_module() -> None:
    bare = set(nn.Linear(3, 2).state_dict())
    assert set(to_arrays(ZOO["compiled"]())) == bare
    assert set(to_arrays(ZOO["wrapped"]())) == bare
    assert set(to_arrays(ZOO["compiled"]().state_dict())) == bare
    assert set(to_arrays(partly_compiled())) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_bare_module_fills_a_compiled_one_and_back() -> None:
    bare, compiled = nn.Linear(3, 2), torch.compile(nn.Linear(3, 2))
    load_arrays(compiled, to_arrays(bare))
    assert torch.equal(compiled.weight, bare.weight)
    load_arrays(bare, ArrayRecord(dict(torch.compile(nn.Linear(3, 2)).state_dict())))


def test_a_module_held_under_the_name_module_keeps_other_names_apart() -> None:
    record = to_arrays({"module.weight": torch.ones(1), "scale": torch.ones(1)})
    assert set(record) == {"module.weight", "scale"}


def test_names_that_become_the_same_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.w"):
        to_arrays({"a._orig_mod.w": torch.ones(1), "a.w": torch.zeros(1)})


def average(modules: list[nn.Module], weights: list[int]) -> ArrayRecord:
    replies = [
        RecordDict({"a": to_arrays(m), "m": MetricRecord({"num-examples": w})})
        for m, w in zip(modules, weights, strict=True)
    ]
    return aggregate_arrayrecords(replies, "num-examples")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fedavg_of_two_modules_is_their_weighted_mean(dtype: torch.dtype) -> None:
    one, two, result = (nn.Linear(5, 4).to(dtype) for _ in range(3))
    load_arrays(result, average([one, two], [1, 3]))
    mean = 0.25 * one.weight.double() + 0.75 * two.weight.double()
    torch.testing.assert_close(result.weight.double(), mean, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_an_averaged_counter_is_rounded_and_averaged_statistics_are_not() -> None:
    one, two, result = (nn.BatchNorm1d(3) for _ in range(3))
    one.num_batches_tracked.fill_(3)
    two.num_batches_tracked.fill_(10)
    one.running_mean.fill_(1.0)
    two.running_mean.fill_(2.0)
    load_arrays(result, average([one, two], [1, 1]))
    assert result.num_batches_tracked.item() == 6  # 6.5, to even
    assert result.num_batches_tracked.dtype == torch.int64
    assert result.running_mean.tolist() == [1.5, 1.5, 1.5]


def test_an_averaged_mask_is_rounded() -> None:
    module = nn.Module()
    module.register_buffer("mask", torch.tensor([False, True]))
    load_arrays(module, ArrayRecord({"mask": npy.to_array(np.array([0.7, 0.2]))}))
    assert module.mask.tolist() == [True, False]


@pytest.mark.parametrize(
    ("buffer", "values", "message"),
    [
        (torch.tensor([1]), np.array([np.nan]), "NaN or Inf, should be int64"),
        (torch.tensor([1]), np.array([np.inf]), "NaN or Inf, should be int64"),
        (torch.tensor([1]), np.array([2.0**63]), "should be -9223372036854775808 to"),
        (torch.tensor([1], dtype=torch.int8), np.array([128]), "128, should be -128 to 127"),
        (torch.tensor([1], dtype=torch.uint8), np.array([-0.6]), "should be 0 to 255"),
        (torch.tensor([True]), np.array([2.0]), "should be 0 to 1"),
        (torch.ones(1), np.array([1j]), "complex128 (1,), which cannot be cast to float32"),
        (torch.ones(1), np.array(["a"]), "<U1 (1,), which cannot be cast"),
        (torch.ones(1), np.array([1e300]), "outside float32"),
        (torch.ones(1).half(), np.array([1e5]), "outside float16"),
        (torch.ones(1).bfloat16(), np.array([3.4e38]), "outside bfloat16"),
        (torch.ones(1), np.ones((1, 1)), "float64 (1, 1), should be float32 (1,)"),
    ],
)
def test_values_that_do_not_fit_are_named(buffer: Tensor, values: np.ndarray, message: str) -> None:
    module = nn.Module()
    module.register_buffer("x", buffer)
    before = buffer.clone()
    with pytest.raises(ArrayMismatch) as caught:
        load_arrays(module, ArrayRecord({"x": Array(values)}))
    assert message in caught.value.mismatches["x"]
    assert torch.equal(module.x, before)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_a_double_array_fits_a_float_parameter(values: list[float]) -> None:
    module = nn.Module()
    module.register_buffer("x", torch.zeros(len(values)))
    load_arrays(module, ArrayRecord({"x": Array(np.array(values, dtype=np.float64))}))
    assert module.x.tolist() == values


def test_nan_passes_into_a_float_parameter() -> None:
    module = nn.Linear(1, 1)
    nn.init.constant_(module.weight, float("nan"))
    target = nn.Linear(1, 1)
    load_arrays(target, to_arrays(module))
    assert target.weight.isnan().all()


def test_every_mismatch_is_named_and_nothing_is_loaded() -> None:
    target = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    record = to_arrays(nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 1)))
    record["2.weight"] = Array(np.zeros((2, 2), np.float32))
    del record["0.bias"]

    with pytest.raises(ArrayMismatch) as caught:
        load_arrays(target, record)

    assert caught.value.mismatches == {
        "0.bias": "is missing, should be float32 (2,)",
        "1.weight": "is float32 (1, 3), should be float32 (1, 2)",
        "2.weight": "is float32 (2, 2), should not be there",
    }
    assert str(caught.value) == (
        "arrays do not fit Sequential:\n"
        "  0.bias is missing, should be float32 (2,)\n"
        "  1.weight is float32 (1, 3), should be float32 (1, 2)\n"
        "  2.weight is float32 (2, 2), should not be there"
    )
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("cut", [1, 40, 130])
def test_truncated_bytes_are_refused(cut: int) -> None:
    array = to_arrays(nn.Linear(1, 1, bias=False))["weight"]
    array.data = array.data[:-cut]
    with pytest.raises(ArrayMismatch, match="weight"):
        load_arrays(nn.Linear(1, 1, bias=False), ArrayRecord({"weight": array}))


def test_pickled_objects_are_never_read() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([None]), allow_pickle=True)
    array = Array("object", (1,), "numpy.ndarray", buffer.getvalue())
    with pytest.raises(ArrayMismatch, match="Python objects"):
        load_arrays(nn.Linear(1, 1, bias=False), ArrayRecord({"weight": array}))


class ExtraState(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.ones(2)

    def set_extra_state(self, state: Tensor) -> None:
        del state


@pytest.mark.parametrize(
    "entries",
    [
        {"x": 3},
        {"x": torch.eye(2).to_sparse()},
        {"x": torch.empty(2, device="meta")},
        ExtraState(1, 1),
    ],
)
def test_what_cannot_travel_is_refused_by_name(entries: object) -> None:
    with pytest.raises(TypeError, match=r"^(x|_extra_state) is"):
        to_arrays(entries)  # type: ignore[arg-type]


def test_loading_is_seen_by_autograd() -> None:
    module = nn.Linear(2, 2)
    loss = module(torch.ones(1, 2, requires_grad=True)).pow(2).sum()
    load_arrays(module, to_arrays(nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


DTYPES = st.sampled_from(["?", "i1", "<i8", "<u2", "<f2", "<f4", ">f4", "<f8", "<c8"])


@settings(deadline=None)
@given(DTYPES, st.lists(st.integers(0, 4), max_size=4), st.booleans(), st.integers(0, 99))
def test_arrays_are_written_and_read_as_numpy_does(
    dtype: str, shape: list[int], fortran: bool, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    by_numpy = Array(np.asarray(values, order="F" if fortran else "C"))
    np.testing.assert_array_equal(npy.from_array(by_numpy), values, strict=True)
    np.testing.assert_array_equal(npy.to_array(values).numpy(), values, strict=True)
    assert npy.to_array(values) == Array(np.ascontiguousarray(values).reshape(shape))


def record(**values: NDArray[np.generic]) -> ArrayRecord:
    return ArrayRecord({name: npy.to_array(np.asarray(held)) for name, held in values.items()})


INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


@st.composite
def exact_pairs(draw: st.DrawFn) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Two arrays alike, of integers or bools, often at the ends of their range."""
    dtype = np.dtype(draw(st.sampled_from(["?", *INTEGERS])))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))
    elements = None
    if dtype.kind != "b":
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        ends = st.sampled_from([low, low + 1, 0, high - 1, high])
        elements = ends | st.integers(low, high)
    one, two = (draw(hnp.arrays(dtype, shape, elements=elements)) for _ in range(2))
    return one, two


@settings(deadline=None, max_examples=200)
@given(exact_pairs())
def test_integers_and_bools_come_back_exactly_from_their_delta(
    pair: tuple[NDArray[np.generic], NDArray[np.generic]],
) -> None:
    arrays, base = record(x=pair[0]), record(x=pair[1])
    delta = subtract(arrays, base)
    assert delta["x"].dtype == ("int8" if pair[0].dtype.kind == "b" else "int64")
    assert add(base, delta) == arrays


@pytest.mark.parametrize("dtype", INTEGERS)
def test_an_integer_delta_is_the_difference(dtype: str) -> None:
    info = np.iinfo(dtype)
    values, base = (
        np.array([0, 5, info.max, info.max], dtype),
        np.array([1, 0, info.max - 1, info.max], dtype),
    )
    assert subtract(record(x=values), record(x=base))["x"].numpy().tolist() == [-1, 5, 1, 0]


FLOATS = {"<f2": 2.0**-10, "<f4": 2.0**-23, "<f8": 2.0**-52, "<c8": 2.0**-23, "<c16": 2.0**-52}


@settings(deadline=None)
@given(
    st.sampled_from(sorted(FLOATS)),
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
    st.integers(0, 2**32),
    st.integers(-3, 3),
)
def test_floats_come_back_from_their_delta_to_the_precision_of_the_larger(
    dtype: str, shape: tuple[int, ...], seed: int, exponent: int
) -> None:
    generator = np.random.default_rng(seed)
    values, base = (
        np.asarray(generator.standard_normal(shape) * scale).astype(dtype)
        for scale in (1, 10.0**exponent)
    )
    arrays, before = record(x=values), record(x=base)
    delta = subtract(arrays, before)
    back = add(before, delta)["x"]
    assert (delta["x"].dtype, back.dtype) == (arrays["x"].dtype, arrays["x"].dtype)
    assert tuple(back.shape) == shape
    exact = values.astype(np.complex128) - base
    largest = max(1e-3, np.abs(values).max(initial=0), np.abs(base).max(initial=0))
    atol = 4 * float(largest) * FLOATS[dtype]
    np.testing.assert_allclose(delta["x"].numpy(), exact, rtol=0, atol=atol)
    np.testing.assert_allclose(back.numpy(), values, rtol=0, atol=atol)


def test_a_delta_between_powers_of_two_is_exact() -> None:
    arrays, base = record(x=np.array([1.5, -2.0])), record(x=np.array([0.5, 2.0]))
    assert subtract(arrays, base)["x"].numpy().tolist() == [1.0, -4.0]
    assert add(base, subtract(arrays, base)) == arrays


@pytest.mark.parametrize("name", [name for name in ZOO if name != "odd"])
def test_a_module_moved_by_its_delta_is_the_other_module(name: str) -> None:
    torch.manual_seed(1)
    source, base, target = ZOO[name](), ZOO[name](), ZOO[name]()
    arrays, before = to_arrays(source), to_arrays(base)
    load_arrays(target, add(before, subtract(arrays, before)))
    for key, tensor in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[key], tensor, rtol=1e-6, atol=1e-6)


def test_every_array_that_does_not_match_the_base_is_named() -> None:
    base = record(same=np.ones(2), shape=np.ones(2), dtype=np.ones(2), gone=np.ones(2))
    arrays = record(
        same=np.ones(2), shape=np.ones((1, 2)), dtype=np.ones(2, np.float32), new=np.ones(2)
    )
    with pytest.raises(ArrayMismatch) as caught:
        subtract(arrays, base)
    assert caught.value.mismatches == {
        "gone": "is missing",
        "shape": "is float64 (1, 2), should be float64 (2,)",
        "dtype": "is float32 (2,), should be float64 (2,)",
        "new": "is float64 (2,), should not be there",
    }
    with pytest.raises(ArrayMismatch) as caught:
        add(base, arrays)  # a delta may have another dtype
    assert set(caught.value.mismatches) == {"gone", "shape", "new"}


@pytest.mark.parametrize(
    ("base", "delta", "message"),
    [
        (np.int8(100), np.int64(28), "holds 128 to 128, should be -128 to 127"),
        (np.uint8(1), np.int64(-2), "holds -1 to -1, should be 0 to 255"),
        (np.uint32(2**32 - 1), np.int64(1), "should be 0 to 4294967295"),
        (np.bool_(True), np.int8(1), "should be 0 to 1"),
        (np.bool_(False), np.float64(-1), "should be 0 to 1"),
        (np.int64(1), np.float64(np.nan), "NaN or Inf, should be int64"),
        (np.int64(1), np.float64(2.0**63), "should be -9223372036854775808 to"),
    ],
)
def test_a_sum_out_of_range_is_named(base: np.generic, delta: np.generic, message: str) -> None:
    with pytest.raises(ArrayMismatch) as caught:
        add(record(x=np.asarray(base), y=np.ones(1)), record(x=np.asarray(delta), y=np.ones(1)))
    assert list(caught.value.mismatches) == ["x"]
    assert message in caught.value.mismatches["x"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("base", "delta"),
    [
        (np.float32(3e38), np.float32(3e38)),
        (np.float16(65504), np.float16(65504)),
        (np.float32(1), np.float64(1e300)),
        (np.float32(1), np.complex64(1j)),
        (np.int64(1), np.complex64(1j)),
        (np.int64(2**63 - 1), np.float64(1)),
        (np.uint64(0), np.float64(-1)),
    ],
    ids=lambda value: f"{value.dtype} {value}",
)
def test_a_sum_that_its_dtype_cannot_hold_is_named(base: np.generic, delta: np.generic) -> None:
    with pytest.raises(ArrayMismatch, match="x "):
        add(record(x=np.asarray(base)), record(x=np.asarray(delta)))


@pytest.mark.parametrize("averaged_by", ["flower", "average_arrays"])
def test_averaged_deltas_move_a_module_to_the_average(averaged_by: str) -> None:
    torch.manual_seed(1)
    base, one, two, result = (ZOO["batch norm"]() for _ in range(4))
    for module, count in ((base, 100), (one, 103), (two, 110)):
        module[1].num_batches_tracked.fill_(count)
        module[1].running_mean.fill_(count / 2)
    before = to_arrays(base)
    deltas = [subtract(to_arrays(module), before) for module in (one, two)]
    if averaged_by == "flower":
        replies = [
            RecordDict({"a": delta, "m": MetricRecord({"num-examples": weight})})
            for delta, weight in zip(deltas, (1, 2), strict=True)
        ]
        mean = aggregate_arrayrecords(replies, "num-examples")
        assert mean["1.num_batches_tracked"].dtype == "float64"
    else:
        mean = average_arrays(zip(deltas, (1, 2), strict=True))

    moved = add(before, mean)
    load_arrays(result, moved)

    assert moved["1.num_batches_tracked"].dtype == "int64"
    assert result[1].num_batches_tracked.item() == 108  # 107.67
    torch.testing.assert_close(result[1].running_mean, torch.full((3,), 323 / 6))
    mean_weight = (one[0].weight.double() + 2 * two[0].weight.double()) / 3
    torch.testing.assert_close(result[0].weight.double(), mean_weight, rtol=1e-6, atol=1e-6)


def test_a_mask_is_moved_by_the_rounded_average_of_its_deltas() -> None:
    base = record(mask=np.array([True, True, False, False]))
    delta = record(mask=np.array([-0.7, -0.2, 0.7, 0.2]))
    assert add(base, delta)["mask"].numpy().tolist() == [False, True, True, False]


def test_neither_the_base_nor_the_delta_is_changed() -> None:
    base, delta = record(x=np.array([1, 2]), y=np.ones(2)), record(x=np.array([3, 4]), y=np.ones(2))
    copies = pickle.loads(pickle.dumps((base, delta)))
    add(base, delta)
    subtract(base, delta)
    assert (base, delta) == copies
