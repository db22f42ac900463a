from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flower_adapter import StateFormatError, restore_state, save_state, state_size


@pytest.fixture
def context() -> Context:
    return Context(1, 2, {}, RecordDict(), {})


def same(one: Any, other: Any) -> bool:
    """Equal in value and type, all the way down; tensors by bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        raw = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)
    return repr(one) == repr(other)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, amsgrad, tensor lr": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(0.01), amsgrad=True
    ),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_with_a_restored_optimizer(
    name: str, dtype: torch.dtype, context: Context
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 4, dtype=dtype), torch.randn(16, 3, dtype=dtype)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    model = nn.Linear(4, 3, dtype=dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    save_state(context, "optimizer", optimizer.state_dict())
    twin = nn.Linear(4, 3, dtype=dtype)
    twin.load_state_dict(model.state_dict())
    for _ in range(5):
        step(model, optimizer)

    sent = context_from_proto(context_to_proto(context))
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    twin_optimizer.load_state_dict(restore_state(sent, "optimizer"))
    for _ in range(5):
        step(twin, twin_optimizer)

    assert same(twin_optimizer.state_dict(), optimizer.state_dict())
    assert torch.equal(twin.weight, model.weight)


def test_a_restored_generator_draws_the_same_numbers(context: Context) -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(7, generator=generator)
    save_state(context, "generator", generator.get_state())
    expected = torch.rand(9, generator=generator)
    other = torch.Generator()
    other.set_state(restore_state(context, "generator"))
    assert torch.equal(torch.rand(9, generator=other), expected)


ALL_BYTES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize(
    "tensor",
    [
        ALL_BYTES.view(torch.float8_e4m3fn),
        ALL_BYTES.view(torch.float8_e5m2),
        ALL_BYTES.repeat_interleave(2).view(torch.bfloat16).reshape(16, 16),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.empty(0, 3, dtype=torch.bfloat16),
        torch.randn(3, 4).t(),
        torch.tensor([float("nan"), float("-inf"), -0.0]),
        torch.tensor([True, False]),
        torch.tensor([2**64 - 1], dtype=torch.uint64),
        torch.randn(2, dtype=torch.complex64).conj(),
    ],
)
def test_tensors_keep_every_bit(tensor: torch.Tensor, context: Context) -> None:
    save_state(context, "x", tensor)
    assert same(restore_state(context, "x"), tensor.resolve_conj())


def tensors(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.builds(tensors, st.lists(st.floats(), max_size=3))
)
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(STATES)
def test_any_nested_state_comes_back_as_it_was(state: Any) -> None:
    context = Context(1, 2, {}, RecordDict(), {})
    save_state(context, "s", state)
    assert same(restore_state(context, "s"), state)


def test_restored_tensors_are_new_and_can_be_written(context: Context) -> None:
    kept = torch.zeros(3)
    save_state(context, "x", kept)
    restore_state(context, "x").fill_(1)
    assert torch.equal(restore_state(context, "x"), kept)


def test_nothing_saved_is_none_and_takes_no_bytes(context: Context) -> None:
    assert restore_state(context, "x") is None
    assert state_size(context, "x") == 0


def test_size_grows_with_the_tensors(context: Context) -> None:
    save_state(context, "small", {"a": torch.zeros(10)})
    save_state(context, "large", {"a": torch.zeros(1010)})
    assert state_size(context, "large") - state_size(context, "small") == 4000


def test_a_state_takes_the_place_of_the_one_before(context: Context) -> None:
    save_state(context, "x", [torch.zeros(5), torch.zeros(5)])
    save_state(context, "y", "other")
    save_state(context, "x", [1])
    assert restore_state(context, "x") == [1]
    assert restore_state(context, "y") == "other"


def test_an_ordered_dict_becomes_a_dict(context: Context) -> None:
    save_state(context, "x", OrderedDict(b=1, a=2))
    assert same(restore_state(context, "x"), {"b": 1, "a": 2})


class Point(NamedTuple):
    x: int


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": [1, {2: {3}}]}, r"x\['a'\]\[1\]\[2\] is a set"),
        ({"a": np.float32(1)}, r"x\['a'\] is a float32"),
        ([Point(1)], r"x\[0\] is a Point"),
        ({(1, 2): 3}, r"x has the key \(1, 2\)"),
        ({True: 3}, r"x has the key True"),
        ([torch.eye(2).to_sparse()], r"x\[0\] is a tensor of torch.float32, torch.sparse_coo"),
    ],
)
def test_what_cannot_be_saved_is_named_and_the_old_state_stays(
    state: Any, path: str, context: Context
) -> None:
    save_state(context, "x", [1])
    with pytest.raises(TypeError, match=path):
        save_state(context, "x", state)
    assert restore_state(context, "x") == [1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": 2, "json": "1"}, "is of format 2, should be of format 1"),
        ({"json": "1"}, "is of format None"),
        ({"format": 1}, "KeyError"),
        ({"format": 1, "json": "[1"}, "JSONDecodeError"),
        ({"format": 1, "json": '{"tensor":["7","float32"]}'}, "KeyError: '7'"),
        ({"format": 1, "json": '{"tensor":["0","Tensor"]}'}, "unknown dtype 'Tensor'"),
        ({"format": 1, "json": '{"tensor":["0","float64"]}'}, "Cannot cast"),
        ({"format": 1, "json": '{"tensor":["0","bfloat16"]}'}, "Cannot cast"),
        ({"format": 1, "json": '{"set":[]}'}, "unknown kind 'set'"),
    ],
)
def test_altered_records_are_refused(
    config: dict[str, Any], message: str, context: Context
) -> None:
    save_state(context, "x", torch.zeros(2))
    context.state["x.structure"] = ConfigRecord(config)
    with pytest.raises(StateFormatError, match=message):
        restore_state(context, "x")


def test_half_a_state_is_refused(context: Context) -> None:
    save_state(context, "x", torch.zeros(2))
    del context.state["x.arrays"]
    with pytest.raises(StateFormatError, match=r"needs both x\.structure and x\.arrays"):
        restore_state(context, "x")
