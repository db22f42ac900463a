"""Conversion of modules to arrays and back. `test_zoo` adds many kinds of modules."""

import io
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import Holder, build, compiled, partly_compiled, shared_submodule

from flower_adapter import ArrayMismatch, load_arrays, to_arrays
from flower_adapter.arrays import npy
from flower_adapter.arrays.convert import narrow_like, signature, widen_integers


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 7, bias=False)
        self.embedding = nn.Embedding(7, 4)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("name", ["linear", "batch norm", "lstm", "attention", "parameter lists"])
def test_the_record_is_the_one_that_flower_makes(name: str) -> None:
    module = build(name, 1)
    assert to_arrays(module) == ArrayRecord(dict(module.state_dict()))


def test_an_integer_beyond_double_precision_arrives_exactly() -> None:
    target = Holder(steps=torch.tensor(0))
    load_arrays(target, to_arrays(Holder(steps=torch.tensor(2**62 + 1))))
    assert target.steps.item() == 2**62 + 1


def test_tied_weights_are_sent_once_under_the_first_name() -> None:
    assert list(to_arrays(Tied())) == ["head.weight"]
    shared = ["first.weight", "first.bias", "layers.1.weight", "layers.1.bias"]
    assert list(to_arrays(shared_submodule())) == shared


def test_a_record_of_flower_with_a_tied_weight_twice_is_accepted() -> None:
    source, target = Tied(), Tied()
    load_arrays(target, ArrayRecord(dict(source.state_dict())))
    assert torch.equal(target.embedding.weight, source.embedding.weight)


def test_tied_weights_that_differ_are_refused() -> None:
    target = Tied()
    untied = {name: torch.randn(7, 4) for name in target.state_dict()}
    with pytest.raises(ArrayMismatch, match=r"embedding\.weight differs from head\.weight"):
        load_arrays(target, ArrayRecord(untied))


def test_different_views_of_one_storage_are_all_sent() -> None:
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


def test_empty_tensors_are_not_tied() -> None:
    assert list(to_arrays({"a": torch.empty(0, 3), "b": torch.empty(0, 3)})) == ["a", "b"]


def test_names_are_those_of_the_bare_module() -> None:
    bare = set(nn.Linear(3, 2).state_dict())
    fast = compiled(nn.Linear(3, 2))
    assert set(to_arrays(fast)) == bare
    assert set(to_arrays(fast.state_dict())) == bare
    assert set(to_arrays(nn.DataParallel(fast))) == bare
    assert set(to_arrays(partly_compiled())) == {"0.weight", "0.bias", "1.0.weight", "1.0.bias"}


def test_arrays_of_a_bare_module_fit_a_compiled_one_and_back() -> None:
    bare, fast = nn.Linear(3, 2), compiled(nn.Linear(3, 2))
    load_arrays(fast, to_arrays(bare))
    assert torch.equal(fast.weight, bare.weight)
    other = compiled(nn.Linear(3, 2))
    load_arrays(bare, ArrayRecord(dict(other.state_dict())))
    assert torch.equal(bare.weight, other.weight)


def test_a_child_called_module_keeps_its_prefix_beside_other_names() -> None:
    record = to_arrays({"module.weight": torch.ones(1), "scale": torch.ones(1)})
    assert set(record) == {"module.weight", "scale"}


def test_two_names_that_differ_only_in_compilation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differ only in _orig_mod: a\.w"):
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


def test_an_averaged_counter_is_rounded_but_not_averaged_statistics() -> None:
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
    module = Holder(mask=torch.tensor([False, True]))
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
    module = Holder(x=buffer)
    before = buffer.clone()
    with pytest.raises(ArrayMismatch) as caught:
        load_arrays(module, ArrayRecord({"x": Array(values)}))
    assert message in caught.value.mismatches["x"]
    assert torch.equal(module.x, before)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_a_double_array_fits_a_float_parameter(values: list[float]) -> None:
    module = Holder(x=torch.zeros(len(values)))
    load_arrays(module, ArrayRecord({"x": Array(np.array(values, dtype=np.float64))}))
    assert module.x.tolist() == values


def test_nan_is_loaded_into_a_float_parameter() -> None:
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


@pytest.mark.parametrize(
    "entries",
    [
        {"x": 3},
        {"x": torch.eye(2).to_sparse()},
        {"x": torch.empty(2, device="meta")},
        {"x": torch.ones(1).expand(3)},
    ],
    ids=["a number", "sparse", "meta", "expanded"],
)
def test_an_entry_that_is_not_a_dense_tensor_is_refused_by_name(entries: object) -> None:
    with pytest.raises(TypeError, match=r"^x is"):
        to_arrays(entries)  # type: ignore[arg-type]


def test_arguments_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(TypeError, match="a module or its state dict is needed, not a list"):
        to_arrays([torch.ones(1)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="record is a dict, should be an ArrayRecord"):
        load_arrays(nn.Linear(1, 1), {})  # type: ignore[arg-type]


def test_autograd_notices_that_arrays_were_loaded() -> None:
    module = nn.Linear(2, 2)
    loss = module(torch.ones(1, 2, requires_grad=True)).pow(2).sum()
    load_arrays(module, to_arrays(nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


DTYPES = st.sampled_from(["?", "i1", "<i8", "<u2", "<f2", "<f4", ">f4", "<f8", "<c8"])


@settings(deadline=None, max_examples=40)
@given(DTYPES, st.lists(st.integers(0, 4), max_size=4), st.booleans(), st.integers(0, 99))
def test_arrays_are_written_and_read_as_numpy_does(
    dtype: str, shape: list[int], fortran: bool, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    by_numpy = Array(np.asarray(values, order="F" if fortran else "C"))
    np.testing.assert_array_equal(npy.from_array(by_numpy), values, strict=True)
    np.testing.assert_array_equal(npy.to_array(values).numpy(), values, strict=True)
    assert npy.to_array(values) == Array(np.ascontiguousarray(values).reshape(shape))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.filterwarnings("error")
def test_a_tensor_view_has_the_values_of_its_array_and_keeps_them_alive(order: str) -> None:
    values = np.asarray(np.arange(6.0).reshape(2, 3), order=order)
    array = Array(values)
    view = npy.array_view(array)
    del array
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_tensor_view_shares_the_bytes_of_its_array() -> None:
    array = npy.to_array(np.arange(6.0))
    assert npy.array_view(array).data_ptr() == npy.from_array(array).ctypes.data


def test_integers_widen_to_double_and_narrow_to_the_nearest() -> None:
    before = ArrayRecord(
        {
            "weight": npy.to_array(np.ones(2, np.float32)),
            "count": npy.to_array(np.array([3, -4])),
            "mask": npy.to_array(np.array([True, False])),
        }
    )
    wide = ArrayRecord(dict(before))
    widen_integers(wide)
    assert wide["weight"] == before["weight"]
    assert (wide["count"].dtype, wide["mask"].dtype) == ("float64", "float64")
    assert narrow_like(wide, before) == before
    wide["count"] = npy.to_array(np.array([3.6, -4.4]))
    assert narrow_like(wide, before)["count"].numpy().tolist() == [4, -4]


def test_arrays_without_a_counterpart_are_not_narrowed() -> None:
    arrays = ArrayRecord({"new": npy.to_array(np.ones(2))})
    assert narrow_like(arrays, ArrayRecord()) == arrays


def test_the_signature_names_dtype_and_shape() -> None:
    module = nn.Linear(3, 2).bfloat16()
    assert signature(module) == {"weight": "bfloat16 (2, 3)", "bias": "bfloat16 (2,)"}
