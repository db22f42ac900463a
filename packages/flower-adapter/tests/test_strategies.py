import logging
import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from flwr.supercore.run import Run
from torch import nn

from flower_adapter import Guarded, RoundFailed, Seeded, load_arrays, to_arrays, torch_client_app

GLOBAL = {"w": np.zeros(2, np.float32), "n": np.array(3)}


def record(**arrays: Any) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def good(value: float = 1.0) -> RecordDict:
    arrays = record(w=np.full(2, value, np.float32), n=np.array(4))
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1, "loss": 2.0})})


def with_arrays(**arrays: Any) -> RecordDict:
    return RecordDict({**good(), "arrays": record(**{**GLOBAL, **arrays})})


def with_weight(weight: Any) -> RecordDict:
    return RecordDict({**good(), "metrics": MetricRecord({"num-examples": weight, "loss": 2.0})})


def without(name: str) -> RecordDict:
    return RecordDict({key: value for key, value in good().items() if key != name})


def truncated() -> RecordDict:
    content = with_arrays()
    content["arrays"]["w"].data = content["arrays"]["w"].data[:-1]
    return content


class LocalGrid(Grid):
    """Runs `app` for each message on nodes of random id; replies come in random order.

    A ClientApp without a function for a message raises ValueError; it becomes an error reply with
    the text that Flower's deployment gives it. Anything else that an app raises fails the test.
    """

    def __init__(self, app: ClientApp, num_nodes: int, seed: int = 0) -> None:
        self.app = app
        self.chance = random.Random(seed)
        self.contexts = {
            node: Context(1, node, {"partition-id": partition}, RecordDict(), {})
            for partition, node in enumerate(self.chance.sample(range(1, 10**6), num_nodes))
        }
        self.sent: list[Message] = []

    def partition(self, node: int) -> int:
        return int(self.contexts[node].node_config["partition-id"])

    def node(self, partition: int) -> int:
        return next(node for node in self.contexts if self.partition(node) == partition)

    def sent_of_type(self, message_type: str) -> list[Message]:
        return [m for m in self.sent if m.metadata.message_type == message_type]

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = [self.reply(message) for message in messages]
        self.chance.shuffle(replies)
        return replies

    def reply(self, message: Message) -> Message:
        self.sent.append(message)
        message.metadata.__dict__["_message_id"] = str(uuid4())
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except ValueError as err:
            return Message(Error(2, f"{type(err)}:<'{err}'>"), reply_to=message)

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


class Scripted:
    """A grid's app whose nodes answer by partition with the given contents."""

    def __init__(self, *answers: RecordDict | Error | None) -> None:
        self.answers = answers

    def __call__(self, message: Message, context: Context) -> Message:
        answer = self.answers[int(context.node_config["partition-id"])]
        return Message(answer, reply_to=message)  # type: ignore[arg-type]


def scripted(*answers: RecordDict | Error) -> LocalGrid:
    return LocalGrid(Scripted(*answers), len(answers))  # type: ignore[arg-type]


def train_round(
    strategy: FedAvg | Guarded | Seeded, grid: LocalGrid
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    arrays = record(**GLOBAL)
    replies = grid.send_and_receive(strategy.configure_train(1, arrays, ConfigRecord(), grid))
    return strategy.aggregate_train(1, replies)


BAD_TRAIN_REPLIES: dict[str, tuple[RecordDict | Error, str]] = {
    "error": (Error(2, "ValueError: no data in part 1"), "ValueError: no data in part 1"),
    "error without a reason": (Error(5), "error code 5"),
    "nan": (with_arrays(w=np.array([1, np.nan], np.float32)), "w holds NaN or Inf (1 of 2 values)"),
    "inf": (with_arrays(w=np.array([np.inf] * 2, np.float32)), "w holds NaN or Inf (2 of 2"),
    "missing array": (
        RecordDict({**good(), "arrays": record(n=np.array(4))}),
        "w is missing",
    ),
    "foreign array": (with_arrays(x=np.ones(1)), "x was not sent"),
    "other shape": (
        with_arrays(w=np.zeros(3, np.float32)),
        "w is float32 (3,), should be float32 (2,)",
    ),
    "other dtype": (with_arrays(w=np.zeros(2)), "w is float64 (2,), should be float32 (2,)"),
    "truncated": (truncated(), "w holds 7 bytes, should hold 8"),
    "no arrays": (without("arrays"), "holds 0 ArrayRecords, should hold one"),
    "no metrics": (without("metrics"), "holds 0 MetricRecords, should hold one"),
    "no weight": (
        RecordDict({**good(), "metrics": MetricRecord({"loss": 2.0})}),
        "num-examples is missing from the metrics",
    ),
    "weight zero": (with_weight(0), "num-examples is 0, should be a positive number"),
    "weight negative": (with_weight(-1), "num-examples is -1"),
    "weight nan": (with_weight(float("nan")), "num-examples is nan"),
    "weight inf": (with_weight(float("inf")), "num-examples is inf"),
    "weight list": (with_weight([1, 2]), "num-examples is [1, 2]"),
}


@pytest.mark.parametrize("kind", BAD_TRAIN_REPLIES)
def test_a_bad_train_reply_is_dropped_and_named(
    kind: str, flower_log: pytest.LogCaptureFixture
) -> None:
    bad, reason = BAD_TRAIN_REPLIES[kind]
    grid = scripted(good(1.0), bad, good(3.0))
    strategy = Guarded(FedAvg())
    arrays, metrics = train_round(strategy, grid)
    assert arrays is not None
    assert arrays["w"].numpy().tolist() == [2.0, 2.0]
    assert metrics == {"loss": 2.0, "num-dropped": 1}
    [dropped] = strategy.dropped
    assert dropped[:3] == ("train", 1, grid.node(1))
    assert reason in dropped.reason
    [warning] = [r.getMessage() for r in flower_log.records if r.levelno == logging.WARNING]
    assert warning.startswith(f"train round 1: dropped node {grid.node(1)}: ")
    assert reason in warning


@pytest.mark.parametrize("kind", BAD_TRAIN_REPLIES)
def test_a_round_of_bad_replies_alone_fails_and_names_every_node(kind: str) -> None:
    bad, reason = BAD_TRAIN_REPLIES[kind]
    grid = scripted(bad, bad)
    with pytest.raises(RoundFailed) as caught:
        train_round(Guarded(FedAvg()), grid)
    text = str(caught.value)
    assert text.startswith("train round 1: 0 good of 2 replies, needs 1\n")
    for node in grid.get_node_ids():
        assert f"  node {node}: " in text
    assert text.count(reason) == 2
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_more_good_replies_can_be_asked_for() -> None:
    grid = scripted(good(), good(), Error(0, "ill"))
    with pytest.raises(RoundFailed, match="2 good of 3 replies, needs 3"):
        train_round(Guarded(FedAvg(), min_replies=3), grid)
    assert train_round(Guarded(FedAvg(), min_replies=2), grid)[0] is not None


@pytest.mark.parametrize("min_replies", [0, -1])
def test_a_guard_needs_at_least_one_reply(min_replies: int) -> None:
    with pytest.raises(ValueError, match=f"min_replies is {min_replies}"):
        Guarded(FedAvg(), min_replies=min_replies)


def test_nodes_that_never_answer_fail_the_round_too() -> None:
    grid = scripted(good(), good())
    strategy = Guarded(FedAvg())
    messages = list(strategy.configure_train(1, record(**GLOBAL), ConfigRecord(), grid))
    with pytest.raises(RoundFailed, match="no reply in time"):
        strategy.aggregate_train(1, [])
    assert [(reply.node, reply.reason) for reply in strategy.dropped] == [
        (message.metadata.dst_node_id, "no reply in time") for message in messages
    ]
    assert len(messages) == 2


def test_a_round_in_which_nothing_is_sent_does_not_fail() -> None:
    grid = scripted(good(), good())
    strategy = Guarded(FedAvg(fraction_train=0.0, fraction_evaluate=0.0))
    assert train_round(strategy, grid) == (None, None)
    strategy.configure_evaluate(1, record(**GLOBAL), ConfigRecord(), grid)
    assert strategy.aggregate_evaluate(1, []) is None


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Error(2, "boom"), "boom"),
        (with_weight(0), "num-examples is 0"),
        (without("metrics"), "holds 0 MetricRecords"),
        (
            RecordDict({"m": MetricRecord({"num-examples": 1, "loss": float("nan")})}),
            "loss is nan, should be finite",
        ),
    ],
)
def test_bad_evaluate_replies_are_dropped_and_fail_a_round_of_their_own(
    bad: RecordDict | Error, reason: str
) -> None:
    fine = RecordDict({"m": MetricRecord({"num-examples": 1, "loss": 0.5})})
    for answers, fails in [((fine, bad), False), ((bad, bad), True)]:
        grid = scripted(*answers)
        strategy = Guarded(FedAvg())
        messages = strategy.configure_evaluate(1, record(**GLOBAL), ConfigRecord(), grid)
        replies = grid.send_and_receive(messages)
        if fails:
            with pytest.raises(RoundFailed, match=rf"evaluate round 1(.|\n)*{reason}"):
                strategy.aggregate_evaluate(1, replies)
        else:
            metrics = strategy.aggregate_evaluate(1, replies)
            assert metrics is not None
            assert metrics["loss"] == 0.5


def test_the_weight_is_the_one_the_innermost_strategy_uses() -> None:
    heavy = RecordDict({**good(), "metrics": MetricRecord({"tokens": 5})})
    grid = scripted(heavy, good())
    strategy = Guarded(Seeded(FedAvg(weighted_by_key="tokens"), seed=1))
    _, metrics = train_round(strategy, grid)
    assert metrics == {"num-dropped": 1}


@pytest.mark.parametrize("inner", [FedAvg, FedMedian, FedAdam])
def test_aggregated_arrays_have_the_dtypes_that_were_sent(inner: type[FedAvg]) -> None:
    arrays, _ = train_round(Guarded(inner()), scripted(good(), good()))
    assert arrays is not None
    assert {name: array.numpy().dtype.name for name, array in arrays.items()} == {
        "w": "float32",
        "n": "int64",
    }


def test_an_averaged_integer_is_rounded_not_cut() -> None:
    answers = [with_arrays(n=np.array(n)) for n in (4, 5, 5)]
    arrays, _ = train_round(Guarded(FedAvg()), scripted(*answers))
    assert arrays is not None
    assert arrays["n"].numpy() == 5  # 14 / 3


def test_a_batch_norm_counter_survives_two_guarded_rounds() -> None:
    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, int]:
        model(torch.randn(8, 3))
        return {"num-examples": 8}

    app = torch_client_app(lambda config, context: nn.BatchNorm1d(3), train)
    strategy = Guarded(FedAvg(fraction_evaluate=0.0), min_replies=3)
    result = strategy.start(LocalGrid(app, 3), to_arrays(nn.BatchNorm1d(3)), num_rounds=2)
    assert result.arrays["num_batches_tracked"].numpy() == np.array(2)


def test_without_the_guard_flower_ends_completed_with_the_arrays_it_began_with() -> None:
    grid = scripted(Error(2, "ill"), Error(2, "ill"))
    FedAvg().start(grid, record(**GLOBAL), num_rounds=1)
    with pytest.raises(RoundFailed, match="ill"):
        Guarded(FedAvg()).start(grid, record(**GLOBAL), num_rounds=1)


def echo_app(label: Callable[[Context], str] | None = None) -> ClientApp:
    """A client whose weight depends on its partition so that the order of summation shows."""

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        chance = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=chance))
        return {"num-examples": 1, "loss": torch.rand((), generator=chance).item()}

    return torch_client_app(lambda c, n: nn.Linear(50, 20), train, train, label=label)


def run(strategy: FedAvg | Guarded | Seeded, grid: LocalGrid, rounds: int = 3) -> Any:
    torch.manual_seed(0)
    return strategy.start(grid, to_arrays(nn.Linear(50, 20)), num_rounds=rounds)


def sampled(grid: LocalGrid, kind: str) -> list[int]:
    return [grid.partition(m.metadata.dst_node_id) for m in grid.sent_of_type(kind)]


def test_one_seed_samples_the_same_clients_though_node_ids_differ() -> None:
    def choose(seed: int, grid_seed: int) -> list[list[int]]:
        grid = LocalGrid(echo_app(), 10, grid_seed)
        run(Seeded(FedAvg(fraction_train=0.3, fraction_evaluate=0.2), seed=seed), grid)
        return [sampled(grid, "train"), sampled(grid, "evaluate")]

    first = choose(seed=1, grid_seed=1)
    assert [len(partitions) for partitions in first] == [9, 6]
    assert choose(seed=1, grid_seed=2) == first
    assert choose(seed=2, grid_seed=1) != first
    train = first[0]
    assert len({tuple(sorted(train[i : i + 3])) for i in (0, 3, 6)}) > 1


def test_one_seed_gives_the_same_bits_though_node_ids_and_arrival_differ() -> None:
    results = [
        run(Guarded(Seeded(FedAvg(fraction_train=0.5), seed=1)), LocalGrid(echo_app(), 8, grid))
        for grid in range(4)
    ]
    for result in results[1:]:
        assert result.arrays == results[0].arrays
        assert result.train_metrics_clientapp == results[0].train_metrics_clientapp
        assert result.evaluate_metrics_clientapp == results[0].evaluate_metrics_clientapp


def test_without_a_seed_the_order_of_arrival_shows_in_the_bits() -> None:
    results = [run(FedAvg(), LocalGrid(echo_app(), 8, grid), rounds=1) for grid in range(4)]
    assert any(result.arrays != results[0].arrays for result in results[1:])


class Recording(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        self.order = ["error" if r.has_error() else r.content["client"]["label"] for r in replies]
        return super().aggregate_train(server_round, replies)


def test_replies_are_sorted_by_label_with_errors_last() -> None:
    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, int]:
        if context.node_config["partition-id"] == 2:
            raise ValueError("ill")
        return {"num-examples": 1}

    app = torch_client_app(lambda c, n: nn.Linear(1, 1), train)
    inner = Recording(fraction_evaluate=0.0)
    Seeded(inner, seed=0).start(LocalGrid(app, 5), to_arrays(nn.Linear(1, 1)), num_rounds=1)
    assert inner.order == [*(f"partition {i:04d}" for i in (0, 1, 3, 4)), "error"]


def test_labels_are_asked_for_once_and_only_when_nodes_are_left_out() -> None:
    everyone = LocalGrid(echo_app(), 4)
    run(Seeded(FedAvg(), seed=1), everyone)
    assert not everyone.sent_of_type("query.label")

    some = LocalGrid(echo_app(), 4)
    run(Seeded(FedAvg(fraction_train=0.5), seed=1), some)
    assert len(some.sent_of_type("query.label")) == 4


def test_a_node_that_joins_later_is_asked_for_its_label() -> None:
    grid = LocalGrid(echo_app(), 4)
    strategy = Seeded(FedAvg(fraction_train=0.5), seed=1)
    run(strategy, grid, rounds=1)
    grid.contexts[5] = Context(1, 5, {"partition-id": 9}, RecordDict(), {})
    run(strategy, grid, rounds=1)
    assert sorted(sampled(grid, "query.label")) == [0, 1, 2, 3, 9]


def test_the_global_random_state_is_left_as_it_was() -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    run(Seeded(FedAvg(fraction_train=0.5), seed=1), LocalGrid(echo_app(), 4))
    assert random.random() == expected


def test_nodes_without_a_label_are_ordered_by_id_with_a_warning(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(good(), reply_to=message)

    strategy = Seeded(FedAvg(fraction_train=0.5, fraction_evaluate=0.0), seed=1)
    grids = [LocalGrid(app, 6) for _ in range(2)]
    for grid in grids:
        train_round(strategy, grid)
    assert sampled(grids[0], "train") == sampled(grids[1], "train")
    assert "no label from nodes" in flower_log.text


def test_shared_labels_are_warned_of(flower_log: pytest.LogCaptureFixture) -> None:
    run(Seeded(FedAvg(), seed=1), LocalGrid(echo_app(lambda context: "same"), 3), rounds=1)
    assert "3 nodes share the label 'same'" in flower_log.text


def test_federated_least_squares_reaches_the_closed_form() -> None:
    chance = torch.Generator().manual_seed(3)
    xs = [torch.randn(n, 3, generator=chance, dtype=torch.float64) for n in (20, 30, 50)]
    true = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    ys = [x @ true + 0.1 * torch.randn(len(x), 1, generator=chance) + 4 for x in xs]
    stacked = torch.cat([torch.cat(xs), torch.ones(100, 1)], dim=1)
    solution = torch.linalg.lstsq(stacked, torch.cat(ys)).solution.squeeze()

    def build(config: ConfigRecord, context: Context) -> nn.Module:
        return nn.Linear(3, 1).double()

    def data(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        partition = int(context.node_config["partition-id"])
        return xs[partition], ys[partition]

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        x, y = data(context)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.3).step()
        return {"num-examples": len(x), "loss": loss.item()}

    def evaluate(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        x, y = data(context)
        with torch.no_grad():
            loss = nn.functional.mse_loss(model(x), y).item()
        return {"num-examples": len(x), "loss": loss}

    grid = LocalGrid(torch_client_app(build, train, evaluate), 3)
    strategy = Guarded(Seeded(FedAvg(), seed=0), min_replies=3)
    result = strategy.start(grid, to_arrays(nn.Linear(3, 1).double()), num_rounds=60)

    model = nn.Linear(3, 1).double()
    load_arrays(model, result.arrays)
    fitted = torch.cat([model.weight.squeeze(), model.bias]).detach()
    torch.testing.assert_close(fitted, solution, rtol=0, atol=1e-6)
    residual = (stacked @ solution - torch.cat(ys).squeeze()).pow(2).mean().item()
    assert result.evaluate_metrics_clientapp[60]["loss"] == pytest.approx(residual, abs=1e-6)
