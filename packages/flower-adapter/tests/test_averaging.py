import random
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from localgrid import LocalGrid
from numpy.typing import NDArray

from flower_adapter import Guarded, OuterOptimizer, StreamingFedAvg, average_arrays
from flower_adapter.average import Average

Values = dict[str, NDArray[Any]]


def record(**arrays: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def average(values: list[NDArray[Any]], weights: list[float]) -> NDArray[Any]:
    pairs = ((record(x=v), w) for v, w in zip(values, weights, strict=True))
    return average_arrays(pairs)["x"].numpy()


def exact(values: list[NDArray[Any]], weights: list[float]) -> NDArray[Any]:
    """The weighted mean in numpy's double precision, all at once."""
    wide = np.complex128 if values[0].dtype.kind == "c" else np.float64
    stacked = np.stack([v.astype(wide) for v in values])
    return np.asarray(np.average(stacked, axis=0, weights=weights))


FLOATS = ["float16", "float32", "float64", "complex64", "complex128"]
# Relative to the largest of the values: half an ulp for float16, which is averaged in float32.
TOLERANCE = dict(zip(FLOATS, [5e-4, 1e-6, 1e-14, 1e-6, 1e-14], strict=True))
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
WEIGHTS = st.floats(1e-3, 1e6)


@st.composite
def weighted(draw: st.DrawFn, dtype: str) -> tuple[list[NDArray[Any]], list[float]]:
    count, shape = draw(st.integers(1, 8)), draw(SHAPES)
    elements: st.SearchStrategy[Any]
    if np.dtype(dtype).kind == "f":
        width = 8 * np.dtype(dtype).itemsize
        elements = st.floats(-1000, 1000, width=width)  # type: ignore[arg-type]
    elif np.dtype(dtype).kind == "c":
        elements = st.complex_numbers(
            max_magnitude=1000,
            width=8 * np.dtype(dtype).itemsize,  # type: ignore[call-overload]
        )
    else:
        elements = hnp.from_dtype(np.dtype(dtype))
    arrays = [draw(hnp.arrays(dtype, shape, elements=elements)) for _ in range(count)]
    return arrays, draw(st.lists(WEIGHTS, min_size=count, max_size=count))


@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_floats_average_as_in_double_precision(dtype: str, data: st.DataObject) -> None:
    values, weights = data.draw(weighted(dtype))
    mean = average(values, weights)
    assert mean.dtype == dtype
    assert mean.shape == values[0].shape
    largest = max((float(np.abs(v).max()) for v in values if v.size), default=0.0)
    np.testing.assert_allclose(
        mean, exact(values, weights), rtol=0, atol=TOLERANCE[dtype] * largest + 1e-7
    )


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "uint32"])
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_integers_average_to_the_nearest(dtype: str, data: st.DataObject) -> None:
    values, weights = data.draw(weighted(dtype))
    mean = average(values, weights)
    assert mean.dtype == dtype
    # At most half away from the true mean, but for the rounding error of the mean itself.
    off = np.abs(mean.astype(np.float64) - exact(values, weights))
    assert (off <= 0.5 + 1e-5).all()


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_wide_integers_average_within_double_precision(dtype: str, data: st.DataObject) -> None:
    values, weights = data.draw(weighted(dtype))
    mean = average(values, weights)
    assert mean.dtype == dtype
    np.testing.assert_allclose(
        mean.astype(np.float64), exact(values, weights), rtol=0, atol=2.0**64 * 2**-49
    )


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint64"])
@pytest.mark.parametrize("count", [1, 3, 130])
def test_the_extremes_of_an_integer_do_not_wrap_around(dtype: str, count: int) -> None:
    info = np.iinfo(dtype)
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
    # Flower writes the first two with fortran_order in the header; the mean is in C order.
    values = [np.asfortranarray(np.arange(12.0).reshape(3, 4) * k) for k in (1, 2)]
    values.append(np.arange(24.0).reshape(4, 6).T[::2])
    np.testing.assert_allclose(average(values, [1, 1, 1]), exact(values, [1, 1, 1]), rtol=1e-14)


@pytest.mark.parametrize("count", [127, 128, 129, 256, 257, 300])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_hundreds_of_records_average_as_in_double_precision(count: int, dtype: str) -> None:
    chance = np.random.default_rng(count)
    values = [(100 * chance.normal(size=20)).astype(dtype) for _ in range(count)]
    weights = [float(w) for w in chance.integers(1, 1000, count)]
    mean, true = average(values, weights), exact(values, weights)
    tolerance = {"float32": 3e-5, "float16": 0.02, "int64": 0.5 + 1e-9}[dtype]
    np.testing.assert_allclose(mean, true, rtol=0, atol=tolerance)


def test_the_error_of_thousands_of_records_is_that_of_hundreds() -> None:
    values = [np.array([1000 + i % 7], np.float32) for i in range(3000)]
    mean, true = average(values, [1.0] * 3000), exact(values, [1.0] * 3000)
    assert abs(float(mean[0]) - float(true[0])) < 1e-3  # an ulp is 6e-5


def test_the_mean_can_be_taken_once_and_then_there_is_nothing_in_it() -> None:
    mean = Average()
    with pytest.raises(ValueError, match="nothing was added"):
        mean.result()
    mean.add(record(x=np.array([2.0])), 1)
    first = mean.result()
    with pytest.raises(ValueError, match="nothing was added"):
        mean.result()
    mean.add(record(y=np.array([5], np.int8)), 3)
    assert mean.result()["y"].numpy().tolist() == [5]
    assert first["x"].numpy().tolist() == [2.0]
    with pytest.raises(ValueError, match="nothing was added"):
        average_arrays([])


def test_no_arrays_at_all_have_an_empty_mean() -> None:
    assert dict(average_arrays([(ArrayRecord({"x": Array(np.empty(0))}), 1.0)])).keys() == {"x"}


MISMATCHES: dict[str, tuple[Values, str]] = {
    "missing": ({"b": np.zeros(2)}, "a is missing"),
    "more": ({"a": np.zeros(2), "b": np.zeros(2), "c": np.ones(1)}, "c was not in the first"),
    "shape": (
        {"a": np.zeros(3), "b": np.zeros(2)},
        r"a is float64 \(3,\), in the first record float64 \(2,\)",
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
def test_the_records_that_went_in_are_not_changed(dtype: str) -> None:
    records = [record(x=np.arange(5).astype(dtype) + np.array(i, dtype)) for i in range(140)]
    before = [r["x"].data[:] + b"" for r in records]
    before = [bytes(bytearray(data)) for data in before]  # copies, for real
    result = average_arrays((r, 1.0 + i) for i, r in enumerate(records))
    assert [r["x"].data for r in records] == before
    assert all(result["x"].data is not r["x"].data for r in records)


def test_the_mean_of_one_record_is_not_the_memory_of_that_record() -> None:
    one = record(x=np.array([1.0]))
    mean = Average()
    mean.add(one, 1)
    mean.add(record(x=np.array([3.0])), 1)
    assert one["x"].numpy().tolist() == [1.0]
    assert mean.result()["x"].numpy().tolist() == [2.0]


# Strategies


class Simulated(LocalGrid):
    """Replies are made when they are pulled, and the grid counts how many are alive then.

    Alive is also what waits for the garbage collector, which runs after so many objects, however
    large they are.
    """

    def __init__(self, num_nodes: int, seed: int = 0) -> None:
        super().__init__(lambda message, context: message, num_nodes, seed)  # type: ignore[arg-type]
        self.made: list[weakref.ref[Array]] = []
        self.most_alive = 0
        self.asked: dict[str, Message] = {}

    def answer(self, message: Message, partition: int) -> RecordDict | Error:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for number, message in enumerate(messages):
            message_id = f"{len(self.sent)} {number}"
            message.metadata.__dict__["_message_id"] = message_id
            self.asked[message_id] = message
            self.sent.append(message)
        ids = list(self.asked)
        self.chance.shuffle(ids)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        return iter([self.make(message_id) for message_id in message_ids])

    def make(self, message_id: str) -> Message:
        message = self.asked.pop(message_id)
        content = self.answer(message, self.partition(message.metadata.dst_node_id))
        reply = Message(content, reply_to=message)  # type: ignore[arg-type]
        if isinstance(content, RecordDict):
            self.made += [
                weakref.ref(a) for r in content.array_records.values() for a in r.values()
            ]
        self.most_alive = max(self.most_alive, sum(made() is not None for made in self.made))
        return reply


class Towards(Simulated):
    """Client k moves the arrays part of the way to targets of its own, and weighs k + 1."""

    def __init__(self, targets: list[Values], seed: int = 0) -> None:
        super().__init__(len(targets), seed)
        self.targets = targets

    def answer(self, message: Message, partition: int) -> RecordDict:
        [arrays] = message.content.array_records.values()
        moved = {}
        for name, target in self.targets[partition].items():
            now = arrays[name].numpy()
            quarter = np.asarray(0.25, now.dtype)
            moved[name] = target if now.dtype.kind in "biu" else now + (target - now) * quarter
        metrics = MetricRecord({"num-examples": partition + 1, "loss": float(partition)})
        return RecordDict({"arrays": record(**moved), "metrics": metrics})


def targets(count: int, **dtypes: str) -> list[Values]:
    chance = np.random.default_rng(7)
    return [
        {name: (5 * chance.normal(size=(3, 4))).astype(dtype) for name, dtype in dtypes.items()}
        for _ in range(count)
    ]


def run(
    strategy: Strategy, goals: list[Values], rounds: int, grid: Towards | None = None
) -> Result:
    random.seed(0)  # Flower's order of sampling, and so of summation
    start = record(**{name: np.zeros_like(values) for name, values in goals[0].items()})
    return strategy.start(grid or Towards(goals), start, num_rounds=rounds)


def test_streaming_fedavg_is_fedavg_on_floats() -> None:
    goals = targets(5, a="float32", b="float64", c="complex64")
    streamed = run(StreamingFedAvg(fraction_evaluate=0.0), goals, 4)
    plain = run(FedAvg(fraction_evaluate=0.0), goals, 4)
    for name, array in plain.arrays.items():
        found = streamed.arrays[name].numpy()
        assert found.dtype == goals[0][name].dtype
        np.testing.assert_allclose(found, array.numpy(), rtol=1e-5, atol=1e-6)
    assert set(streamed.train_metrics_clientapp) == {1, 2, 3, 4}
    for at, metrics in plain.train_metrics_clientapp.items():
        assert streamed.train_metrics_clientapp[at] == pytest.approx(dict(metrics))


def test_streaming_fedavg_rounds_integers() -> None:
    goals = [{"n": np.array(n), "on": np.array(on)} for n, on in ((4, True), (5, False), (6, True))]
    result = run(StreamingFedAvg(fraction_evaluate=0.0), goals, 1)
    assert result.arrays["n"].numpy() == np.array(5)  # 32 / 6
    assert result.arrays["n"].numpy().dtype == np.int64
    assert result.arrays["on"].numpy() == np.array(True)  # 4 / 6
    assert result.arrays["on"].numpy().dtype == np.bool_


class Refusing(Towards):
    def answer(self, message: Message, partition: int) -> Any:
        return Error(2, "ill") if partition == 1 else super().answer(message, partition)


def test_streaming_fedavg_passes_over_errors_as_fedavg_does() -> None:
    goals = targets(4, a="float64")
    streamed = run(StreamingFedAvg(fraction_evaluate=0.0), goals, 2, Refusing(goals))
    plain = run(FedAvg(fraction_evaluate=0.0), goals, 2, Refusing(goals))
    np.testing.assert_allclose(streamed.arrays["a"].numpy(), plain.arrays["a"].numpy(), rtol=1e-12)


def test_streaming_fedavg_without_a_good_reply_gives_nothing() -> None:
    assert StreamingFedAvg().aggregate_train(1, []) == (None, None)


def test_a_reply_that_cannot_be_averaged_is_an_error_that_names_the_node() -> None:
    goals = targets(2, a="float64")
    first, second = LocalGrid(lambda m, c: m, 2).get_node_ids()  # type: ignore[arg-type]
    replies = [
        Message(
            RecordDict({"arrays": record(**goal), "m": MetricRecord({"num-examples": 1})}),
            reply_to=Message(RecordDict(), node, "train"),
        )
        for node, goal in zip((first, second), (goals[0], {"a": np.zeros((1, 4))}), strict=True)
    ]
    with pytest.raises(ValueError, match=rf"node {second}: a is float64 \(1, 4\)"):
        StreamingFedAvg().aggregate_train(1, replies)


@pytest.mark.parametrize(
    ("strategy", "most"),
    [
        (StreamingFedAvg(fraction_evaluate=0.0), 1),
        (OuterOptimizer(StreamingFedAvg(fraction_evaluate=0.0)), 1),
        # The first five wait for each other.
        (Guarded(StreamingFedAvg(fraction_evaluate=0.0)), 6),
    ],
    ids=["StreamingFedAvg", "OuterOptimizer", "Guarded"],
)
def test_no_more_replies_are_alive_than_the_strategy_needs(strategy: Strategy, most: int) -> None:
    goals = targets(20, a="float32")
    grid = Towards(goals)
    run(strategy, goals, 2, grid)
    assert grid.most_alive <= most


def test_fedavg_of_flower_keeps_all_replies_alive() -> None:
    goals = targets(20, a="float32")
    grid = Towards(goals)
    run(OuterOptimizer(FedAvg(fraction_evaluate=0.0)), goals, 1, grid)
    assert grid.most_alive == 20


@pytest.mark.parametrize("inner", [FedAvg, StreamingFedAvg])
@pytest.mark.parametrize(("learning_rate", "momentum"), [(0.7, 0.9), (0.5, 0.0), (1.3, 0.6)])
def test_the_outer_optimizer_is_nesterov_sgd_of_torch(
    inner: type[FedAvg], learning_rate: float, momentum: float
) -> None:
    goals = targets(3, a="float64", b="float64")
    strategy = OuterOptimizer(
        inner(fraction_evaluate=0.0), learning_rate=learning_rate, momentum=momentum
    )
    result = run(strategy, goals, 6)

    for name in ("a", "b"):
        goal = torch.from_numpy(np.average([g[name] for g in goals], axis=0, weights=[1, 2, 3]))
        weight = torch.nn.Parameter(torch.zeros_like(goal))
        reference = torch.optim.SGD(
            [weight], lr=learning_rate, momentum=momentum, nesterov=momentum > 0
        )
        for _ in range(6):
            weight.grad = -0.25 * (goal - weight.detach())
            reference.step()
        torch.testing.assert_close(
            torch.from_numpy(result.arrays[name].numpy().copy()),
            weight.detach(),
            rtol=1e-12,
            atol=1e-12,
        )


def test_learning_rate_one_without_momentum_is_the_strategy_bit_for_bit() -> None:
    goals = targets(4, a="float32", h="float16")
    plain = run(FedAvg(fraction_evaluate=0.0), goals, 5)
    strategy = OuterOptimizer(FedAvg(fraction_evaluate=0.0), learning_rate=1, momentum=0)
    outer = run(strategy, goals, 5)
    assert {k: a.data for k, a in outer.arrays.items()} == {
        k: a.data for k, a in plain.arrays.items()
    }


@pytest.mark.parametrize("inner", [FedAvg, StreamingFedAvg])
@pytest.mark.parametrize("dtype", ["int64", "bool"])
def test_integers_have_no_momentum(inner: type[FedAvg], dtype: str) -> None:
    goals = [{"n": np.array([10], dtype)}] * 2
    plain = run(Guarded(inner(fraction_evaluate=0.0)), goals, 2)
    outer = run(Guarded(OuterOptimizer(inner(fraction_evaluate=0.0))), goals, 2)
    assert plain.arrays["n"].numpy().tolist() == goals[0]["n"].tolist()
    assert outer.arrays["n"].numpy().tolist() == plain.arrays["n"].numpy().tolist()


def test_the_outer_optimizer_goes_on_from_its_state() -> None:
    goals = targets(2, a="float64")
    whole = run(OuterOptimizer(FedAvg(fraction_evaluate=0.0)), goals, 5)
    first, second = (OuterOptimizer(FedAvg(fraction_evaluate=0.0)) for _ in range(2))
    halfway = run(first, goals, 2)
    second.load_state_dict(first.state_dict())
    rest = second.start(Towards(goals), halfway.arrays, num_rounds=3)
    np.testing.assert_allclose(rest.arrays["a"].numpy(), whole.arrays["a"].numpy(), rtol=1e-12)


def test_a_round_without_a_result_keeps_the_momentum() -> None:
    goals = targets(2, a="float64")
    strategy = OuterOptimizer(FedAvg(fraction_evaluate=0.0))
    run(strategy, goals, 1)
    before = {k: v.clone() for k, v in strategy.state_dict()["velocity"].items()}
    assert strategy.aggregate_train(2, []) == (None, None)
    assert all(torch.equal(v, before[k]) for k, v in strategy.state_dict()["velocity"].items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0, should be a number above 0"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"momentum": 1}, "momentum is 1, should be at least 0 and below 1"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"momentum": float("nan")}, "momentum is nan"),
    ],
)
def test_an_outer_optimizer_needs_sensible_numbers(
    arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OuterOptimizer(FedAvg(), **arguments)
