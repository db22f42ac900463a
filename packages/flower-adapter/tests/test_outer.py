from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message
from flwr.serverapp.strategy import FedAvg
from grids import Answer, Answering, data, record, run, values, with_arrays

from flower_adapter import OuterOptimizer, StreamingFedAvg

SHAPE = (3, 4)


def drawn(seed: int, dtype: str = "float64") -> ArrayRecord:
    chance = np.random.default_rng(seed)
    return record(**{name: chance.normal(size=SHAPE).astype(dtype) for name in "ab"})


@pytest.mark.parametrize(("learning_rate", "momentum"), [(0.7, 0.9), (0.5, 0.0), (1.3, 0.6)])
def test_a_step_is_that_of_nesterov_sgd_of_torch(learning_rate: float, momentum: float) -> None:
    outer = OuterOptimizer(learning_rate=learning_rate, momentum=momentum)
    arrays = drawn(0)
    weights = {
        name: torch.nn.Parameter(torch.tensor(array.numpy())) for name, array in arrays.items()
    }
    reference = torch.optim.SGD(
        weights.values(), lr=learning_rate, momentum=momentum, nesterov=momentum > 0
    )
    for step in range(1, 7):
        aggregate = drawn(step)
        arrays = outer.step(arrays, aggregate)
        for name, weight in weights.items():
            weight.grad = weight.detach() - torch.tensor(aggregate[name].numpy())
        reference.step()
        for name, weight in weights.items():
            torch.testing.assert_close(
                torch.tensor(arrays[name].numpy()), weight.detach(), rtol=1e-12, atol=1e-12
            )


def test_steps_towards_a_constant_aggregate_have_a_closed_form() -> None:
    """From w = 0 towards 1: the first two steps of the docstring's formula, by hand."""
    outer = OuterOptimizer(learning_rate=0.5, momentum=0.5)
    one = record(w=np.ones(1))
    first = outer.step(record(w=np.zeros(1)), one)  # d = 1, v = 1
    assert values(first) == {"w": [0.5 * (1 + 0.5 * 1)]}  # 0.75
    second = outer.step(first, one)  # d = 0.25, v = 0.5 + 0.25
    assert values(second) == {"w": [0.75 + 0.5 * (0.25 + 0.5 * 0.75)]}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
def test_the_dtype_of_each_array_stays(dtype: str) -> None:
    outer = OuterOptimizer(learning_rate=0.5, momentum=0.0)
    result = outer.step(record(w=np.zeros(3, dtype)), record(w=np.full(3, 4, dtype)))
    assert result["w"].numpy().dtype == dtype
    assert result["w"].numpy().tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_learning_rate_one_without_momentum_is_the_aggregate_bit_for_bit(dtype: str) -> None:
    outer = OuterOptimizer(learning_rate=1, momentum=0)
    arrays = record(w=np.full(3, 1e-3, dtype), n=np.array(2))
    for step in range(3):
        aggregate = record(w=np.array([0.1, -7.0, 3e4], dtype) * step, n=np.array(step))
        arrays = outer.step(arrays, aggregate)
        assert data(arrays) == data(aggregate)


@pytest.mark.parametrize("dtype", ["int64", "bool", "uint8"])
def test_integers_have_no_momentum(dtype: str) -> None:
    outer = OuterOptimizer()
    arrays = record(n=np.zeros(2, dtype), w=np.zeros(1))
    for step in range(3):
        aggregate = record(n=np.full(2, step, dtype), w=np.ones(1))
        arrays = outer.step(arrays, aggregate)
        assert arrays["n"].data == aggregate["n"].data
    assert set(outer.state_dict()["velocity"]) == {"w"}


def test_a_step_changes_neither_of_the_records_it_is_given() -> None:
    outer = OuterOptimizer()
    arrays, aggregate = drawn(0), drawn(1)
    for _ in range(2):
        outer.step(arrays, aggregate)
    assert data(arrays) == data(drawn(0))
    assert data(aggregate) == data(drawn(1))


def test_the_outer_optimizer_goes_on_from_its_state() -> None:
    whole, first, second = (OuterOptimizer() for _ in range(3))
    arrays = [drawn(0)]
    for step in range(1, 6):
        arrays.append(whole.step(arrays[-1], drawn(step)))
    half = first.step(first.step(drawn(0), drawn(1)), drawn(2))
    second.load_state_dict(first.state_dict())
    first.step(half, drawn(9))  # has no effect on the second
    for step in (3, 4, 5):
        half = second.step(half, drawn(step))
    assert data(half) == data(arrays[-1])


def test_after_a_reset_the_first_step_is_the_first_again() -> None:
    outer = OuterOptimizer()
    first = outer.step(drawn(0), drawn(1))
    assert data(outer.step(drawn(0), drawn(1))) != data(first)
    outer.reset()
    assert data(outer.step(drawn(0), drawn(1))) == data(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0, should be a number above 0"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"momentum": 1}, "momentum is 1, should be at least 0 and below 1"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"momentum": float("nan")}, "momentum is nan"),
    ],
)
def test_an_outer_optimizer_needs_sensible_numbers(
    arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OuterOptimizer(**arguments)


# In a run


def half_way(goals: list[float], ill_rounds: tuple[int, ...] = ()) -> Answering:
    """Return a grid whose client k moves half of the way to its goal."""

    def answer(message: Message, partition: int) -> Answer:
        if message.content["config"]["server-round"] in ill_rounds:
            return Error(2, "ill")
        now = message.content["arrays"]["w"].numpy()
        return with_arrays(w=(now + goals[partition]) / np.float32(2))

    return Answering(answer, len(goals))


@pytest.mark.parametrize("strategy", [FedAvg, StreamingFedAvg])
def test_a_run_takes_one_outer_step_a_round(strategy: type[FedAvg]) -> None:
    outer = OuterOptimizer(learning_rate=0.7, momentum=0.9)
    result, _ = run(half_way([1, 3]), strategy(fraction_evaluate=0.0), num_rounds=4, outer=outer)
    w, v = 0.0, 0.0
    for _ in range(4):
        d = (w + 2) / 2 - w  # the goals' mean is 2
        v = 0.9 * v + d
        w += 0.7 * (d + 0.9 * v)
    np.testing.assert_allclose(result.arrays["w"].numpy(), [w, w], rtol=1e-6)


@pytest.mark.parametrize("strategy", [FedAvg, StreamingFedAvg])
def test_learning_rate_one_without_momentum_changes_no_bit_of_a_run(
    strategy: type[FedAvg],
) -> None:
    def trained(**arguments: Any) -> dict[str, bytes]:
        grid = half_way([0.1, 0.3, 0.7])
        result, _ = run(grid, strategy(fraction_evaluate=0.0), num_rounds=5, **arguments)
        return data(result.arrays)

    assert trained(outer=OuterOptimizer(learning_rate=1, momentum=0)) == trained()
    assert trained(outer=OuterOptimizer()) != trained()


def test_a_failed_round_changes_neither_arrays_nor_momentum() -> None:
    def trained(num_rounds: int, ill_rounds: tuple[int, ...]) -> ArrayRecord:
        grid = half_way([1, 3], ill_rounds)
        return run(grid, num_rounds=num_rounds, outer=OuterOptimizer())[0].arrays

    assert data(trained(5, ill_rounds=(2, 4))) == data(trained(3, ill_rounds=()))


def test_a_round_whose_strategy_gives_no_arrays_keeps_the_momentum() -> None:
    class Pausing(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            return (None if server_round == 2 else arrays), metrics

    paused, _ = run(
        half_way([1, 3]), Pausing(fraction_evaluate=0.0), num_rounds=3, outer=OuterOptimizer()
    )
    plain, _ = run(half_way([1, 3]), num_rounds=2, outer=OuterOptimizer())
    assert data(paused.arrays) == data(plain.arrays)


def test_arrays_that_the_aggregate_lacks_are_not_made_up() -> None:
    outer = OuterOptimizer()
    result = outer.step(record(w=np.zeros(1), more=np.ones(1)), record(w=np.ones(1)))
    assert list(result) == ["w"]
    assert isinstance(result["w"], Array)
