"""State in a context and in a file: it comes back bit for bit, or it is refused."""

import logging
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from flower_adapter import StateFormatError, restore_state, save_state
from flower_adapter.client.state import drop_state
from flower_adapter.packing import pack, read_file, unpack, write_file


@pytest.fixture
def context() -> Context:
    return Context(1, 2, {}, RecordDict(), {})


def same(one: Any, other: Any) -> bool:
    """Tell whether two values have equal types and contents, at every level and bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray | np.generic):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and one.tobytes() == other.tobytes()
    if isinstance(one, Array):
        return vars(one) == vars(other)
    if isinstance(one, ArrayRecord | ConfigRecord | MetricRecord | RecordDict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        raw = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)
    return repr(one) == repr(other)


def restored(context: Context, **names: Any) -> dict[str, Any]:
    states = restore_state(context, **names)
    assert states is not None
    return states


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
def test_training_continues_bit_for_bit_with_a_restored_optimizer(
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
    save_state(context, valid_for=model, optimizer=optimizer)
    twin = nn.Linear(4, 3, dtype=dtype)
    twin.load_state_dict(model.state_dict())
    for _ in range(5):
        step(model, optimizer)

    sent = context_from_proto(context_to_proto(context))
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    restore_state(sent, valid_for=twin, optimizer=twin_optimizer)
    for _ in range(5):
        step(twin, twin_optimizer)

    assert same(twin_optimizer.state_dict(), optimizer.state_dict())
    assert torch.equal(twin.weight, model.weight)


class Training:
    """Training whose weights depend on an optimizer, a schedule and a generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)
        self.generator = torch.Generator().manual_seed(1)

    def steps(self, count: int) -> None:
        for _ in range(count):
            x = torch.rand(4, 8, generator=self.generator)
            self.optimizer.zero_grad()
            self.model(x).square().sum().backward()
            self.optimizer.step()
            self.schedule.step()

    def states(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "generator": self.generator,
        }


def test_optimizer_schedule_and_generator_continue_bit_for_bit(context: Context) -> None:
    whole, interrupted, resumed = Training(), Training(), Training()
    whole.steps(12)
    interrupted.steps(5)
    save_state(context, valid_for=interrupted.model, **interrupted.states())
    resumed.model.load_state_dict(interrupted.model.state_dict())
    states = restore_state(context, valid_for=resumed.model, **resumed.states())
    assert states is not None
    assert list(states) == ["optimizer", "schedule", "generator"]
    resumed.steps(7)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert resumed.schedule.get_last_lr() == whole.schedule.get_last_lr()
    assert same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_a_restored_generator_draws_the_same_numbers(context: Context) -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(7, generator=generator)
    save_state(context, generator=generator)
    expected = torch.rand(9, generator=generator)
    other = torch.Generator()
    restore_state(context, generator=other)
    assert torch.equal(torch.rand(9, generator=other), expected)


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (nn.Linear(4, 5), "weight of the model is float32 (5, 4), was float32 (3, 4)"),
        (nn.Linear(4, 3).double(), "bias of the model is float64 (3,), was float32 (3,)"),
        (nn.Linear(4, 3, bias=False), "bias of the model is not there, was float32 (3,)"),
        (nn.Bilinear(4, 1, 3), "weight of the model is float32 (3, 4, 1), was float32 (3, 4)"),
        (
            nn.Sequential(nn.Linear(4, 3)),
            "0.weight of the model is float32 (3, 4), was not there",
        ),
    ],
)
def test_the_state_of_a_changed_model_is_dropped_and_the_change_is_named(
    changed: nn.Module, named: str, context: Context, flower_log: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 3)
    save_state(context, name="s", valid_for=model, optimizer=torch.optim.SGD(model.parameters()))
    optimizer = torch.optim.SGD(changed.parameters(), lr=0.5)
    assert restore_state(context, name="s", valid_for=changed, optimizer=optimizer) is None
    assert optimizer.param_groups[0]["lr"] == 0.5
    [warning] = warnings_of(flower_log)
    assert warning.startswith("state s is dropped: ")
    assert named in warning
    assert not context.state


def test_a_model_with_the_same_names_and_shapes_gets_its_state(
    context: Context, flower_log: pytest.LogCaptureFixture
) -> None:
    save_state(context, valid_for=nn.Linear(4, 3), x=1)
    assert restore_state(context, valid_for=nn.Linear(4, 3)) == {"x": 1}
    assert restore_state(context) == {"x": 1}
    assert not warnings_of(flower_log)


def test_a_state_for_another_class_of_target_is_dropped(
    context: Context, flower_log: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 3)
    save_state(context, optimizer=torch.optim.SGD(model.parameters()))
    adam = torch.optim.Adam(model.parameters())
    assert restore_state(context, optimizer=adam) is None
    assert warnings_of(flower_log) == ["state state is dropped: optimizer is a Adam, was SGD"]
    assert restore_state(context, optimizer=adam) is None


def test_a_state_without_one_of_its_targets_is_dropped_and_nothing_is_loaded(
    context: Context, flower_log: pytest.LogCaptureFixture
) -> None:
    save_state(context, generator=torch.Generator().manual_seed(3))
    other = torch.Generator().manual_seed(4)
    before = other.get_state()
    assert restore_state(context, generator=other, other=torch.Generator()) is None
    assert warnings_of(flower_log) == [
        "state state is dropped: other is a Generator, was not saved"
    ]
    assert torch.equal(other.get_state(), before)


def test_if_one_target_refuses_none_is_changed(
    context: Context, flower_log: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    save_state(context, optimizer=optimizer, average=nn.Linear(4, 3))
    fresh = torch.optim.AdamW(model.parameters())
    assert restore_state(context, optimizer=fresh, average=nn.Linear(5, 3)) is None
    assert not fresh.state_dict()["state"]
    [warning] = warnings_of(flower_log)
    assert "average refuses the saved state" in warning


class Two(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2, bias=False))


def test_an_optimizer_never_gets_the_state_of_other_parameters(
    context: Context, flower_log: pytest.LogCaptureFixture
) -> None:
    model = Two("a", "b")
    save_state(context, valid_for=model, optimizer=torch.optim.SGD(model.parameters()))
    turned = Two("b", "a")
    optimizer = torch.optim.SGD(turned.parameters())
    assert restore_state(context, valid_for=turned, optimizer=optimizer) is None
    save_state(context, valid_for=model, optimizer=torch.optim.SGD(model.a.parameters()))
    optimizer = torch.optim.SGD(model.b.parameters())
    assert restore_state(context, valid_for=model, optimizer=optimizer) is None
    first, second = warnings_of(flower_log)
    assert "of the model are in another order" in first or "[['b.weight', 'a.weight']]" in first
    assert "is a SGD of [['b.weight']], was SGD of [['a.weight']]" in second


def test_schedulers_and_generators_of_every_kind_are_restored(context: Context) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    chance, numbers = random.Random(1), np.random.default_rng(1)
    save_state(context, scheduler=scheduler, chance=chance, numbers=numbers)
    expected = chance.random(), numbers.random()
    twins = random.Random(), np.random.default_rng()
    twin = torch.optim.lr_scheduler.MultiStepLR(optimizer, [9])
    restore_state(context, scheduler=twin, chance=twins[0], numbers=twins[1])
    assert (twins[0].random(), twins[1].random()) == expected
    assert twin.milestones == scheduler.milestones


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
    save_state(context, x=tensor)
    assert same(restored(context)["x"], tensor.resolve_conj())


def tensors(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
NUMPY = hnp.arrays(
    st.one_of(
        hnp.boolean_dtypes(),
        hnp.integer_dtypes(),
        hnp.floating_dtypes(sizes=(16, 32, 64)),
        hnp.complex_number_dtypes(sizes=(64, 128)),
    ),
    hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3),
)
LEAVES = (
    PLAIN
    | st.builds(tensors, st.lists(st.floats(), max_size=3))
    | NUMPY
    | hnp.from_dtype(np.dtype("float32"))
    | hnp.from_dtype(np.dtype("int64"))
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


@settings(deadline=None, max_examples=40)
@given(STATES)
def test_any_nested_state_is_restored_from_a_context_and_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, state: Any
) -> None:
    context = Context(1, 2, {}, RecordDict(), {})
    save_state(context, s=state)
    assert same(restored(context)["s"], state)
    path = tmp_path_factory.getbasetemp() / "any"
    write_file(path, *pack(state, "x"))
    assert same(unpack(*read_file(path)), state)


RECORDS = RecordDict(
    {
        "arrays": ArrayRecord({"w": Array(np.arange(3.0)), "n": Array(np.array(7))}),
        "config": ConfigRecord({"lr": 0.1, "name": "x", "raw": b"\0\xff", "many": [1, 2]}),
        "metrics": MetricRecord({"loss": 0.5, "hits": [1, 2]}),
    }
)


@pytest.mark.parametrize(
    "state",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.array(2.5, np.float16),
        np.empty((0, 4), np.complex128),
        np.float32(0.1),
        np.uint64(2**64 - 1),
        np.bool_(True),
        b"\x00\xff",
        2.5 - 1j,
        Counter({"a": 2, 7: -1}),
        torch.Size([2, 3]),
        ArrayRecord({"w": Array(np.arange(3.0))}),
        Array("float32", (2,), "of a codec", b"\1\2\3"),
        RECORDS,
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_numbers_bytes_counters_and_records_are_restored(
    state: Any, context: Context
) -> None:
    save_state(context, x=state)
    assert same(restored(context)["x"], state)


def test_restored_numpy_arrays_can_be_written(context: Context) -> None:
    save_state(context, x=np.zeros(3))
    restored(context)["x"][:] = 1
    assert restored(context)["x"].tolist() == [0, 0, 0]


FILED = {
    "complex128": torch.randn(3, 2, dtype=torch.complex128),
    "complex64": np.array([1 + 2j], np.complex64),
    "bfloat16": ALL_BYTES.view(torch.bfloat16),
    "float8": ALL_BYTES.view(torch.float8_e4m3fn),
    "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3, dtype=torch.complex128),
    "bool": np.array([True, False]),
    "uint64": torch.tensor([2**64 - 1], dtype=torch.uint64),
    "encoded": Array("float32", (2,), "of a codec", b"\1\2\3"),
    "records": RECORDS,
    "nested": [{1: (b"\0", [2.5]), "x": None}, float("nan"), -(2**70)],
}


def test_a_state_of_every_kind_is_restored_from_a_file(tmp_path: Path) -> None:
    write_file(tmp_path / "x", *pack(FILED, "x"))
    assert same(unpack(*read_file(tmp_path / "x")), FILED)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(fraction: float, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_file(path, *pack(FILED, "x"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(ValueError, match="x is truncated or has another format"):
        read_file(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="x"):
        read_file(tmp_path / "x")


def test_restored_tensors_are_new_and_can_be_written(context: Context) -> None:
    save_state(context, x=torch.zeros(3))
    restored(context)["x"].fill_(1)
    assert torch.equal(restored(context)["x"], torch.zeros(3))


def test_without_a_saved_state_nothing_is_restored(context: Context) -> None:
    assert restore_state(context, name="x") is None
    assert restore_state(context, name="x", generator=torch.Generator()) is None


def test_saving_returns_the_bytes_that_the_state_takes_in_the_context(context: Context) -> None:
    small = save_state(context, name="x", a=torch.zeros(10))
    assert small == sum(record.count_bytes() for record in context.state.values())
    large = save_state(context, name="x", a=torch.zeros(1010))
    assert large - small == 4000


def test_a_target_that_cannot_load_a_state_is_refused(context: Context) -> None:
    save_state(context, x=1)
    with pytest.raises(TypeError, match="x is a list, should have load_state_dict"):
        restore_state(context, x=[])


def test_a_state_replaces_the_earlier_one_of_its_name(context: Context) -> None:
    save_state(context, name="x", v=[torch.zeros(5), torch.zeros(5)])
    save_state(context, name="y", v="other")
    save_state(context, name="x", w=[1])
    assert restore_state(context, name="x") == {"w": [1]}
    assert restore_state(context, name="y") == {"v": "other"}


def test_a_dropped_state_is_gone_and_others_stay(context: Context) -> None:
    save_state(context, name="x", v=1)
    save_state(context, name="y", v=2)
    drop_state(context, name="x")
    drop_state(context, name="never saved")
    assert restore_state(context, name="x") is None
    assert restore_state(context, name="y") == {"v": 2}
    assert not [key for key in context.state if key.startswith("x.")]


def test_an_ordered_dict_and_a_defaultdict_become_dicts(context: Context) -> None:
    save_state(context, x=OrderedDict(b=1, a=2), y=defaultdict(int, {3: 4}))
    assert same(restored(context), {"x": {"b": 1, "a": 2}, "y": {3: 4}})


class Point(NamedTuple):
    x: int


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": [1, {2: object()}]}, r"x\['a'\]\[1\]\[2\] is a object"),
        ({"a": np.array([None])}, r"x\['a'\] is a numpy array of object"),
        ({"a": [(1, Path())]}, r"x\['a'\]\[0\]\[1\] is a (Posix|Windows)Path"),
        ([Point(1)], r"x\[0\] is a Point"),
        ({1, 2}, "x is a set"),
        (deque([1]), "x is a deque"),
        ({(1, 2): 3}, r"x has the key \(1, 2\)"),
        ({True: 3}, r"x has the key True"),
        ([torch.eye(2).to_sparse()], r"x\[0\] is a tensor of torch.float32, torch.sparse_coo"),
    ],
)
def test_a_value_that_cannot_be_saved_is_named_and_the_earlier_state_stays(
    state: Any, path: str, context: Context
) -> None:
    save_state(context, name="s", x=[1])
    path = path.replace("x", r"s\['x'\]", 1)
    with pytest.raises(TypeError, match=path):
        save_state(context, name="s", x=state)
    assert restore_state(context, name="s") == {"x": [1]}


def node(content: str) -> dict[str, Any]:
    """Return the record of a state with one entry, given as JSON."""
    json = f'{{"dict":[["v",{content}]]}}'
    return {"format": 2, "json": json, "kinds": '{"v":"Tensor"}', "model": "null"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**node("1"), "format": 1}, "has format 1, should have format 2"),
        ({"json": "1"}, "has format None"),
        ({"format": 2}, "KeyError"),
        ({**node("1"), "json": "[1"}, "JSONDecodeError"),
        ({**node("1"), "json": 1}, "TypeError"),
        (node('{"tensor":["7","float32"]}'), "KeyError: '7'"),
        (node('{"tensor":["0","Tensor"]}'), "unknown dtype 'Tensor'"),
        (node('{"tensor":["0","float64"]}'), "Cannot cast"),
        (node('{"tensor":["0","bfloat16"]}'), "Cannot cast"),
        (node('{"pickle":[]}'), "unknown kind 'pickle'"),
    ],
)
def test_altered_records_are_refused(
    config: dict[str, Any], message: str, context: Context
) -> None:
    save_state(context, name="x", v=torch.zeros(2))
    context.state["x.structure"] = ConfigRecord(config)
    with pytest.raises(StateFormatError, match=message):
        restore_state(context, name="x")


@pytest.mark.parametrize("part", ["arrays", "structure"])
def test_a_state_with_one_record_missing_is_refused(part: str, context: Context) -> None:
    save_state(context, name="x", v=torch.zeros(2))
    del context.state[f"x.{part}"]
    with pytest.raises(StateFormatError, match=r"needs both x\.structure and x\.arrays"):
        restore_state(context, name="x")
