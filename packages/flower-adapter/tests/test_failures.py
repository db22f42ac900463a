"""Exceptions inside a round, and the limits on what clients can fill."""

import errno
import hashlib
import hmac
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAvg, FedAvgM
from grids import (
    Answer,
    Answering,
    Clock,
    data,
    good,
    moved,
    reasons,
    run,
    scripted,
    values,
    warnings_of,
    with_arrays,
)

from flower_adapter import (
    Checkpoints,
    Guard,
    OuterOptimizer,
    RoundFailed,
    RoundRecord,
    StreamingFedAvg,
)
from flower_adapter.printable import shown
from flower_adapter.protocol import (
    ATTEMPTS,
    CLIENT,
    END_QUERY,
    KEEPS_STATE,
    LABEL,
    LABEL_QUERY,
    MIN_REPLIES,
    RUN,
)
from flower_adapter.server.checkpoints import read_checkpoint
from flower_adapter.server.record import MOST_LEFT_OUT, LeftOut, forget_left_out
from flower_adapter.server.replies import ReplyStore

FAILING = 2  # the round in which something fails
ERRORS = [
    ValueError("ill"),
    KeyError("ill"),
    MemoryError("ill"),
    RecursionError("ill"),
    OSError(28, "ill"),
]


class Breaking(FedAvg):
    """Raises an exception in one round, in the method that `broken` names."""

    def __init__(self, broken: str, error: BaseException) -> None:
        super().__init__(min_available_nodes=1)
        self.broken, self.error = broken, error

    def _break(self, method: str, server_round: int) -> None:
        if (method, server_round) == (self.broken, FAILING):
            raise self.error

    def configure_train(self, server_round: int, *arguments: Any) -> Iterable[Message]:
        self._break("configure_train", server_round)
        return super().configure_train(server_round, *arguments)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        self._break("aggregate_train", server_round)
        return super().aggregate_train(server_round, replies)

    def configure_evaluate(self, server_round: int, *arguments: Any) -> Iterable[Message]:
        self._break("configure_evaluate", server_round)
        return super().configure_evaluate(server_round, *arguments)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
        self._break("aggregate_evaluate", server_round)
        return super().aggregate_evaluate(server_round, replies)


PHASES = {
    "configure_train": "train",
    "aggregate_train": "train",
    "configure_evaluate": "evaluate",
    "aggregate_evaluate": "evaluate",
    "evaluate_fn": "server-evaluate",
    "on_round": "on-round",
    "push train": "train",
    "push evaluate": "evaluate",
}


class BreakingGrid(Answering):
    """Raises an exception when messages of one phase and round are pushed."""

    def __init__(self, broken: str, error: BaseException) -> None:
        super().__init__(lambda message, _: good(1.0 if message else 0.0), 3)
        self.broken, self.error = broken, error
        self.now = ("", 0)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            metadata = message.metadata
            self.now = (metadata.message_type, int(message.content["config"]["server-round"]))
        if self.now[1] == FAILING and self.broken == f"push {self.now[0]}":
            raise self.error
        return super().push_messages(messages)


def broken_run(broken: str, error: BaseException, num_rounds: int = 3, **options: Any) -> Any:
    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if broken == "evaluate_fn" and server_round == FAILING:
            raise error
        return MetricRecord({"val-loss": 0.5})

    def on_round(record: RoundRecord) -> None:
        if broken == "on_round" and record.server_round == FAILING:
            raise error

    grid, strategy = BreakingGrid(broken, error), Breaking(broken, error)
    arguments = {"evaluate_fn": evaluate_fn, "on_round": on_round, **options}
    return run(grid, strategy, num_rounds=num_rounds, **arguments)


@pytest.mark.parametrize("broken", PHASES)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_exception_anywhere_in_a_round_fails_the_round_and_not_the_run(
    broken: str, error: Exception, flower_log: pytest.LogCaptureFixture
) -> None:
    result, records = broken_run(broken, error)
    assert values(result.arrays)["w"] == [1.0, 1.0]
    assert [record.failures for record in records[:FAILING]] == [[], []]
    assert records[FAILING].failures == [f"{PHASES[broken]}: {type(error).__name__}: {error}"]
    assert not records[3].failures
    phase = PHASES[broken]
    assert (records[FAILING].train_metrics is None) == (phase == "train")
    assert (records[FAILING].evaluate_metrics is None) == (phase == "evaluate")
    assert (records[FAILING].server_metrics is None) == (phase == "server-evaluate")
    assert f"{phase} round {FAILING} has failed" in flower_log.text
    assert "Traceback" in flower_log.text


@pytest.mark.parametrize("broken", PHASES)
def test_too_many_exceptions_in_a_row_end_the_run_and_the_last_one_is_the_cause(
    broken: str,
) -> None:
    error = ArithmeticError("ill")
    with pytest.raises(RoundFailed, match="round 2: ArithmeticError: ill") as caught:
        broken_run(broken, error, guard=Guard(max_failed_rounds=1))
    assert caught.value.phase == PHASES[broken]
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("broken", PHASES)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_run_at_once(broken: str, kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        broken_run(broken, kind())


@pytest.mark.parametrize("broken", PHASES)
def test_without_a_guard_an_exception_ends_the_run(broken: str) -> None:
    with pytest.raises(KeyError, match="ill"):
        broken_run(broken, KeyError("ill"), guard=None)


def test_a_report_of_the_last_round_that_fails_ends_the_run() -> None:
    with pytest.raises(RoundFailed, match="on-round round 2: OSError"):
        broken_run("on_round", OSError("disk full"), num_rounds=2)


def test_an_exception_before_the_first_round_ends_the_run_at_once() -> None:
    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        raise KeyError("ill")

    with pytest.raises(KeyError, match="ill"):
        run(scripted(good()), evaluate_fn=evaluate_fn)


@pytest.mark.parametrize("build", [FedAvgM, FedAdagrad], ids=["FedAvgM", "FedAdagrad"])
def test_a_failed_training_leaves_the_strategy_and_the_outer_optimizer_as_they_were(
    build: Callable[..., FedAvg],
) -> None:
    """A run with a failed second round gives the same bits as a run without this round."""

    class Failing(build):  # type: ignore[misc, valid-type]
        rounds = 0
        fails = True

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            arrays = super().aggregate_train(server_round, replies)  # changes the state
            self.rounds += 1
            if self.fails and self.rounds == FAILING:
                raise ValueError("ill")
            return arrays

        def state_dict(self) -> dict[str, Any]:
            names = ("current_arrays", "momentum_vector", "m_t", "v_t")
            return {name: vars(self)[name] for name in names if name in vars(self)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            vars(self).update(state)

    def outcome(fails: bool) -> dict[str, bytes]:
        def answer(message: Message, partition: int) -> Answer:
            [arrays] = message.content.array_records.values()
            return with_arrays(w=arrays["w"].numpy() * np.float32(0.5) + np.float32(partition + 1))

        strategy = Failing(fraction_evaluate=0.0)
        strategy.fails = fails
        outer = OuterOptimizer(learning_rate=0.5, momentum=0.9)
        result, _ = run(Answering(answer, 2), strategy, num_rounds=3 + fails, outer=outer)
        return data(result.arrays)

    assert outcome(fails=True) == outcome(fails=False)


def test_without_checkpoints_a_strategy_needs_no_state_dict() -> None:
    class Counting(FedAvg):
        calls = 0

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            self.calls += 1
            return super().aggregate_train(server_round, replies)

    strategy = Counting(fraction_evaluate=0.0)
    run(scripted(good(), good()), strategy, num_rounds=2)
    assert strategy.calls == 2


# Checkpoints that cannot be written


def full_in(rounds: set[int], monkeypatch: pytest.MonkeyPatch) -> OSError:
    """Let the disk be full for the checkpoints of these rounds."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write = Checkpoints.write

    def checked(self: Checkpoints, checkpoint: Any) -> None:
        if checkpoint.server_round in rounds:
            raise full
        write(self, checkpoint)

    monkeypatch.setattr(Checkpoints, "write", checked)
    return full


def labelled(*labels: str) -> Answering:
    return scripted(*(good(1.0, label) for label in labels))


def test_a_run_outlives_a_full_disk_and_writes_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flower_log: pytest.LogCaptureFixture
) -> None:
    full_in({2, 3}, monkeypatch)
    _, records = run(labelled("a", "b"), num_rounds=4, checkpoints=Checkpoints(tmp_path, keep=9))
    message = "checkpoint: OSError: [Errno 28] No space left on device"
    assert [record.failures for record in records] == [[], [], [message], [message], []]
    assert sorted(path.name for path in tmp_path.glob("round-*")) == [
        "round-000000",
        "round-000001",
        "round-000004",
    ]
    saved = read_checkpoint(tmp_path)
    assert [record.failures for record in saved.records] == [[], [], [message], [message], []]
    expected = "run fails after 3 such rounds in a row, this is number 1"
    full_in({5}, monkeypatch)
    checkpoints = Checkpoints(tmp_path, keep=9, resume=True)
    run(labelled("a", "b"), num_rounds=6, checkpoints=checkpoints)
    assert expected in warnings_of(flower_log)[-1]


def test_a_run_whose_last_checkpoint_cannot_be_written_does_not_end_as_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = full_in({3}, monkeypatch)
    reported: list[RoundRecord] = []
    with pytest.raises(RoundFailed, match="checkpoint round 3") as caught:
        run(
            labelled("a", "b"),
            num_rounds=3,
            checkpoints=Checkpoints(tmp_path),
            on_round=reported.append,
        )
    assert caught.value.__cause__ is full
    assert [record.server_round for record in reported] == [0, 1, 2, 3]
    assert read_checkpoint(tmp_path).server_round == 2


# What clients are told


class Keeping(Answering):
    """Clients with labels. They say that they keep a state on disk, except the last one."""

    def __init__(self, num_nodes: int, *, seed: int = 0) -> None:
        def answer(message: Message, partition: int) -> Answer:
            content = good(1.0, f"client {partition}")
            if partition < num_nodes - 1:
                content[CLIENT][KEEPS_STATE] = True
            return content

        super().__init__(answer, num_nodes, seed=seed)

    def configs(self, message_type: str) -> dict[int, list[dict[str, Any]]]:
        """Return the configs of the messages of one type, by partition."""
        found: dict[int, list[dict[str, Any]]] = {}
        for message in self.sent_of_type(message_type):
            partition = self.partition(message.metadata.dst_node_id)
            found.setdefault(partition, []).append(dict(message.content["config"]))
        return found


def token_of(directory: Path, label: str) -> str:
    key = bytes.fromhex(read_checkpoint(directory).secret)
    return hmac.new(key, label.encode(), hashlib.sha256).hexdigest()


def test_each_client_gets_its_own_token_in_every_message(tmp_path: Path) -> None:
    grid = Keeping(3)
    run(grid, FedAvg(), num_rounds=2, checkpoints=Checkpoints(tmp_path))
    assert len(grid.sent_of_type(LABEL_QUERY)) == 3
    for kind in ("train", "evaluate"):
        for partition, configs in grid.configs(kind).items():
            assert [config[RUN] for config in configs] == [
                token_of(tmp_path, f"client {partition}")
            ] * 2
            assert all(ATTEMPTS not in config for config in configs)
    assert len({configs[0][RUN] for configs in grid.configs("train").values()}) == 3


def test_a_resumed_run_has_the_same_tokens_and_another_run_has_others(tmp_path: Path) -> None:
    def tokens(directory: Path, **options: Any) -> dict[int, str]:
        grid = Keeping(2, seed=len(options))
        run(grid, checkpoints=Checkpoints(tmp_path / directory, **options), num_rounds=2)
        return {partition: config[0][RUN] for partition, config in grid.configs("train").items()}

    run(Keeping(2), checkpoints=Checkpoints(tmp_path / "a"))
    first = {k: token_of(tmp_path / "a", f"client {k}") for k in range(2)}
    assert tokens(Path("a"), resume=True) == first
    assert not set(tokens(Path("b")).values()) & set(first.values())


def test_the_secret_and_the_tokens_are_in_no_log_and_in_no_other_file(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    run(Keeping(2), checkpoints=Checkpoints(tmp_path))
    hidden = [read_checkpoint(tmp_path).secret, token_of(tmp_path, "client 0")]
    for path in tmp_path.rglob("round-*/*"):
        found = [text for text in hidden if text.encode() in path.read_bytes()]
        assert found == (hidden[:1] if path.name == "state.safetensors" else [])
    assert not any(text in flower_log.text for text in hidden)


def test_a_client_without_a_label_and_a_run_without_checkpoints_get_no_token(
    tmp_path: Path,
) -> None:
    grid = scripted(good(), good(1.0, "b"))
    run(grid, checkpoints=Checkpoints(tmp_path))
    tokens = {
        grid.partition(m.metadata.dst_node_id): RUN in m.content["config"]
        for m in grid.sent_of_type("train")
    }
    assert tokens == {0: False, 1: True}
    grid = Keeping(2)
    run(grid)
    assert {message.metadata.message_type for message in grid.sent} == {"train"}
    assert not any(RUN in message.content["config"] for message in grid.sent)


@pytest.mark.parametrize(("guard", "least"), [(Guard(min_replies=2), 2), (Guard(), 1), (None, 1)])
def test_each_message_says_how_many_replies_the_mean_needs(guard: Guard | None, least: int) -> None:
    grid = Keeping(3)
    run(grid, FedAvg(), guard=guard)
    assert [m.content["config"][MIN_REPLIES] for m in grid.sent] == [least] * 6


def test_the_end_of_the_run_is_told_to_each_client_that_keeps_a_state(tmp_path: Path) -> None:
    grid = Keeping(3)
    run(grid, FedAvg(), checkpoints=Checkpoints(tmp_path))
    assert grid.sent[-1].metadata.message_type == END_QUERY
    assert grid.configs(END_QUERY) == {
        k: [{RUN: token_of(tmp_path, f"client {k}")}] for k in range(2)
    }


def test_an_error_at_the_end_of_the_run_does_not_fail_it(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    class Ending(Keeping):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            if messages and messages[0].metadata.message_type == END_QUERY:
                raise ConnectionError("gone")
            return super().push_messages(messages)

    result, _ = run(Ending(3), checkpoints=Checkpoints(tmp_path))
    assert values(result.arrays)["w"] == [1.0, 1.0]
    assert "not every client knows that the run has ended" in flower_log.text


def test_a_failed_run_is_not_said_to_have_ended(tmp_path: Path) -> None:
    grid = Keeping(3)
    with pytest.raises(RoundFailed):
        run(grid, checkpoints=Checkpoints(tmp_path), guard=Guard(min_replies=4))
    assert not grid.sent_of_type(END_QUERY)


# What clients say


HOSTILE = "a\x1b[2Jb\r\nLEFT OUT of train\u202e\u200b\x00" + "x" * 10**6


def test_a_reason_and_a_label_of_a_client_are_one_short_printable_line(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    grid = scripted(good(), Error(2, HOSTILE), good(float("nan"), HOSTILE))
    _, [_, first] = run(grid)
    assert reasons(grid, first)[1].startswith(r"a\x1b[2Jb\r\nLEFT OUT of train\u202e\u200b\x00xxx")
    for left_out in first.left_out:
        assert len(left_out.reason) <= 500
        assert left_out.reason.isprintable()
        assert left_out.label is None or (
            len(left_out.label) <= 100 and left_out.label.isprintable()
        )
    assert "\x1b[2J" not in flower_log.text
    assert "\u202e" not in flower_log.text


@pytest.mark.parametrize("text", ["plain", "Käse 日本", "", "x" * 500])
def test_a_harmless_text_is_shown_as_it_is(text: str) -> None:
    assert shown(text, 500) == text


def test_a_text_is_cut_after_it_is_escaped() -> None:
    assert shown("\x00" * 500, 100) == (r"\x00" * 25)[:99] + "…"
    assert shown("\ud800\n", 100) == r"\ud800\n"


def test_the_records_keep_the_newest_entries_and_the_count_of_all() -> None:
    records = [
        RoundRecord(at, left_out=[LeftOut("train", k, None, "") for k in range(300)])
        for at in range(6)
    ]
    forget_left_out(records)
    assert [len(record.left_out) for record in records] == [0, 0, 100, 300, 300, 300]
    assert sum(len(record.left_out) for record in records) == MOST_LEFT_OUT


def test_a_record_counts_each_client_that_was_left_out() -> None:
    _, [_, first] = run(scripted(good(), Error(2, "ill"), moved(float("inf"))))
    assert first.num_left_out == len(first.left_out) == 2


def test_other_fields_of_the_record_that_names_a_client_are_not_kept() -> None:
    class Looking(StreamingFedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            self.seen = [dict(reply.content[CLIENT]) for reply in replies]
            return super().aggregate_train(server_round, replies)

    content = good(1.0, "a")
    content[CLIENT]["much"] = b"x" * 10**6
    strategy = Looking(fraction_evaluate=0.0)
    run(scripted(content, good(1.0, "b\n")), strategy)
    assert strategy.seen == [{LABEL: "a"}, {LABEL: r"b\n"}]


# What counts, and how much


def test_a_long_update_is_scaled_to_three_times_the_median_and_said(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    grid = scripted(moved(1.0, "a"), moved(1.0, "b"), moved(30.0, "c"))
    for strategy in (FedAvg, StreamingFedAvg):
        result, [_, first] = run(grid, strategy(fraction_evaluate=0.0))
        expected = (1 + 1 + 3) / 3 * np.array([0.6, -0.8])
        np.testing.assert_allclose(result.arrays["w"].numpy(), expected, rtol=1e-6)
        assert [client.scaled for client in first.train_clients] == pytest.approx([1, 1, 0.1])
        assert [client.update_norm for client in first.train_clients] == pytest.approx([1, 1, 30])
    assert any(
        w.endswith("its update has norm 30, scaled down to 3, 3 times the median")
        for w in warnings_of(flower_log)
    )


def test_a_large_weight_counts_as_ten_times_the_median_and_is_said(
    flower_log: pytest.LogCaptureFixture,
) -> None:
    heavy = good(13.0, "c")
    heavy["metrics"]["num-examples"] = 10**9
    grid = scripted(good(1.0, "a"), good(1.0, "b"), heavy)
    for strategy in (FedAvg, StreamingFedAvg):
        result, [_, first] = run(
            grid, strategy(fraction_evaluate=0.0), guard=Guard(clip_norm_ratio=None)
        )
        assert values(result.arrays)["w"] == pytest.approx([(1 + 1 + 130) / 12] * 2)
        assert [c.reduced_weight for c in first.train_clients] == [None, None, 10]
        assert first.train_clients[2].metrics["num-examples"] == 10**9
    assert any("its weight 1e+09 is reduced to 10" in w for w in warnings_of(flower_log))


def test_a_reply_with_other_metrics_than_most_is_left_out_with_their_names() -> None:
    odd = RecordDict({**good(), "metrics": MetricRecord({"num-examples": 1, "lost": 2.0})})
    grid = scripted(good(1.0), odd, good(3.0))
    result, [_, first] = run(grid)
    assert values(result.arrays)["w"] == [2.0, 2.0]
    assert reasons(grid, first) == {
        1: "differs from most replies: lacks the metric loss, has the metric lost"
    }


@pytest.mark.parametrize("strategy", [FedAvg, StreamingFedAvg])
@pytest.mark.parametrize("key", ["arrays", "metrics"])
def test_a_reply_whose_records_have_other_names_is_left_out(
    key: str, strategy: type[FedAvg]
) -> None:
    renamed = RecordDict({(f"{k}2" if k == key else k): r for k, r in good(9.0, "a").items()})
    grid = scripted(renamed, good(1.0, "b"), good(3.0, "c"))
    result, [_, first] = run(grid, strategy(fraction_evaluate=0.0))
    assert values(result.arrays)["w"] == [2.0, 2.0]
    assert reasons(grid, first) == {
        0: f"differs from most replies: lacks the record {key}, has the record {key}2"
    }


@pytest.mark.parametrize("strategy", [FedAvg, FedAvgM, StreamingFedAvg])
def test_the_order_of_the_arrays_in_a_reply_does_not_matter(strategy: type[FedAvg]) -> None:
    def turned(content: RecordDict) -> RecordDict:
        arrays = ArrayRecord(dict(reversed(content["arrays"].items())))
        return RecordDict({**content, "arrays": arrays})

    def outcome(first: RecordDict) -> dict[str, bytes]:
        grid = scripted(first, good(3.0, "b"))
        result, _ = run(grid, strategy(fraction_evaluate=0.0), num_rounds=2)
        assert list(result.arrays) == ["w", "n"]
        return data(result.arrays)

    assert outcome(turned(good(1.0, "a"))) == outcome(good(1.0, "a"))


class Unreadable(Answering):
    """The reply of partition 1 raises an exception each of the first `times` times.

    As in Flower, a reply that cannot be read is gone. An error of the connection leaves it there.
    """

    def __init__(self, error: Exception, times: int) -> None:
        super().__init__(lambda _, partition: good(1.0 + partition), 3)
        self.error, self.times = error, times

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        message_ids = list(message_ids)
        [message] = [m for m in self.sent if m.metadata.message_id in message_ids]
        if self.partition(message.metadata.dst_node_id) == 1 and self.times > 0:
            self.times -= 1
            if not isinstance(self.error, OSError):
                super().pull_messages(message_ids)
            raise self.error
        return super().pull_messages(message_ids)


@pytest.mark.parametrize(
    "error",
    [error for error in ERRORS if not isinstance(error, OSError)],
    ids=lambda error: type(error).__name__,
)
def test_a_reply_that_flower_cannot_read_is_left_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    grid = Unreadable(error, times=99)
    result, [_, first] = run(grid)
    assert values(result.arrays)["w"] == [2.0, 2.0]
    assert str(error.args[-1]) in reasons(grid, first)[1]
    assert grid.times == 98


def test_a_link_that_fails_for_a_moment_loses_no_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    _, [_, first] = run(Unreadable(ConnectionError("gone"), times=2))
    assert len(first.train_clients) == 3


def test_without_a_guard_a_reply_that_flower_cannot_read_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Clock(monkeypatch)
    with pytest.raises(KeyError, match="ill"):
        run(Unreadable(KeyError("ill"), times=99), guard=None)


def test_a_reply_that_says_it_comes_from_another_node_is_left_out() -> None:
    class Foreign(Answering):
        def reply(self, message: Message) -> Message:
            reply = super().reply(message)
            if self.partition(message.metadata.dst_node_id) == 1:
                reply.metadata.__dict__["_src_node_id"] = 77
            return reply

    grid = Foreign(lambda _, partition: good(1.0 + partition), 2)
    result, [_, first] = run(grid)
    assert values(result.arrays)["w"] == [1.0, 1.0]
    assert reasons(grid, first) == {1: "says that it comes from node 77"}


# The temporary file for replies


def test_a_reply_beyond_the_bound_on_the_disk_is_left_out() -> None:
    size = sum(len(array.data) for array in good()["arrays"].values())
    grid = labelled("a", "b", "c")
    result, [_, first] = run(grid, reply_memory=0, reply_disk=2 * size)
    assert values(result.arrays)["w"] == [1.0, 1.0]
    [left_out] = first.left_out
    assert "replies in the temporary file may take" in left_out.reason
    assert len(first.train_clients) == 2


def test_a_full_disk_leaves_out_the_replies_that_it_cannot_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[int] = []

    def write(file: Any, content: bytes) -> None:
        written.append(len(content))
        if len(written) == 3:  # the second reply
            file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(content)

    monkeypatch.setattr("flower_adapter.server.replies._write", write)
    grid = labelled("a", "b", "c")
    result, [_, first] = run(grid, reply_memory=0)
    assert values(result.arrays)["w"] == [1.0, 1.0]
    [left_out] = first.left_out
    assert left_out.reason.startswith("No space left on device: the temporary file")


def test_an_unbuffered_file_that_writes_and_reads_in_pieces_keeps_every_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Piecewise:
        def __init__(self) -> None:
            self.content, self.at = bytearray(), 0

        def seek(self, offset: int, whence: int = 0) -> int:
            self.at = len(self.content) if whence else offset
            return self.at

        def write(self, content: memoryview) -> int:
            piece = bytes(content[:5])
            self.content[self.at : self.at + len(piece)] = piece
            self.at += len(piece)
            return len(piece)

        def read(self, size: int) -> bytes:
            piece = bytes(self.content[self.at : self.at + min(size, 7)])
            self.at += len(piece)
            return piece

        def close(self) -> None:
            pass

    monkeypatch.setattr(
        "flower_adapter.server.replies.TemporaryFile", lambda buffering: Piecewise()
    )
    arrays = with_arrays(w=np.arange(2, dtype=np.float32))["arrays"]
    message = Message(
        RecordDict({"arrays": ArrayRecord(dict(arrays)), "x": ConfigRecord({"y": 1})}),
        reply_to=Message(RecordDict(), 5, "train"),
    )
    with ReplyStore(0, 10**6) as store:
        kept = store.keep(message)
        assert data(kept.load().content["arrays"]) == data(arrays)
