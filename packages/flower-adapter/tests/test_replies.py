import weakref
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from grids import Clock, Slow, data, good, record, run, scripted

from flower_adapter import RoundFailed
from flower_adapter.server import replies
from flower_adapter.server.replies import ReplyStore, receive
from flower_adapter.testing import LocalGrid

# Receiving


def queries(grid: LocalGrid) -> list[Message]:
    return [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]


class Counting(Slow):
    """Counts how many of its replies are alive when another one is pulled."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__(num_nodes)
        self.pulled: list[weakref.ref[Message]] = []
        self.most_alive = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        self.pulled += map(weakref.ref, found)
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.pulled))
        return found


def test_replies_are_pulled_one_at_a_time_as_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Clock(monkeypatch)
    grid = Counting(9)
    arriving = receive(grid, queries(grid), None)
    seen = [next(arriving)[0]]
    assert len(grid.sent) == 9
    assert len(grid.pulled) == 1
    for node, reply in arriving:
        assert isinstance(reply, Message)
        assert reply.metadata.src_node_id == node
        seen.append(node)
        del reply
    assert sorted(seen) == sorted(grid.get_node_ids())
    assert grid.most_alive == 1


def test_a_reply_that_was_handed_over_is_kept_by_nobody_else() -> None:
    grid = scripted(good(), good())
    arriving = receive(grid, queries(grid), None)
    _, reply = next(arriving)
    is_alive = weakref.ref(reply)
    del reply
    assert is_alive() is None


def test_replies_end_at_the_timeout_with_those_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    grid = Slow(4, never=[1, 3])
    found = list(receive(grid, queries(grid), 30.0))
    assert {grid.partition(node) for node, _ in found} == {0, 2}
    assert clock.now == pytest.approx(30.0)


def test_without_a_timeout_the_last_reply_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class Late(Slow):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return super().pull_messages(message_ids if clock.now > 10_000 else [])

    grid = Late(3)
    assert len(list(receive(grid, queries(grid), None))) == 3
    assert clock.now > 10_000


def test_the_wait_between_two_looks_is_a_fraction_of_the_time_since_the_last_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    grid = Slow(2, never=[0, 1])
    list(receive(grid, queries(grid), 3600.0))
    waited = np.cumsum([0.0, *clock.sleeps[:-1]])  # the last wait is cut off by the timeout
    expected = np.clip(0.02 * waited, 0.05, 1.0)
    assert clock.sleeps[:-1] == pytest.approx(expected[:-1])
    assert max(clock.sleeps) == 1.0
    clock.sleeps.clear()
    grid = Slow(3, never=[0])  # the second node answers at the second look, the third at the third
    list(receive(grid, queries(grid), 100.0))
    assert clock.sleeps[:4] == [0.05] * 4


def test_replies_that_came_in_time_are_not_lost_to_a_slow_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    grid = scripted(*[good()] * 4)
    count = 0
    for _ in receive(grid, queries(grid), 100.0):
        count += 1
        clock.now += 60.0
    assert count == 4


def test_with_a_timeout_of_zero_there_is_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    grid = Slow(3)
    assert len(list(receive(grid, queries(grid), 0.0))) == 1  # that of partition 0
    assert clock.sleeps == []


def test_nothing_to_send_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert list(receive(scripted(good()), [], None)) == []
    assert clock.sleeps == []


# Keeping

DTYPES = ["bool", "int8", "uint64", "float16", "float32", "float64", "complex64"]


def reply(**arrays: Any) -> Message:
    """Return a reply with these arrays, a compressed one, and other records."""
    chosen = record(**arrays)
    chosen["packed"] = Array("float32", (8, 9), "flower-adapter/2-bit/2", b"\x01\xfe" * 9)
    content = RecordDict(
        {
            "arrays": chosen,
            "metrics": MetricRecord({"num-examples": 2, "losses": [0.5, 0.25]}),
            "client": ConfigRecord({"label": "a"}),
            "more": record(x=np.arange(3)),
        }
    )
    return Message(content, reply_to=Message(RecordDict(), 5, "train"))


def size(message: Message) -> int:
    arrays = [r for r in message.content.values() if isinstance(r, ArrayRecord)]
    return sum(len(array.data) for record in arrays for array in record.values())


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Return the temporary files that stores make, all in `tmp_path`."""
    made: list[Any] = []

    def temporary_file(buffering: int) -> Any:
        made.append(TemporaryFile(buffering=buffering, dir=tmp_path))  # noqa: SIM115
        return made[-1]

    monkeypatch.setattr(replies, "TemporaryFile", temporary_file)
    return made


def alike(found: Message, expected: Message) -> bool:
    """Tell whether two replies hold the same records, and each array the same five fields."""
    return found.content == expected.content and found.metadata == expected.metadata


@pytest.mark.parametrize("memory", [0, 10**9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reply_comes_back_with_the_same_bytes(memory: int, dtype: str, files: list[Any]) -> None:
    chance = np.random.default_rng(1)
    arrays = {
        "a": (9 * chance.normal(size=(3, 4))).astype(dtype),
        "empty": np.zeros((0, 3), dtype),
        "scalar": np.array(1, dtype),
        "fortran": np.asfortranarray(np.ones((2, 3), dtype)),
    }
    with ReplyStore(memory, 10**9) as store:
        message = reply(**arrays)
        message.metadata.__dict__["_message_id"] = "1"
        expected = reply(**arrays)
        expected.metadata.__dict__.update(message.metadata.__dict__)
        kept = store.keep(message)
        found = kept.load()
    assert alike(found, expected)
    assert [*found.content["arrays"]] == ["a", "empty", "scalar", "fortran", "packed"]
    assert found.content["arrays"]["packed"].stype == "flower-adapter/2-bit/2"
    assert data(found.content["arrays"]) == data(expected.content["arrays"])
    assert len(files) == (1 if memory == 0 else 0)


@pytest.mark.parametrize("memory", [0, 10**9])
def test_a_loaded_reply_may_be_changed_and_loaded_again(memory: int) -> None:
    with ReplyStore(memory, 10**9) as store:
        kept = store.keep(reply(w=np.ones(3)))
        first = kept.load()
        first.content["arrays"].clear()
        del first.content["metrics"]
        first.content["more"]["x"] = Array(np.zeros(7))
        second = kept.load()
    assert second.content["arrays"]["w"].numpy().tolist() == [1.0, 1.0, 1.0]
    assert second.content["more"]["x"].numpy().tolist() == [0, 1, 2]
    assert "metrics" in second.content


def test_the_first_replies_stay_in_memory_and_those_beyond_the_budget_go_to_a_file(
    files: list[Any],
) -> None:
    messages = [reply(w=np.full(1000, k)) for k in range(5)]
    each = size(messages[0])
    with ReplyStore(memory=2 * each + each // 4, disk=10**9) as store:
        kept = []
        for number, message in enumerate(messages, start=1):
            kept.append(store.keep(message))
            assert len(files) == (0 if number <= 2 else 1)
        [file] = files
        small = each - len(Array(np.full(1000, 0)).data)
        assert 3 * each - 3 * small <= file.seek(0, 2) <= 3 * each
        for k in (4, 0, 3, 1, 2):  # in any order
            assert kept[k].load().content["arrays"]["w"].numpy().tolist() == [k] * 1000


def test_a_reply_in_the_file_takes_no_memory() -> None:
    with ReplyStore(0, 10**9) as store:
        message = reply(w=np.ones(1000))
        array = weakref.ref(message.content.array_records["arrays"]["w"])
        kept = store.keep(message)
        assert array() is None
        loaded = kept.load()
        array = weakref.ref(loaded.content["arrays"]["w"])
        del loaded
        assert array() is None


def test_the_file_is_deleted_at_the_end(files: list[Any], tmp_path: Path) -> None:
    with ReplyStore(0, 10**9) as store:
        store.keep(reply(w=np.ones(3)))
        assert not files[0].closed
    assert files[0].closed
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_made_for_replies_without_arrays(files: list[Any]) -> None:
    metrics = RecordDict({"m": MetricRecord({"num-examples": 1})})
    with ReplyStore(0, 10**9) as store:
        kept = store.keep(Message(metrics, reply_to=Message(RecordDict(), 5, "evaluate")))
        assert kept.load().content == metrics
    assert not files


def test_the_file_is_deleted_when_the_strategy_fails_too(files: list[Any], tmp_path: Path) -> None:
    class Failing(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            assert not files[0].closed
            raise RuntimeError("no average")

    with pytest.raises(RoundFailed, match="RuntimeError: no average"):
        run(scripted(good(), good()), Failing(), reply_memory=0)
    assert [file.closed for file in files] == [True]
    assert list(tmp_path.iterdir()) == []
