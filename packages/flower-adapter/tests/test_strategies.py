import json
import logging
import pickle
import random
import time
import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

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
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedXgbBagging,
    Strategy,
)
from localgrid import LocalGrid
from torch import nn

from flower_adapter import Guarded, RoundFailed, Seeded, load_arrays, to_arrays, torch_client_app
from flower_adapter.strategies.grid import StreamingGrid

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


class Scripted:
    """A grid's app whose nodes answer by partition with the given contents."""

    def __init__(self, *answers: RecordDict | Error | None) -> None:
        self.answers = answers

    def __call__(self, message: Message, context: Context) -> Message:
        answer = self.answers[int(context.node_config["partition-id"])]
        if isinstance(answer, RecordDict):  # a reply is the strategy's own, to change as it likes
            answer = deepcopy(answer)
        return Message(answer, reply_to=message)  # type: ignore[arg-type]


def scripted(*answers: RecordDict | Error) -> LocalGrid:
    return LocalGrid(Scripted(*answers), len(answers))  # type: ignore[arg-type]


def train_round(
    strategy: Strategy, grid: LocalGrid, server_round: int = 1
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    arrays, config = record(**GLOBAL), ConfigRecord()
    messages = strategy.configure_train(server_round, arrays, config, grid)
    return strategy.aggregate_train(server_round, grid.send_and_receive(messages))


def evaluate_round(
    strategy: Strategy, grid: LocalGrid, server_round: int = 1
) -> MetricRecord | None:
    arrays, config = record(**GLOBAL), ConfigRecord()
    messages = strategy.configure_evaluate(server_round, arrays, config, grid)
    return strategy.aggregate_evaluate(server_round, grid.send_and_receive(messages))


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno == logging.WARNING]


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
    assert metrics == {"loss": 2.0, "num-replies": 2, "num-dropped": 1}
    [dropped] = strategy.dropped
    assert dropped[:3] == ("train", 1, grid.node(1))
    assert reason in dropped.reason
    [warning] = warnings_of(flower_log)
    assert warning.startswith(f"train round 1: dropped node {grid.node(1)}: ")
    assert reason in warning


@pytest.mark.parametrize("kind", BAD_TRAIN_REPLIES)
def test_a_round_of_bad_replies_alone_fails_and_names_every_node(kind: str) -> None:
    bad, reason = BAD_TRAIN_REPLIES[kind]
    grid = scripted(bad, bad)
    with pytest.raises(RoundFailed) as caught:
        train_round(Guarded(FedAvg(), max_failed_rounds=1), grid)
    text = str(caught.value)
    assert text.startswith("train round 1: 0 good of 2 replies, needs 1\n")
    for node in grid.get_node_ids():
        assert f"  node {node}: " in text
    assert text.count(reason) == 2
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_more_good_replies_can_be_asked_for() -> None:
    grid = scripted(good(), good(), Error(0, "ill"))
    with pytest.raises(RoundFailed, match="2 good of 3 replies, needs 3"):
        train_round(Guarded(FedAvg(), min_replies=3, max_failed_rounds=1), grid)
    assert train_round(Guarded(FedAvg(), min_replies=2), grid)[0] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_replies": 0}, "min_replies is 0, should be a whole number of at least 1"),
        ({"min_replies": -1}, "min_replies is -1"),
        (
            {"max_failed_rounds": 0},
            "max_failed_rounds is 0, should be a whole number of at least 1",
        ),
        ({"max_norm_ratio": 1.0}, "max_norm_ratio is 1.0, should be above 1, or None"),
        ({"max_norm_ratio": float("nan")}, "max_norm_ratio is nan"),
    ],
)
def test_a_guard_needs_sensible_numbers(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guarded(FedAvg(), **arguments)


def test_nodes_that_never_answer_fail_the_round_too() -> None:
    grid = scripted(good(), good())
    strategy = Guarded(FedAvg(), max_failed_rounds=1)
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
        strategy = Guarded(FedAvg(), max_failed_rounds=1)
        if fails:
            with pytest.raises(RoundFailed, match=rf"evaluate round 1(.|\n)*{reason}"):
                evaluate_round(strategy, grid)
        else:
            metrics = evaluate_round(strategy, grid)
            assert metrics is not None
            assert metrics["loss"] == 0.5


def test_the_weight_is_the_one_the_innermost_strategy_uses() -> None:
    heavy = RecordDict({**good(), "metrics": MetricRecord({"tokens": 5})})
    grid = scripted(heavy, good())
    strategy = Guarded(Seeded(FedAvg(weighted_by_key="tokens"), seed=1))
    _, metrics = train_round(strategy, grid)
    assert metrics == {"num-replies": 1, "num-dropped": 1}


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


def trained(**arrays: Any) -> RecordDict:
    return with_arrays(**{k: np.array(v, np.float32) for k, v in arrays.items()})


def moved(norm: float) -> RecordDict:
    """A reply whose update has that norm."""
    return trained(w=[0.6 * norm, -0.8 * norm])


def kept_nodes(strategy: Guarded, grid: LocalGrid, *norms: float) -> set[int]:
    """The partitions whose updates of these norms were let through."""
    grid.app = Scripted(*map(moved, norms))  # type: ignore[assignment]
    train_round(strategy, grid)
    dropped = {grid.partition(d.node) for d in strategy.dropped}
    strategy.dropped.clear()
    return set(range(len(norms))) - dropped


@pytest.mark.parametrize("place", range(7))
def test_an_update_a_thousand_times_the_others_is_dropped_with_both_norms(
    place: int, flower_log: pytest.LogCaptureFixture
) -> None:
    answers = [moved(1.0)] * 7
    answers[place] = moved(1000.0)
    grid = scripted(*answers)
    grid.chance = random.Random(place)  # arrives anywhere
    strategy = Guarded(FedAvg())
    arrays, metrics = train_round(strategy, grid)
    assert arrays is not None
    np.testing.assert_allclose(arrays["w"].numpy(), [0.6, -0.8], rtol=1e-6)
    assert metrics == {"loss": pytest.approx(2.0), "num-replies": 6, "num-dropped": 1}
    [dropped] = strategy.dropped
    assert dropped.node == grid.node(place)
    assert dropped.reason == (
        "its update has norm 1000, the others' median is 1, should be at most 100 times that"
    )
    assert dropped.reason in warnings_of(flower_log)[0]


@pytest.mark.parametrize("norms", [(1.0, 1000.0), (1e-3, 1.0), (0.0, 1.0)])
def test_of_two_clients_none_is_called_wrong(norms: tuple[float, float]) -> None:
    grid = LocalGrid(Scripted(), 2)  # type: ignore[arg-type]
    assert kept_nodes(Guarded(FedAvg()), grid, *norms) == {0, 1}


@pytest.mark.parametrize("arrival", range(6))
@pytest.mark.parametrize("odd", [1e-3, 0.0, 1e3])
@pytest.mark.parametrize("count", [3, 5, 10])
def test_one_odd_client_never_costs_another_its_place(count: int, odd: float, arrival: int) -> None:
    grid = LocalGrid(Scripted(), count, arrival)  # type: ignore[arg-type]
    others = set(range(1, count))
    kept = kept_nodes(Guarded(FedAvg()), grid, odd, *[1.0] * (count - 1))
    assert kept == (others if odd > 1 else {0, *others})


@pytest.mark.parametrize("arrival", range(6))
def test_clients_that_did_nothing_are_no_measure(arrival: int) -> None:
    norms = (1e6, *[0.0] * 6, 1.0, 1.0, 1.0)
    grid = LocalGrid(Scripted(), len(norms), arrival)  # type: ignore[arg-type]
    assert set(range(1, 10)) <= kept_nodes(Guarded(FedAvg()), grid, *norms)


@pytest.mark.parametrize("norms", [(1.0, 10.0), (1.0, 1.0, 10.0), (10.0, 1.0, 3.0, 0.1, 1.0)])
def test_honest_updates_of_ten_times_the_norm_stay(norms: tuple[float, ...]) -> None:
    grid = LocalGrid(Scripted(), len(norms))  # type: ignore[arg-type]
    assert kept_nodes(Guarded(FedAvg()), grid, *norms) == set(range(len(norms)))


def test_the_limit_is_what_it_is_set_to_and_none_lets_every_norm_pass() -> None:
    norms = (1.0, 1.0, 50.0, 1e6)
    grid = LocalGrid(Scripted(), 4)  # type: ignore[arg-type]
    assert kept_nodes(Guarded(FedAvg(), max_norm_ratio=None), grid, *norms) == {0, 1, 2, 3}
    assert kept_nodes(Guarded(FedAvg(), max_norm_ratio=1e7), grid, *norms) == {0, 1, 2, 3}
    assert kept_nodes(Guarded(FedAvg(), max_norm_ratio=49.0), grid, *norms) == {0, 1}


def test_clients_that_did_not_move_do_not_make_others_outliers() -> None:
    grid = LocalGrid(Scripted(), 3)  # type: ignore[arg-type]
    assert kept_nodes(Guarded(FedAvg()), grid, 0.0, 0.0, 1.0) == {0, 1, 2}


def test_a_client_alone_may_grow_by_any_factor() -> None:
    grid = LocalGrid(Scripted(), 1)  # type: ignore[arg-type]
    guarded = Guarded(FedAvg(min_train_nodes=1, min_available_nodes=1))
    assert kept_nodes(guarded, grid, 1e-3) == {0}
    assert kept_nodes(guarded, grid, 1.0) == {0}


def test_nan_beside_an_exploded_update_counts_for_neither_norm() -> None:
    nan = trained(w=[np.nan, 1.0])
    grid = scripted(moved(1.0), nan, moved(1000.0), moved(1.0))
    strategy = Guarded(FedAvg())
    _, metrics = train_round(strategy, grid)
    assert metrics == {"loss": 2.0, "num-replies": 2, "num-dropped": 2}
    reasons = {grid.partition(d.node): d.reason for d in strategy.dropped}
    assert reasons[1] == "w holds NaN or Inf (1 of 2 values)"
    assert reasons[2].startswith("its update has norm 1000, the others' median is 1,")


def test_updates_too_large_for_a_square_have_a_norm_all_the_same() -> None:
    strategy = Guarded(FedAvg())
    grid = LocalGrid(Scripted(), 3)  # type: ignore[arg-type]
    assert kept_nodes(strategy, grid, 1.0, 1.0, 3e30) == {0, 1}
    assert kept_nodes(strategy, grid, 1e30, 1e30, 3e30) == {0, 1, 2}


class Changing:
    """A grid's app whose answers to a phase change from round to round."""

    def __init__(self, train: list[str], evaluate: list[str] | None = None) -> None:
        self.answers = {"train": train, "evaluate": evaluate or ["good"] * len(train)}

    def __call__(self, message: Message, context: Context) -> Message:
        [config] = message.content.config_records.values()
        phase = message.metadata.message_type
        answer = self.answers[phase][int(config["server-round"]) - 1]
        if answer == "ill":
            return Message(Error(2, "ill"), reply_to=message)
        content = good(float(config["server-round"]))
        if phase == "evaluate":
            del content["arrays"]
        return Message(content, reply_to=message)


def changing(train: str, evaluate: str = "") -> LocalGrid:
    """A grid of two nodes; a letter a round: g for good and i for ill."""
    names = {"g": "good", "i": "ill"}
    app = Changing([names[x] for x in train], [names[x] for x in evaluate])
    return LocalGrid(app, 2)  # type: ignore[arg-type]


def test_a_failed_round_leaves_the_model_as_it_was_and_says_so(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    models: dict[int, list[float]] = {}

    def look(server_round: int, arrays: ArrayRecord) -> None:
        models[server_round] = arrays["w"].numpy().tolist()

    strategy = Guarded(FedAvg())
    result = strategy.start(changing("giig"), record(**GLOBAL), num_rounds=4, evaluate_fn=look)
    assert models == {0: [0, 0], 1: [1, 1], 2: [1, 1], 3: [1, 1], 4: [4, 4]}
    assert result.train_metrics_clientapp == {
        1: {"loss": 2.0, "num-replies": 2, "num-dropped": 0},
        2: {"num-replies": 0, "num-dropped": 2},
        3: {"num-replies": 0, "num-dropped": 2},
        4: {"loss": 2.0, "num-replies": 2, "num-dropped": 0},
    }
    failed = [w for w in warnings_of(flower_log) if "the model stays as it was" in w]
    assert [w.partition(":")[0] for w in failed] == ["train round 2", "train round 3"]
    assert "(1 of at most 2 failed rounds in a row)" in failed[0]
    assert "(2 of at most 2 failed rounds in a row)" in failed[1]


@pytest.mark.parametrize(
    ("train", "evaluate", "fails"),
    [
        ("giiig", "ggggg", "train round 4"),
        ("iigiig", "gggggg", None),
        ("iigiii", "gggggg", "train round 6"),
        ("ggggg", "iigii", None),
        ("ggggg", "giiig", "evaluate round 4"),
        ("igigi", "gigig", None),  # five in a row, but of two kinds
        ("ig", "gi", None),
        ("ii", "gg", "train round 2"),
        ("i", "g", "train round 1"),
        ("gg", "ii", "evaluate round 2"),
    ],
)
def test_three_failed_rounds_in_a_row_or_a_whole_run_of_them_end_the_run(
    train: str, evaluate: str, fails: str | None
) -> None:
    def start() -> None:
        grid = changing(train, evaluate)
        Guarded(FedAvg()).start(grid, record(**GLOBAL), num_rounds=len(train))

    if fails is None:
        start()
    else:
        with pytest.raises(RoundFailed, match=f"^{fails}: 0 good of 2 replies, needs 1"):
            start()


def test_good_replies_of_a_round_with_too_few_of_them_are_counted() -> None:
    strategy = Guarded(FedAvg(), min_replies=3)
    arrays, metrics = train_round(strategy, scripted(good(), good(), Error(0, "ill")))
    assert arrays is None
    assert metrics == {"num-replies": 2, "num-dropped": 1}


def test_the_count_of_failed_rounds_goes_on_from_the_guards_state() -> None:
    first, second = Guarded(FedAvg()), Guarded(FedAvg())
    grid = scripted(Error(2, "ill"), Error(2, "ill"))
    for server_round in (1, 2):
        train_round(first, grid, server_round)
    second.load_state_dict(first.state_dict())
    assert second.dropped == first.dropped
    with pytest.raises(RoundFailed, match="train round 3"):
        train_round(second, grid, 3)


class Exploding(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        _, metrics = super().aggregate_train(server_round, replies)
        return record(w=np.array([np.nan, np.inf], np.float32), n=np.array(1)), metrics


def test_a_strategy_that_makes_nan_of_good_replies_fails_the_round(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    strategy = Guarded(Exploding(fraction_evaluate=0.0), max_failed_rounds=2)
    grid = scripted(good(), good())
    assert train_round(strategy, grid)[0] is None
    assert "train round 1: aggregated, w holds NaN or Inf (2 of 2 values)" in flower_log.text
    with pytest.raises(RoundFailed, match="train round 2: aggregated, w holds NaN or Inf"):
        train_round(strategy, grid, 2)


class Doubling(FedAvg):
    """Aggregates in double precision to values that single precision does not reach."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        _, metrics = super().aggregate_train(server_round, replies)
        return record(w=np.array([1e39, 1.0]), n=np.array(1)), metrics


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_result_that_overflows_the_dtype_that_was_sent_fails_the_round() -> None:
    assert train_round(Guarded(Doubling()), scripted(good(), good()))[0] is None


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_an_averaged_integer_does_not_wrap_around() -> None:
    answers = [with_arrays(n=np.array(2**63 - 1))] * 2
    arrays, _ = train_round(Guarded(FedAvg()), scripted(*answers))
    assert arrays is not None
    assert float(arrays["n"].numpy()) == pytest.approx(2.0**63)


def trees(*names: str) -> bytes:
    """What xgboost's `save_raw("json")` gives, as far as Flower looks at it."""
    model = {
        "gbtree_model_param": {"num_trees": str(len(names)), "num_parallel_tree": "1"},
        "iteration_indptr": list(range(len(names) + 1)),
        "trees": [{"id": i, "name": name} for i, name in enumerate(names)],
        "tree_info": [0] * len(names),
    }
    return json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()


def test_trees_that_grow_from_round_to_round_are_guarded_too() -> None:
    class Boosting:
        def __call__(self, message: Message, context: Context) -> Message:
            partition = int(context.node_config["partition-id"])
            [config] = message.content.config_records.values()
            if partition == 2:
                return Message(Error(2, "ill"), reply_to=message)
            tree = trees(f"{config['server-round']} of {partition}")
            content = RecordDict(
                {
                    "arrays": ArrayRecord([np.frombuffer(tree, np.uint8)]),
                    "metrics": MetricRecord({"num-examples": 1, "auc": 0.5}),
                }
            )
            return Message(content, reply_to=message)

    grid = LocalGrid(Boosting(), 3)  # type: ignore[arg-type]
    strategy = Guarded(FedXgbBagging(fraction_evaluate=0.0), like_sent=False)
    result = strategy.start(grid, ArrayRecord([np.frombuffer(b"", np.uint8)]), num_rounds=2)
    model = json.loads(result.arrays["0"].numpy().tobytes())["learner"]["gradient_booster"]
    grown = model["model"]["trees"]
    assert {tree["name"] for tree in grown} == {"1 of 0", "1 of 1", "2 of 0", "2 of 1"}
    assert [tree["id"] for tree in grown] == [0, 1, 2, 3]
    assert result.train_metrics_clientapp[2]["num-dropped"] == 1


def test_adaptive_clipping_of_flower_works_inside_a_guard() -> None:
    """It goes through the replies twice, and gives nothing if one is an error."""
    clipping = DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(),
        noise_multiplier=0.0,
        num_sampled_clients=2,
        initial_clipping_norm=0.5,
        clipped_count_stddev=0.0,
    )
    grid = scripted(trained(w=[3.0, 4.0]), Error(2, "ill"), trained(w=[0.0, 0.1]))
    arrays, metrics = train_round(Guarded(clipping), grid)
    assert arrays is not None
    # [3, 4] is clipped to norm 0.5; [0, 0.1] is not; integers move too, by nothing.
    np.testing.assert_allclose(arrays["w"].numpy(), [0.15, 0.25], rtol=1e-5)
    assert metrics == {"loss": 2.0, "num-replies": 2, "num-dropped": 1}


class Slow(LocalGrid):
    """Replies of partition k are there k + 1 looks after they were asked for, or never."""

    def __init__(self, num_nodes: int, never: Iterable[int] = ()) -> None:
        super().__init__(Scripted(*[good()] * num_nodes), num_nodes)  # type: ignore[arg-type]
        self.never = set(never)
        self.looks: dict[str, int] = {}
        self.pulled: list[weakref.ref[Message]] = []
        self.most_alive = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            self.looks[message_id] = self.looks.get(message_id, 0) + 1
            waiting = self.waiting[message_id]
            partition = self.partition(waiting.metadata.src_node_id)
            if partition not in self.never and self.looks[message_id] > partition % 3:
                replies.append(self.waiting.pop(message_id))
        self.pulled += map(weakref.ref, replies)
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.pulled))
        return replies


def queries(grid: LocalGrid) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]


def test_replies_are_pulled_one_at_a_time_as_they_are_asked_for() -> None:
    grid = Slow(9)
    replies = StreamingGrid(grid).send_and_receive(queries(grid))
    assert len(grid.sent) == 9
    assert not grid.pulled
    seen = [next(iter(replies)).metadata.src_node_id]
    assert len(grid.pulled) == 1
    for reply in replies:
        seen.append(reply.metadata.src_node_id)
        del reply
    assert sorted(seen) == sorted(grid.get_node_ids())
    assert grid.most_alive <= 1


def test_replies_end_at_the_timeout_with_those_that_came() -> None:
    grid = Slow(4, never=[1, 3])
    began = time.monotonic()
    replies = list(StreamingGrid(grid).send_and_receive(queries(grid), timeout=0.3))
    assert 0.3 <= time.monotonic() - began < 1.0
    assert {grid.partition(r.metadata.src_node_id) for r in replies} == {0, 2}


def test_replies_that_came_in_time_are_not_lost_to_a_slow_strategy() -> None:
    grid = scripted(*[good()] * 4)
    count = 0
    for _ in StreamingGrid(grid).send_and_receive(queries(grid), timeout=0.1):
        count += 1
        time.sleep(0.06)
    assert count == 4


def test_nodes_that_do_not_answer_in_time_are_named_by_a_guard() -> None:
    grid = Slow(3, never=[1])
    strategy = Guarded(FedAvg(fraction_evaluate=0.0))
    result = strategy.start(grid, record(**GLOBAL), num_rounds=1, timeout=0.3)
    assert result.arrays["w"].numpy().tolist() == [1.0, 1.0]
    assert result.train_metrics_clientapp[1] == {"loss": 2.0, "num-replies": 2, "num-dropped": 0}
    assert [(d.node, d.reason) for d in strategy.dropped] == [(grid.node(1), "no reply in time")]


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
