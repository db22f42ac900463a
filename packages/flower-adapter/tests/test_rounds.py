import json
import pickle
from collections.abc import Iterable
from tempfile import TemporaryFile
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
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedXgbBagging,
    FedYogi,
    Krum,
)
from grids import (
    BAD_REPLIES,
    GLOBAL,
    Answer,
    Answering,
    Clock,
    Metered,
    Slow,
    data,
    good,
    moved,
    partitions,
    reasons,
    record,
    run,
    scripted,
    truncated,
    values,
    warnings_of,
    with_arrays,
    with_metrics,
    without,
)
from torch import nn

from flower_adapter import (
    Checkpoints,
    Compression,
    Guard,
    OuterOptimizer,
    RoundFailed,
    RoundRecord,
    StreamingFedAvg,
    compression_mod,
    load_arrays,
    run_rounds,
    to_arrays,
    torch_client_app,
)
from flower_adapter.protocol import ATTEMPTS, LABEL_QUERY, RUN
from flower_adapter.server.checkpoints import read_checkpoint
from flower_adapter.testing import LocalGrid

BAD: dict[str, tuple[Answer, str]] = {
    **BAD_REPLIES,
    "error": (Error(2, "ValueError: no data in part 1"), "ValueError: no data in part 1"),
    "error without a reason": (Error(5), "error code 5"),
}


# Which replies count


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_train_reply_is_left_out_and_named(
    kind: str, flower_log: pytest.LogCaptureFixture
) -> None:
    bad, reason = BAD[kind]
    grid = scripted(good(1.0), bad, good(3.0))
    result, [_, first] = run(grid)
    assert values(result.arrays)["w"] == [2.0, 2.0]
    assert result.train_metrics_clientapp == {1: {"loss": 2.0}}
    assert {grid.partition(client.node) for client in first.train_clients} == {0, 2}
    [left_out] = first.left_out
    assert (left_out.phase, left_out.node) == ("train", grid.node(1))
    assert reason in left_out.reason
    assert not first.failures
    [warning] = [w for w in warnings_of(flower_log) if "left out" in w]
    assert warning.startswith(f"train round 1: left out node {grid.node(1)}: ")
    assert reason in warning


@pytest.mark.parametrize("kind", BAD)
def test_a_round_of_bad_replies_alone_fails_and_names_every_node(kind: str) -> None:
    bad, reason = BAD[kind]
    grid = scripted(bad, bad)
    with pytest.raises(RoundFailed) as caught:
        run(grid)
    text = str(caught.value)
    assert text.startswith("train round 1: 0 good of 2 replies, needs 1\n")
    for node in grid.get_node_ids():
        assert f"  node {node}: " in text
    assert text.count(reason) == 2
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_every_client_that_was_left_out_has_its_label_in_the_record() -> None:
    answers = [good(1.0, "a"), moved(1e9, "b"), without_metrics("c"), good(1.0, "d")]
    _, [_, first] = run(scripted(*answers))
    assert [(client.label, client.reason[:7]) for client in first.left_out] == [
        ("c", "holds 0"),
        ("b", "its upd"),
    ]


def without_metrics(label: str) -> RecordDict:
    return RecordDict({k: r for k, r in good(1.0, label).items() if k != "metrics"})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Error(2, "boom"), "boom"),
        (with_metrics(num_examples=0), "num-examples is 0"),
        (without("metrics"), "holds 0 MetricRecords"),
        (with_metrics(num_examples=1, loss=float("nan")), "loss is nan, should be finite"),
    ],
)
def test_bad_evaluate_replies_are_left_out_and_fail_a_phase_of_their_own(
    bad: Answer, reason: str
) -> None:
    def grid_of(*answers: Answer) -> Answering:
        def answer(message: Message, partition: int) -> Answer:
            return good() if message.metadata.message_type == "train" else answers[partition]

        return Answering(answer, len(answers))

    fine = RecordDict({"m": MetricRecord({"num-examples": 1, "loss": 0.5})})
    grid = grid_of(fine, bad)
    result, [_, first] = run(grid, FedAvg())
    assert result.evaluate_metrics_clientapp == {1: {"loss": 0.5}}
    assert [client.phase for client in first.left_out] == ["evaluate"]
    assert reason in reasons(grid, first)[1]
    with pytest.raises(RoundFailed, match=rf"^evaluate round 1: 0 good of 2(.|\n)*{reason}"):
        run(grid_of(bad, bad), FedAvg())


def test_the_weight_is_the_one_that_the_innermost_strategy_uses() -> None:
    heavy = RecordDict({**good(), "metrics": MetricRecord({"tokens": 5})})
    private = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(weighted_by_key="tokens", fraction_evaluate=0.0), 0.0, 1e9, 2
    )
    grid = scripted(heavy, good(), heavy)
    _, [_, first] = run(grid, private)
    assert reasons(grid, first) == {1: "tokens is missing from the metrics"}


class Arriving(Answering):
    """Replies arrive in the given order of partitions."""

    order: Iterable[int] = ()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        list(super().push_messages(messages))
        rank = {partition: place for place, partition in enumerate(self.order)}
        by_rank = sorted(messages, key=lambda m: rank[self.partition(m.metadata.dst_node_id)])
        return [message.metadata.message_id for message in by_rank]


@pytest.mark.parametrize("arrival", ["first", "last", "in the middle", "any", "any other"])
@pytest.mark.parametrize(
    "wrong", [(0, 1, 2), (47, 48, 49), (24, 25, 26), (0, 25, 49)], ids=lambda w: f"labels {w}"
)
def test_three_of_fifty_far_too_long_updates_are_left_out_and_no_other_is(
    wrong: tuple[int, ...], arrival: str
) -> None:
    chance = np.random.default_rng(0)
    norms = chance.uniform(0.5, 2.0, 50)
    norms[list(wrong)] *= 1e6
    grid = Arriving(lambda _, k: moved(norms[k], f"client {k:02d}"), 50, seed=7)
    others = [k for k in range(50) if k not in wrong]
    grid.order = {
        "first": [*wrong, *others],
        "last": [*others, *wrong],
        "in the middle": [*others[:20], *wrong, *others[20:]],
        "any": chance.permutation(50).tolist(),
        "any other": chance.permutation(50).tolist(),
    }[arrival]
    seed = 1 if arrival == "any" else None
    result, [_, first] = run(grid, StreamingFedAvg(fraction_evaluate=0.0), seed=seed)
    assert set(reasons(grid, first)) == set(wrong)
    assert all("its update has norm" in reason for reason in reasons(grid, first).values())
    assert [grid.partition(client.node) for client in first.train_clients] == others
    expected = np.mean([0.6 * norms[others], -0.8 * norms[others]], axis=1)
    np.testing.assert_allclose(result.arrays["w"].numpy(), expected, rtol=1e-5)


def test_nan_beside_a_far_too_long_update_counts_for_no_norm() -> None:
    nan = with_arrays(w=np.array([np.nan, 1.0], np.float32))
    grid = scripted(moved(1.0), nan, moved(1000.0), moved(1.0))
    _, [_, first] = run(grid)
    assert reasons(grid, first) == {
        1: "w holds NaN or Inf (1 of 2 values)",
        2: "its update has norm 1000, should be at most 100 times 1, the median of the others",
    }


def test_a_client_alone_may_grow_by_any_factor_from_round_to_round() -> None:
    def answer(message: Message, partition: int) -> Answer:
        return moved(10.0 ** (6 * message.content["config"]["server-round"]))

    strategy = FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    _, records = run(Answering(answer, 1), strategy, num_rounds=3)
    assert not any(record.left_out for record in records)


# Rounds that fail


def test_a_round_needs_as_many_good_replies_as_the_guard_says() -> None:
    grid = scripted(good(), good(), Error(0, "ill"))
    with pytest.raises(RoundFailed, match="2 good of 3 replies, needs 3"):
        run(grid, guard=Guard(min_replies=3))
    assert not run(grid, guard=Guard(min_replies=2))[1][1].failures


def test_outliers_do_not_count_among_the_good_replies() -> None:
    grid = scripted(moved(1.0), moved(1.0), moved(1e9))
    with pytest.raises(RoundFailed, match="2 good of 3 replies, needs 3") as caught:
        run(grid, guard=Guard(min_replies=3))
    assert [client.node for client in caught.value.left_out] == [grid.node(2)]


def test_nodes_that_never_answer_fail_the_round_too(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    grid = Slow(2, never=[0, 1])
    with pytest.raises(RoundFailed, match="0 good of 2 replies") as caught:
        run(grid, timeout=30.0)
    assert [client.reason for client in caught.value.left_out] == ["no reply in time"] * 2
    assert {client.node for client in caught.value.left_out} == set(grid.get_node_ids())


def test_nodes_that_do_not_answer_in_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    grid = Slow(4, never=[1])
    result, [_, first] = run(grid, timeout=30.0)
    assert values(result.arrays)["w"] == [1.0, 1.0]
    assert reasons(grid, first) == {1: "no reply in time"}
    assert len(first.train_clients) == 3


def test_a_round_in_which_nothing_is_sent_does_not_fail() -> None:
    grid = scripted(good(), good())
    strategy = FedAvg(fraction_train=0.0, fraction_evaluate=0.0)
    result, [_, first] = run(grid, strategy)
    assert data(result.arrays) == data(record(**GLOBAL))
    assert not grid.sent
    assert not first.failures
    assert (first.train_metrics, first.evaluate_metrics) == (None, None)


def test_without_the_loop_flower_ends_with_the_arrays_it_began_with_and_no_error() -> None:
    grid = scripted(Error(2, "ill"), Error(2, "ill"))
    FedAvg().start(grid, record(**GLOBAL), num_rounds=1)
    with pytest.raises(RoundFailed, match="ill"):
        run(grid, FedAvg())


def changing(train: str, evaluate: str = "") -> Answering:
    """Return a grid of two nodes. A letter stands for a round: g for good and i for ill."""

    def answer(message: Message, partition: int) -> Answer:
        if message.metadata.message_type == LABEL_QUERY:
            return Error(5)
        phase, at = message.metadata.message_type, message.content["config"]["server-round"]
        letters = {"train": train, "evaluate": evaluate or "g" * len(train)}[phase]
        if letters[at - 1] == "i":
            return Error(2, "ill")
        content = good(float(at))
        if phase == "evaluate":
            del content["arrays"]
        return content

    return Answering(answer, 2)


def test_a_failed_round_leaves_the_arrays_as_they_were_and_says_so(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    models: dict[int, list[float]] = {}

    def look(server_round: int, arrays: ArrayRecord) -> None:
        models[server_round] = arrays["w"].numpy().tolist()

    result, records = run(changing("giig"), FedAvg(), num_rounds=4, evaluate_fn=look)
    assert models == {0: [0, 0], 1: [1, 1], 2: [1, 1], 3: [1, 1], 4: [4, 4]}
    assert [values(r.arrays)["w"] for r in records if r.arrays] == list(models.values())
    assert result.train_metrics_clientapp == {1: {"loss": 2.0}, 4: {"loss": 2.0}}
    assert [len(record.train_clients) for record in records] == [0, 2, 0, 0, 2]
    assert [record.failures for record in records] == [
        [],
        [],
        ["train: 0 good of 2 replies, needs 1"],
        ["train: 0 good of 2 replies, needs 1"],
        [],
    ]
    failed = [w for w in warnings_of(flower_log) if "the global arrays stay as they were" in w]
    assert [w.partition(":")[0] for w in failed] == ["train round 2", "train round 3"]
    assert "(the run fails after 3 such rounds in a row, this is number 1)" in failed[0]
    assert "(the run fails after 3 such rounds in a row, this is number 2)" in failed[1]


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
        run(changing(train, evaluate), FedAvg(), num_rounds=len(train))

    if fails is None:
        start()
    else:
        with pytest.raises(RoundFailed, match=f"^{fails}: 0 good of 2 replies, needs 1"):
            start()


def test_a_round_whose_strategy_gives_no_arrays_ends_a_row_of_failed_rounds() -> None:
    class Pausing(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            _, metrics = super().aggregate_train(server_round, replies)
            return None, metrics

    with pytest.raises(RoundFailed, match="train round 6"):
        run(changing("iigiii"), Pausing(fraction_evaluate=0.0), num_rounds=6)


def test_the_count_of_failed_rounds_goes_on_after_a_resume(tmp_path: Any) -> None:
    run(changing("gii"), num_rounds=3, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(RoundFailed, match="train round 4"):
        run(changing("giii"), num_rounds=4, checkpoints=Checkpoints(tmp_path, resume=True))


class Giving(FedAvg):
    """Gives these arrays in place of the average."""

    def __init__(self, **arrays: Any) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.arrays = arrays

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        _, metrics = super().aggregate_train(server_round, replies)
        return record(**self.arrays), metrics


def test_an_outer_step_that_overflows_leaves_no_momentum() -> None:
    def answer(message: Message, partition: int) -> RecordDict:
        at = message.content["config"]["server-round"]
        return with_arrays(w=np.full(2, 2.4e38 if at == 1 else 1.0, np.float32), n=np.array(3))

    outer = OuterOptimizer(learning_rate=10.0, momentum=0.9)
    _, records = run(Answering(answer, 2), num_rounds=2, outer=outer)
    assert records[1].failures
    assert not records[2].failures
    ones = with_arrays(w=np.ones(2, np.float32), n=np.array(3))
    fresh, _ = run(scripted(ones, ones), outer=outer)
    assert data(records[2].arrays) == data(fresh.arrays)


def test_an_aggregate_with_other_names_fails_the_round() -> None:
    with pytest.raises(RoundFailed, match="w is missing; n is missing; z should not be there"):
        run(scripted(good(), good()), Giving(z=np.zeros(2, np.float32)))


def test_a_subclass_of_streaming_fedavg_may_read_the_replies_twice() -> None:
    class Twice(StreamingFedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            assert len(list(replies)) == 2
            return super().aggregate_train(server_round, replies)

    once, _ = run(scripted(good(1.0), good(3.0)), StreamingFedAvg(fraction_evaluate=0.0))
    twice, _ = run(scripted(good(1.0), good(3.0)), Twice(fraction_evaluate=0.0))
    assert data(twice.arrays) == data(once.arrays)


class Halving(FedAvg):
    """Halves the learning rate in its config in every round, as Flower's tutorial does."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["lr"] = float(config["lr"]) / 2  # type: ignore[arg-type]
        return super().configure_train(server_round, arrays, config, grid)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def rates(grid: LocalGrid) -> list[float]:
    return [message.content["config"]["lr"] for message in grid.sent_of_type("train")]


def test_a_strategy_that_changes_its_config_changes_it_once_a_round() -> None:
    grid = scripted(*(good(1.0, f"{k}") for k in range(4)))
    strategy = Halving(fraction_train=0.25, fraction_evaluate=0.0, min_train_nodes=1)
    run(grid, strategy, num_rounds=3, seed=1, train_config=ConfigRecord({"lr": 8.0}))
    assert grid.sent_of_type("query.label")
    assert rates(grid) == [4.0, 2.0, 1.0]


@pytest.mark.parametrize(("given", "expected"), [(8.0, 1.0), (80.0, 40.0)])
def test_a_resumed_run_goes_on_with_the_changed_config_unless_it_is_given_another(
    given: float, expected: float, tmp_path: Any, flower_log: pytest.LogCaptureFixture
) -> None:
    def resumed(num_rounds: int, rate: float) -> list[float]:
        grid = scripted(good())
        strategy = Halving(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        checkpoints = Checkpoints(tmp_path, resume=True)
        config = ConfigRecord({"lr": rate})
        run(grid, strategy, num_rounds=num_rounds, checkpoints=checkpoints, train_config=config)
        return rates(grid)

    assert resumed(2, 8.0) == [4.0, 2.0]
    assert resumed(3, given) == [expected]
    assert ("the train config is not that of the saved run" in flower_log.text) == (given == 80.0)


def test_an_outer_step_that_overflows_fails_the_round() -> None:
    largest = float(np.finfo(np.float32).max)
    strategy = Giving(w=np.full(2, largest / 2, np.float32), n=np.array(1))
    models: list[Any] = []
    with pytest.raises(RoundFailed, match=r"unusable: w holds NaN or Inf \(2 of 2 values\)"):
        run(
            scripted(good(), good()),
            strategy,
            num_rounds=2,
            outer=OuterOptimizer(learning_rate=5.0, momentum=0.0),
            on_round=models.append,
        )
    assert data(models[1].arrays) == data(record(**GLOBAL))


def test_an_aggregate_with_nan_fails_the_round(flower_log: pytest.LogCaptureFixture) -> None:
    strategy = Giving(w=np.array([np.nan, np.inf], np.float32), n=np.array(1))
    grid = scripted(good(), good())
    models: list[Any] = []
    reason = "the new global arrays are unusable: w holds NaN or Inf (2 of 2 values)"
    with pytest.raises(RoundFailed, match="train round 2: the new global arrays are unusable"):
        run(
            grid,
            strategy,
            num_rounds=5,
            guard=Guard(max_failed_rounds=2),
            on_round=models.append,
        )
    assert f"train round 1: {reason}" in flower_log.text
    # The last record is that of the round in which the run failed.
    assert [model.failures for model in models] == [[], [f"train: {reason}"], [f"train: {reason}"]]
    assert data(models[1].arrays) == data(record(**GLOBAL))
    assert models[1].train_metrics is None
    assert len(models[1].train_clients) == 2


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_an_aggregate_that_overflows_the_dtype_of_the_model_fails_the_round() -> None:
    strategy = Giving(w=np.array([1e39, 1.0]), n=np.array(1))
    with pytest.raises(RoundFailed, match=r"w holds NaN or Inf \(1 of 2 values\)"):
        run(scripted(good(), good()), strategy)


def test_without_a_guard_no_round_fails() -> None:
    grid = scripted(Error(2, "ill"), Error(2, "ill"))
    result, [_, first] = run(grid, guard=None)
    assert data(result.arrays) == data(record(**GLOBAL))
    assert set(reasons(grid, first).values()) == {"ill"}
    assert not first.failures


def test_without_a_guard_the_strategy_gets_replies_as_they_are() -> None:
    class Looking(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            self.contents = [reply.content for reply in replies]
            return None, None

    answers = [with_arrays(w=np.full(2, np.nan)), moved(1e30), truncated(), without("metrics")]
    strategy = Looking(fraction_evaluate=0.0)
    run(scripted(*answers, Error(2, "ill")), strategy, guard=None)

    def seen(content: RecordDict) -> tuple[dict[str, bytes], list[str]]:
        return data(content.array_records["arrays"]), sorted(content)

    assert sorted(map(seen, strategy.contents), key=repr) == sorted(map(seen, answers), key=repr)


# What the strategy sees


class Recording(FedAvg):
    """Records each call and the labels of the replies."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.calls: list[tuple[str, int, list[Any]]] = []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        self.calls.append(("train", server_round, [r.content["client"]["label"] for r in replies]))
        return super().aggregate_train(server_round, replies)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        labels = [r.content["client"]["label"] for r in replies]
        self.calls.append(("evaluate", server_round, labels))
        return super().aggregate_evaluate(server_round, replies)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("arrival", range(4))
def test_the_strategy_sees_only_good_replies_in_the_order_of_their_labels(
    arrival: int, seed: int | None
) -> None:
    answers = [
        good(1.0, "d"),
        moved(1e9, "a"),
        good(1.0, "c"),
        Error(2, "ill"),
        with_arrays(w=np.full(2, np.nan, np.float32), label="b"),
        good(1.0, "e"),
    ]
    strategy = Recording()
    run(scripted(*answers, seed=arrival), strategy, seed=seed)
    # An update may be of any length in an evaluation: nobody looks at it.
    assert strategy.calls == [("train", 1, ["c", "d", "e"]), ("evaluate", 1, list("abcde"))]


def test_no_strategy_sees_a_reply_before_all_are_judged(
    monkeypatch: pytest.MonkeyPatch, flower_log: pytest.LogCaptureFixture
) -> None:
    """The strategy is called once, after the last reply was pulled or the timeout has passed."""
    clock = Clock(monkeypatch)
    events: list[str] = []

    class Watched(Slow):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            events.extend("reply" for _ in replies)
            return replies

    class Eager(StreamingFedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            events.append(f"called after {len(warnings_of(flower_log))} were left out")

            def watched() -> Iterable[Message]:
                for reply in replies:
                    events.append("seen")
                    yield reply

            return super().aggregate_train(server_round, watched())

    eager = Eager(fraction_evaluate=0.0)
    flower_log.clear()
    run(Watched(5), eager)
    assert events == [*["reply"] * 5, "called after 0 were left out", *["seen"] * 5]
    events.clear()
    run(Watched(5, never=[4]), eager, timeout=100.0)
    assert clock.now >= 100.0
    assert events == [*["reply"] * 4, "called after 1 were left out", *["seen"] * 4]


def test_a_strategy_is_not_called_in_a_failed_phase() -> None:
    strategy = Recording()
    run(changing_labelled("gig", "igg"), strategy, num_rounds=3)
    assert [call[:2] for call in strategy.calls] == [
        ("train", 1),
        ("evaluate", 2),
        ("train", 3),
        ("evaluate", 3),
    ]


def changing_labelled(train: str, evaluate: str) -> Answering:
    plain = changing(train, evaluate)

    def answer(message: Message, partition: int) -> Answer:
        content = plain.answer(message, partition)
        if isinstance(content, RecordDict):
            content["client"] = ConfigRecord({"label": f"{partition}"})
        return content

    return Answering(answer, 2)


@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        (FedAvg, 6),
        (StreamingFedAvg, 6),
        (FedAvgM, 5),
        (FedAdam, 5),
        (FedAdagrad, 5),
        (FedYogi, 5),
        (FedMedian, 6),
        (FedTrimmedAvg, 6),
        (Krum, 6),
    ],
)
def test_strategies_of_flower_give_the_same_as_in_flowers_own_loop(
    strategy: type[FedAvg], places: int
) -> None:
    def answer(message: Message, partition: int) -> Answer:
        [arrays] = message.content.array_records.values()
        now = arrays["w"].numpy()
        chance = np.random.default_rng(partition)
        update = chance.normal(size=now.shape).astype(np.float32)
        metrics = MetricRecord({"num-examples": partition + 1, "loss": float(partition)})
        return RecordDict({"arrays": record(w=now + update), "metrics": metrics})

    start = record(w=np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4))
    here, _ = run(Answering(answer, 6), strategy(), start=start, num_rounds=3)
    flowers = strategy().start(Answering(answer, 6), start, num_rounds=3)
    np.testing.assert_almost_equal(
        here.arrays["w"].numpy(), flowers.arrays["w"].numpy(), decimal=places
    )
    for ours, theirs in (
        (here.train_metrics_clientapp, flowers.train_metrics_clientapp),
        (here.evaluate_metrics_clientapp, flowers.evaluate_metrics_clientapp),
    ):
        assert list(ours) == [1, 2, 3]
        assert all(dict(ours[at]) == pytest.approx(dict(theirs[at])) for at in ours)


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian, FedAdam, StreamingFedAvg])
def test_aggregated_arrays_have_the_dtypes_that_were_sent(strategy: type[FedAvg]) -> None:
    result, _ = run(scripted(good(), good()), strategy(fraction_evaluate=0.0))
    dtypes = {name: array.numpy().dtype.name for name, array in result.arrays.items()}
    assert dtypes == {"w": "float32", "n": "int64"}


@pytest.mark.parametrize("strategy", [FedAvg, StreamingFedAvg])
def test_an_averaged_integer_is_rounded_not_cut(strategy: type[FedAvg]) -> None:
    answers = [with_arrays(n=np.array(n)) for n in (4, 5, 5)]
    result, _ = run(scripted(*answers), strategy(fraction_evaluate=0.0))
    assert result.arrays["n"].numpy() == 5  # 14 / 3


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_an_averaged_integer_does_not_wrap_around() -> None:
    answers = [with_arrays(n=np.array(2**63 - 1))] * 2
    result, _ = run(scripted(*answers), guard=None)
    assert float(result.arrays["n"].numpy()) == pytest.approx(2.0**63)


def test_a_batch_norm_counter_survives_two_rounds() -> None:
    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, int]:
        model(torch.randn(8, 3))
        return {"num-examples": 8}

    app = torch_client_app(lambda config, context: nn.BatchNorm1d(3), train)
    start = to_arrays(nn.BatchNorm1d(3))
    result, _ = run(LocalGrid(app, 3), start=start, num_rounds=2, guard=Guard(min_replies=3))
    assert result.arrays["num_batches_tracked"].numpy() == np.array(2)


def trees(*names: str) -> bytes:
    """Return what xgboost's `save_raw("json")` gives, as far as Flower looks at it."""
    model = {
        "gbtree_model_param": {"num_trees": str(len(names)), "num_parallel_tree": "1"},
        "iteration_indptr": list(range(len(names) + 1)),
        "trees": [{"id": i, "name": name} for i, name in enumerate(names)],
        "tree_info": [0] * len(names),
    }
    return json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()


def test_trees_may_grow_from_round_to_round_without_a_guard() -> None:
    def boost(message: Message, partition: int) -> Answer:
        if partition == 2:
            return Error(2, "ill")
        [config] = message.content.config_records.values()
        tree = trees(f"{config['server-round']} of {partition}")
        arrays = ArrayRecord([np.frombuffer(tree, np.uint8)])
        metrics = MetricRecord({"num-examples": 1, "auc": 0.5})
        return RecordDict({"arrays": arrays, "metrics": metrics})

    result, records = run(
        Answering(boost, 3),
        FedXgbBagging(fraction_evaluate=0.0),
        start=ArrayRecord([np.frombuffer(b"", np.uint8)]),
        num_rounds=2,
        guard=None,
    )
    model = json.loads(result.arrays["0"].numpy().tobytes())["learner"]["gradient_booster"]
    grown = model["model"]["trees"]
    assert {tree["name"] for tree in grown} == {"1 of 0", "1 of 1", "2 of 0", "2 of 1"}
    assert [tree["id"] for tree in grown] == [0, 1, 2, 3]
    assert [client.reason for client in records[2].left_out] == ["ill"]


def test_adaptive_clipping_of_flower_works_beside_a_bad_reply() -> None:
    """It goes through the replies twice, and gives nothing if one is an error."""
    clipping = DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(fraction_evaluate=0.0),
        noise_multiplier=0.0,
        num_sampled_clients=2,
        initial_clipping_norm=0.5,
        clipped_count_stddev=0.0,
    )
    long, short = (with_arrays(w=np.array(w, np.float32)) for w in ([3, 4], [0, 0.1]))
    result, [_, first] = run(scripted(long, Error(2, "ill"), short), clipping)
    # [3, 4] is clipped to norm 0.5; [0, 0.1] is not.
    np.testing.assert_allclose(result.arrays["w"].numpy(), [0.15, 0.25], rtol=1e-5)
    assert len(first.train_clients) == 2


def test_strategies_that_scale_arrays_in_place_get_no_integers() -> None:
    """numpy refuses `array *= 0.5` for an array of integers."""
    clipping = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(fraction_evaluate=0.0), 0.0, clipping_norm=1.0, num_sampled_clients=2
    )
    start = record(w=np.zeros(2, np.float32), n=np.array([3, 3]), on=np.array([True, False]))
    trained = record(w=np.array([3, 4], np.float32), n=np.array([3, 3]), on=np.array([True, False]))
    reply = RecordDict({"arrays": trained, "m": MetricRecord({"num-examples": 1})})
    result, _ = run(scripted(reply, reply), clipping, start=start)
    np.testing.assert_allclose(result.arrays["w"].numpy(), [0.6, 0.8], rtol=1e-5)
    assert result.arrays["n"].numpy().tolist() == [3, 3]
    assert result.arrays["on"].numpy().tolist() == [True, False]


def test_a_strategy_may_change_the_replies_without_an_effect_on_the_next_round() -> None:
    class Spoiling(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            result = super().aggregate_train(server_round, list(replies))
            for reply in replies:
                for arrays in reply.content.array_records.values():
                    arrays.clear()
            return result

    def answer(message: Message, partition: int) -> Answer:
        [arrays] = message.content.array_records.values()
        return with_arrays(
            **{name: a.numpy() + np.ones_like(a.numpy()) for name, a in arrays.items()}
        )

    result, _ = run(Answering(answer, 2), Spoiling(fraction_evaluate=0.0), num_rounds=3)
    assert values(result.arrays) == {"w": [3.0, 3.0], "n": 6}


def test_something_that_is_no_strategy_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="strategy is a str, should be Strategy"):
        run_rounds(scripted(good()), "FedAvg", record(**GLOBAL))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["guard", "compression", "outer", "checkpoints"])
def test_a_part_of_the_wrong_type_is_refused_by_name(part: str) -> None:
    with pytest.raises(TypeError, match=rf"{part} is a str, should be .* \| None"):
        run(scripted(good()), **{part: "2-bit"})


def test_arrays_that_are_no_record_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="arrays is a Linear, should be ArrayRecord"):
        run_rounds(scripted(good()), FedAvg(), nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("metrics", [{"loss": 1.0}, 1.0])
def test_an_evaluation_that_returns_no_metric_record_is_refused_at_once(metrics: Any) -> None:
    grid = scripted(good())
    with pytest.raises(TypeError, match=r"evaluate_fn returned a .*, should be a MetricRecord"):
        run(grid, evaluate_fn=lambda *_: metrics)
    assert grid.sent == []


def untold(config: ConfigRecord) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("flower-adapter.")}


def test_the_configs_reach_the_clients_of_their_phase() -> None:
    grid = scripted(good(), good())
    train, evaluate = ConfigRecord({"lr": 0.1}), ConfigRecord({"batches": 3})
    run(grid, FedAvg(), train_config=train, evaluate_config=evaluate)
    configs = {
        kind: [untold(m.content["config"]) for m in grid.sent_of_type(kind)]
        for kind in ("train", "evaluate")
    }
    assert configs == {
        "train": [{"lr": 0.1, "server-round": 1}] * 2,
        "evaluate": [{"batches": 3, "server-round": 1}] * 2,
    }


def test_the_configs_of_the_caller_stay_as_they_are(tmp_path: Any) -> None:
    """A second run with the same configs would else send the first run's id and attempts."""
    train, evaluate = ConfigRecord({"lr": 0.1}), ConfigRecord({"batches": 3})
    configs = {"train_config": train, "evaluate_config": evaluate}
    grid = scripted(good(label="a"), good(label="b"))
    for resume in (False, True):
        checkpoints = Checkpoints(tmp_path, resume=resume)
        run(grid, FedAvg(), num_rounds=1 + resume, checkpoints=checkpoints, **configs)
    assert {RUN, ATTEMPTS} <= set(grid.sent[-1].content["config"])
    saved = read_checkpoint(tmp_path).configs
    assert {kind: [untold(c) == dict(c) for c in both] for kind, both in saved.items()} == {
        "train": [True, True],
        "evaluate": [True, True],
    }
    assert (dict(train), dict(evaluate)) == ({"lr": 0.1}, {"batches": 3})


def test_evaluation_is_of_the_arrays_after_the_outer_step() -> None:
    seen: list[list[float]] = []

    def answer(message: Message, partition: int) -> Answer:
        if message.metadata.message_type == "evaluate":
            seen.append(message.content["arrays"]["w"].numpy().tolist())
        return good(4.0)

    run(Answering(answer, 2), FedAvg(), outer=OuterOptimizer(learning_rate=0.5, momentum=0.0))
    assert seen == [[2.0, 2.0]] * 2


# Records


def linear() -> nn.Linear:
    return nn.Linear(40, 30)


def randomly_trained(**arguments: Any) -> Any:
    """Return a ClientApp whose update and metrics depend on its partition alone."""

    def work(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        partition = int(context.node_config["partition-id"])
        chance = torch.Generator().manual_seed(partition)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=chance))
        return {"num-examples": partition + 1, "loss": torch.rand((), generator=chance).item()}

    return torch_client_app(lambda c, n: linear(), work, work, **arguments)


COMPRESSIONS: dict[str, Compression | None] = {
    "none": None,
    "fp32": Compression(uplink="fp32", downlink="fp32"),
    "2-bit": Compression(uplink="2-bit", downlink="2-bit"),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_record_holds_the_bytes_that_a_grid_counts(compression: str) -> None:
    class Failing(Metered):
        def changed(self, reply: Message) -> Message:
            if self.partition(reply.metadata.src_node_id) == 1:
                reply.content.pop("metrics")  # its arrays travel, but it is left out
            return reply

    grid = Failing(randomly_trained(mods=[compression_mod]), 3)
    start = to_arrays(linear())
    _, records = run(
        grid, FedAvg(), start=start, num_rounds=3, compression=COMPRESSIONS[compression]
    )
    assert (records[0].bytes_sent, records[0].bytes_received) == (0, 0)
    for at, found in enumerate(records[1:]):
        traffic = grid.traffic[6 * at : 6 * at + 6]
        assert found.bytes_sent == sum(down for _, _, down, _ in traffic) > 0
        assert found.bytes_received == sum(up for _, _, _, up in traffic) > 0
        for phase, clients in (
            ("train", found.train_clients),
            ("evaluate", found.evaluate_clients),
        ):
            counted = {k: (down, up) for p, k, down, up in traffic if p == phase and k != 1}
            assert counted == {
                grid.partition(client.node): (client.bytes_sent, client.bytes_received)
                for client in clients
            }
    whole = sum(len(array.data) for array in start.values())
    if compression == "2-bit":
        assert records[3].bytes_received < 0.15 * 3 * whole
    else:
        assert records[3].bytes_received == 3 * whole


def test_the_record_holds_each_clients_own_metrics_and_what_the_strategy_made_of_them() -> None:
    grid = LocalGrid(randomly_trained(), 4)
    start = to_arrays(linear())

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"norm": float(np.abs(arrays["bias"].numpy()).sum())})

    result, records = run(grid, FedAvg(), start=start, num_rounds=2, evaluate_fn=evaluate)
    assert [found.server_round for found in records] == [0, 1, 2]
    for found in records[1:]:
        for clients, metrics in (
            (found.train_clients, found.train_metrics),
            (found.evaluate_clients, found.evaluate_metrics),
        ):
            assert [c.label for c in clients] == [f"partition {k:04d}" for k in range(4)]
            assert [c.node for c in clients] == [grid.node(k) for k in range(4)]
            assert [c.metrics["num-examples"] for c in clients] == [1, 2, 3, 4]
            losses = [c.metrics["loss"] for c in clients]
            assert len(set(losses)) == 4
            mean = np.average(losses, weights=[1, 2, 3, 4])
            assert metrics == pytest.approx({"loss": mean})
        assert not found.left_out
        assert found.arrays is not None
        assert found.server_metrics == evaluate(found.server_round, found.arrays)
    assert records[0].server_metrics == evaluate(0, start)
    assert data(records[2].arrays or ArrayRecord()) == data(result.arrays)
    assert data(records[0].arrays or ArrayRecord()) == data(start)
    assert result.evaluate_metrics_serverapp == {r.server_round: r.server_metrics for r in records}
    assert result.train_metrics_clientapp == {r.server_round: r.train_metrics for r in records[1:]}


@pytest.mark.parametrize("compression", [None, Compression(uplink="bf16", downlink="fp32")])
def test_the_record_holds_the_norm_of_each_update(compression: Compression | None) -> None:
    grid = LocalGrid(randomly_trained(mods=[compression_mod]), 3)
    _, [_, first] = run(grid, FedAvg(), start=to_arrays(linear()), compression=compression)
    for partition, client in enumerate(first.train_clients):
        chance = torch.Generator().manual_seed(partition)
        update = [torch.randn(s, generator=chance).ravel() for s in ((30, 40), (30,))]
        expected = float(np.linalg.norm(torch.cat(update).numpy()))
        assert client.update_norm == pytest.approx(
            expected, rel=1e-5 if compression is None else 1e-2
        )
    assert [client.update_norm for client in first.evaluate_clients] == [0, 0, 0]


def test_the_record_holds_the_seconds_of_each_part(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock stands still except where the test moves it."""
    now = [0.0]
    monkeypatch.setattr("flower_adapter.server.record.time.monotonic", lambda: now[0])

    class Timed(Answering):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            now[0] += {"train": 1.0, "evaluate": 2.0}[messages[0].metadata.message_type]
            return super().push_messages(messages)

    class Thinking(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            now[0] += 4.0
            return super().aggregate_train(server_round, replies)

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        now[0] += 8.0

    _, [zero, first] = run(
        Timed(lambda *_: good(), 2),
        Thinking(),
        evaluate_fn=evaluate,
    )
    assert zero.seconds == {"server-evaluate": 8.0}
    assert first.seconds == {
        "train": 1.0,
        "decode": 0.0,
        "aggregate": 4.0,
        "evaluate": 2.0,
        "server-evaluate": 8.0,
    }
    assert [client.seconds for client in first.train_clients] == [1.0, 1.0]


def test_round_zero_has_a_record_without_clients_and_without_an_evaluation() -> None:
    _, [zero] = run(scripted(good(), good()), num_rounds=0)
    assert zero == RoundRecord(0, arrays=zero.arrays)
    assert data(zero.arrays or ArrayRecord()) == data(record(**GLOBAL))


def test_a_record_comes_back_from_its_dicts() -> None:
    _, records = run(changing("gig"), FedAvg(), num_rounds=3)
    for found in records:
        fields = json.loads(json.dumps(found.to_dict()))
        found.arrays = None
        assert RoundRecord.from_dict(fields) == found


def test_on_round_gets_one_record_a_round_after_its_end() -> None:
    events: list[Any] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        events.append(("evaluated", server_round))

    run(
        scripted(good(), good()),
        num_rounds=2,
        evaluate_fn=evaluate,
        on_round=lambda found: events.append(("record", found.server_round)),
    )
    assert events == [(what, at) for at in (0, 1, 2) for what in ("evaluated", "record")]


# Memory and bits


@pytest.mark.parametrize("strategy", [FedAvg, StreamingFedAvg, FedMedian])
@pytest.mark.parametrize("compression", ["none", "2-bit"])
def test_replies_in_a_temporary_file_give_the_same_bits_as_in_memory(
    strategy: type[FedAvg], compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Any] = []

    def temporary_file(buffering: int) -> Any:
        files.append(TemporaryFile(buffering=buffering))  # noqa: SIM115
        return files[-1]

    monkeypatch.setattr("flower_adapter.server.replies.TemporaryFile", temporary_file)
    torch.manual_seed(0)
    start = to_arrays(linear())
    whole = sum(len(array.data) for array in start.values())
    results = []
    for memory in (2**30, whole, 0):
        grid = LocalGrid(randomly_trained(mods=[compression_mod]), 5)
        result, _ = run(
            grid,
            strategy(),
            start=start,
            compression=COMPRESSIONS[compression],
            reply_memory=memory,
        )
        results.append(data(result.arrays))
        if memory == 2**30:
            assert not files
    assert results[0] == results[1] == results[2]
    assert len(files) == (1 if compression == "2-bit" else 2)  # all 2-bit replies fit in `whole`
    assert all(file.closed for file in files)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("compression", [None, Compression(uplink="int8", downlink="int8")])
def test_order_of_arrival_and_node_ids_change_no_bit(
    seed: int | None, compression: Compression | None
) -> None:
    torch.manual_seed(0)
    start = to_arrays(linear())
    runs = []
    for arrival in range(3):
        grid = LocalGrid(randomly_trained(mods=[compression_mod]), 7, seed=arrival)
        result, records = run(
            grid,
            StreamingFedAvg(fraction_train=0.6 if seed else 1.0),
            start=start,
            num_rounds=3,
            seed=seed,
            compression=compression,
            outer=OuterOptimizer(),
        )
        metrics = [(found.train_metrics, found.evaluate_metrics) for found in records]
        labels = [[client.label for client in found.train_clients] for found in records]
        runs.append((data(result.arrays), metrics, labels))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("strategy", [FedAvg, StreamingFedAvg])
def test_labels_decide_the_bits_only_through_their_order(strategy: type[FedAvg]) -> None:
    def trained(names: str) -> dict[str, bytes]:
        app = randomly_trained(label=lambda c: names[int(c.node_config["partition-id"])])
        torch.manual_seed(0)
        result, _ = run(LocalGrid(app, 8), strategy(), start=to_arrays(linear()))
        return data(result.arrays)

    assert trained("abcdefgh") == trained("opqrstuv")
    assert trained("abcdefgh") != trained("hgfedcba")  # floats add up differently


@pytest.mark.parametrize("strategy", [FedAvg, StreamingFedAvg])
def test_the_same_settings_serve_two_runs_and_the_second_does_not_see_the_first(
    strategy: type[FedAvg],
) -> None:
    torch.manual_seed(0)
    start = to_arrays(linear())
    settings = {
        "compression": Compression(uplink="2-bit", downlink="int4"),
        "outer": OuterOptimizer(),
        "guard": Guard(min_replies=2),
    }
    runs = []
    for _ in range(2):
        grid = Metered(randomly_trained(mods=[compression_mod]), 3)
        result, records = run(grid, strategy(), start=start, num_rounds=3, **settings)
        assert not grid.errors
        runs.append(
            (data(result.arrays), sorted(grid.traffic), [found.bytes_sent for found in records])
        )
    assert runs[0] == runs[1]


def test_a_second_run_over_the_same_clients_starts_anew_too() -> None:
    torch.manual_seed(0)
    start = to_arrays(linear())
    compression = Compression(uplink="fp32", downlink="int8")
    grid = Metered(randomly_trained(mods=[compression_mod]), 3)
    results = [
        run(grid, FedAvg(), start=start, num_rounds=2, compression=compression)[0] for _ in range(2)
    ]
    assert not grid.errors
    assert data(results[0].arrays) == data(results[1].arrays)


class Personal(FedAvg):
    """Sends a model of its own to each client."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        for k, message in enumerate(super().configure_train(server_round, arrays, config, grid)):
            own = ArrayRecord({"w": Array(np.full(2, k, np.float32)), "n": Array(np.array(k))})
            yield Message(
                RecordDict({**message.content, "arrays": own}),
                message.metadata.dst_node_id,
                "train",
            )


def test_a_strategy_may_send_each_client_its_own_model_unless_it_is_compressed() -> None:
    grid = scripted(good(), good())
    run(grid, Personal(fraction_evaluate=0.0))
    assert sorted(m.content["arrays"]["w"].numpy()[0] for m in grid.sent) == [0.0, 1.0]
    assert sorted(partitions(grid, grid.sent)) == [0, 1]
    with pytest.raises(RoundFailed, match="CodecError: the strategy sends different models"):
        run(grid, Personal(fraction_evaluate=0.0), compression=Compression())


# Whole runs


def test_federated_least_squares_reaches_the_closed_form() -> None:
    chance = torch.Generator().manual_seed(3)
    xs = [torch.randn(n, 3, generator=chance, dtype=torch.float64) for n in (20, 30, 50)]
    true = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    ys = [x @ true + 0.1 * torch.randn(len(x), 1, generator=chance) + 4 for x in xs]
    stacked = torch.cat([torch.cat(xs), torch.ones(100, 1)], dim=1)
    solution = torch.linalg.lstsq(stacked, torch.cat(ys)).solution.squeeze()

    def build(config: ConfigRecord, context: Context) -> nn.Module:
        return nn.Linear(3, 1).double()

    def part(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        partition = int(context.node_config["partition-id"])
        return xs[partition], ys[partition]

    def train(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        x, y = part(context)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.3 * parameter.grad
        return {"num-examples": len(x), "loss": loss.item()}

    def evaluate(model: nn.Module, config: ConfigRecord, context: Context) -> dict[str, float]:
        x, y = part(context)
        with torch.no_grad():
            loss = nn.functional.mse_loss(model(x), y).item()
        return {"num-examples": len(x), "loss": loss}

    grid = LocalGrid(torch_client_app(build, train, evaluate), 3)
    result, _ = run(
        grid,
        FedAvg(),
        start=to_arrays(nn.Linear(3, 1).double()),
        num_rounds=40,
        seed=0,
        guard=Guard(min_replies=3),
    )

    model = nn.Linear(3, 1).double()
    load_arrays(model, result.arrays)
    fitted = torch.cat([model.weight.squeeze(), model.bias]).detach()
    torch.testing.assert_close(fitted, solution, rtol=0, atol=1e-6)
    residual = (stacked @ solution - torch.cat(ys).squeeze()).pow(2).mean().item()
    assert result.evaluate_metrics_clientapp[40]["loss"] == pytest.approx(residual, abs=1e-6)
