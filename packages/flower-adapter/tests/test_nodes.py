import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from grids import (
    Answering,
    Clock,
    Slow,
    data,
    good,
    partitions,
    record,
    run,
    scripted,
    warnings_of,
)
from torch import nn

from flower_adapter import RoundRecord, to_arrays, torch_client_app
from flower_adapter.server.nodes import Nodes
from flower_adapter.testing import LocalGrid


def client_app(**arguments: Any) -> ClientApp:
    """Return a ClientApp whose update depends on its partition, so that the order shows."""

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        chance = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=chance))
        return {"num-examples": 1, "loss": torch.rand((), generator=chance).item()}

    return torch_client_app(lambda c, n: nn.Linear(50, 20), train, train, **arguments)


START = record(weight=np.zeros((20, 50), np.float32), bias=np.zeros(20, np.float32))


def sampled(grid: LocalGrid, kind: str) -> list[int]:
    return partitions(grid, grid.sent_of_type(kind))


def send_to(count: int) -> Any:
    """Return a function that chooses nodes by chance, as strategies do."""

    def configure(grid: Grid) -> Iterable[Message]:
        chosen = random.sample(list(grid.get_node_ids()), count)
        return [Message(RecordDict(), node, "train") for node in chosen]

    return configure


# One seed


def test_one_seed_samples_the_same_clients_though_node_ids_differ() -> None:
    def choose(seed: int, grid_seed: int) -> list[list[int]]:
        grid = LocalGrid(client_app(), 10, seed=grid_seed)
        strategy = FedAvg(fraction_train=0.3, fraction_evaluate=0.2)
        run(grid, strategy, start=START, num_rounds=3, seed=seed)
        return [sampled(grid, "train"), sampled(grid, "evaluate")]

    first = choose(seed=1, grid_seed=1)
    assert [len(sample) for sample in first] == [9, 6]
    assert choose(seed=1, grid_seed=2) == first
    assert choose(seed=2, grid_seed=1) != first
    train = first[0]
    assert len({tuple(sorted(train[i : i + 3])) for i in (0, 3, 6)}) > 1


def test_one_seed_gives_the_same_bits_though_node_ids_and_arrival_differ() -> None:
    results = [
        run(
            LocalGrid(client_app(), 8, seed=grid_seed),
            FedAvg(fraction_train=0.5),
            start=START,
            num_rounds=3,
            seed=1,
        )[0]
        for grid_seed in range(4)
    ]
    for result in results[1:]:
        assert data(result.arrays) == data(results[0].arrays)
        assert result.train_metrics_clientapp == results[0].train_metrics_clientapp
        assert result.evaluate_metrics_clientapp == results[0].evaluate_metrics_clientapp


def test_in_flowers_own_loop_the_order_of_arrival_shows_in_the_bits() -> None:
    def flowers(grid_seed: int) -> dict[str, bytes]:
        result = FedAvg().start(LocalGrid(client_app(), 8, seed=grid_seed), START, num_rounds=1)
        return data(result.arrays)

    def ours(grid_seed: int) -> dict[str, bytes]:
        grid = LocalGrid(client_app(), 8, seed=grid_seed)
        return data(run(grid, FedAvg(), start=START, seed=None)[0].arrays)

    assert any(flowers(seed) != flowers(0) for seed in range(1, 4))
    assert all(ours(seed) == ours(0) for seed in range(1, 4))


def test_the_samples_of_a_round_do_not_depend_on_those_before() -> None:
    grid = scripted(*(good(1.0, f"{k}") for k in range(9)))
    nodes = Nodes(grid, seed=1)

    def choose(name: str) -> list[int]:
        return partitions(grid, nodes.choose(send_to(3), name))

    first, second = choose("1-train"), choose("2-train")
    assert first != second
    assert choose("2-train") == second
    assert choose("1-train") == first


def test_the_global_random_state_is_left_as_it_was() -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    grid = LocalGrid(client_app(), 4)
    run(grid, FedAvg(fraction_train=0.5), start=START, num_rounds=2, seed=1)
    assert random.random() == expected


def test_the_global_random_state_is_restored_after_an_error_too() -> None:
    def failing(grid: Grid) -> Iterable[Message]:
        random.random()
        raise RuntimeError("no nodes")

    state = random.getstate()
    with pytest.raises(RuntimeError, match="no nodes"):
        Nodes(scripted(good()), seed=1).choose(failing, "1-train")
    assert random.getstate() == state


def test_without_a_seed_the_strategy_samples_with_pythons_own_generator() -> None:
    def choose() -> list[int]:
        grid = LocalGrid(client_app(), 10)
        run(grid, FedAvg(fraction_train=0.3), start=START)
        assert not grid.sent_of_type("query.label")
        return sampled(grid, "train")

    random.seed(3)
    first = choose()
    random.seed(3)
    assert choose() == first
    assert choose() != first


# Labels


def test_labels_are_asked_for_once_and_only_when_nodes_are_left_out() -> None:
    everyone = LocalGrid(client_app(), 4)
    run(everyone, FedAvg(), start=START, num_rounds=3, seed=1)
    assert not everyone.sent_of_type("query.label")

    some = LocalGrid(client_app(), 4)
    run(some, FedAvg(fraction_train=0.5), start=START, num_rounds=3, seed=1)
    assert sorted(sampled(some, "query.label")) == [0, 1, 2, 3]


def test_a_node_that_joins_later_is_asked_for_its_label() -> None:
    grid = LocalGrid(client_app(), 4)

    def join(found: RoundRecord) -> None:
        if found.server_round == 1:
            grid.contexts[5] = Context(1, 5, {"partition-id": 9}, RecordDict(), {})

    strategy = FedAvg(fraction_train=0.5)
    run(grid, strategy, start=START, num_rounds=3, seed=1, on_round=join)
    assert sorted(sampled(grid, "query.label")) == [0, 1, 2, 3, 9]


def test_a_node_that_does_not_know_the_query_is_asked_once(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    grid = scripted(Error(2, "no such query"), good(1.0, "a"), good(1.0, "b"))
    nodes = Nodes(grid, seed=1)
    for _ in range(2):
        nodes.choose(send_to(2), "1-train")
    assert sorted(sampled(grid, "query.label")) == [0, 1, 2]
    assert [nodes.label(grid.node(k)) for k in range(3)] == [None, "a", "b"]
    [warning] = warnings_of(flower_log)
    assert warning == f"no label from nodes [{grid.node(0)}]: their order is not reproducible"


def test_a_node_that_does_not_answer_the_query_in_time_is_named(
    flower_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    grid = Slow(3, never=[0])
    Nodes(grid, seed=1).choose(send_to(2), "1-train")
    assert any(str(grid.node(0)) in warning for warning in warnings_of(flower_log))


def test_nodes_are_ordered_by_label_and_those_without_one_come_last_by_id() -> None:
    nodes = Nodes(scripted(good()), seed=None)
    nodes.learn({1: "c", 2: None, 3: "a", 4: "b"})
    assert sorted([0, 4, 3, 2, 1], key=nodes.order) == [3, 4, 1, 0, 2]
    assert [nodes.label(node) for node in (1, 2, 99)] == ["c", None, None]


def test_a_label_is_kept_when_a_later_reply_has_none() -> None:
    nodes = Nodes(scripted(good()), seed=None)
    nodes.learn({1: "c"})
    nodes.learn({1: None})
    assert nodes.label(1) == "c"


def test_nodes_without_a_label_are_ordered_by_id_with_a_warning(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    grids = [scripted(*[good()] * 6) for _ in range(2)]
    for grid in grids:
        run(grid, FedAvg(fraction_train=0.5, fraction_evaluate=0.0), seed=1)
    assert sampled(grids[0], "train") == sampled(grids[1], "train")
    nodes = sorted(grids[0].get_node_ids())
    assert f"no label from nodes {nodes}: their order is not reproducible" in flower_log.text


def test_shared_labels_are_warned_of(flower_log: pytest.LogCaptureFixture) -> None:
    run(LocalGrid(client_app(label=lambda context: "same"), 3), FedAvg(), start=START, seed=1)
    assert "3 nodes share the label 'same': their order is not reproducible" in flower_log.text


def test_without_a_seed_nobody_is_warned_of_labels(flower_log: pytest.LogCaptureFixture) -> None:
    run(scripted(good(), good(), good(1.0, "same"), good(1.0, "same")))
    assert not [warning for warning in warnings_of(flower_log) if "label" in warning]


def test_a_label_is_learned_from_a_reply_that_does_not_count() -> None:
    """The client is in its place in the next round, whatever its reply was in the first."""

    def answer(message: Message, partition: int) -> RecordDict:
        is_bad = partition == 0 and message.content["config"]["server-round"] == 1
        return good(float("nan") if is_bad else 1.0, "cab"[partition])

    _, records = run(Answering(answer, 3), num_rounds=2)
    assert [client.label for client in records[1].left_out] == ["c"]
    assert [client.label for client in records[1].train_clients] == ["a", "b"]
    assert [client.label for client in records[2].train_clients] == ["a", "b", "c"]


def test_the_order_of_labels_is_the_order_of_summation() -> None:
    """float32 has 24 bits, so 2**24 + 1 is lost in one order and kept in the other."""
    terms = {"a": 2.0**24, "b": 1.0, "c": -(2.0**24)}

    class Summing(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            total = np.zeros(2, np.float32)
            for reply in replies:
                total += reply.content["arrays"]["w"].numpy()
            return record(w=total, n=np.array(3)), None

    def total(labels: str, arrival: int) -> Any:
        answers = [good(terms["abc"[k]], label) for k, label in enumerate(labels)]
        grid = scripted(*answers, seed=arrival)
        result, _ = run(grid, Summing(fraction_evaluate=0.0))
        return result.arrays["w"].numpy().tolist()

    for arrival in range(4):
        assert total("123", arrival) == [0.0, 0.0]  # (2**24 + 1) - 2**24
        assert total("132", arrival) == [1.0, 1.0]  # (2**24 - 2**24) + 1


def test_arrays_of_a_real_model_pass_through() -> None:
    start = to_arrays(nn.Linear(50, 20))
    result, _ = run(LocalGrid(client_app(), 2), FedAvg(), start=start, seed=0)
    assert isinstance(result.arrays, ArrayRecord)
    assert list(result.arrays) == list(start)
