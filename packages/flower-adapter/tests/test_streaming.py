import gc
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from grids import Answer, Answering, record, run
from numpy.typing import NDArray

from flower_adapter import Compression, OuterOptimizer, StreamingFedAvg, compression_mod
from flower_adapter._flwr import set_message_id
from flower_adapter.protocol import is_compressed
from flower_adapter.server.replies import KeptReply, ReplyStore

Values = dict[str, NDArray[Any]]


class Towards(Answering):
    """Client k moves the arrays a quarter of the way to targets of its own, and weighs k + 1."""

    def __init__(self, targets: list[Values], *, seed: int = 0) -> None:
        super().__init__(self.moved, len(targets), seed=seed)
        self.targets = targets

    def moved(self, message: Message, partition: int) -> Answer:
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


def zeros(goals: list[Values]) -> ArrayRecord:
    return record(**{name: np.zeros_like(goal) for name, goal in goals[0].items()})


def train(strategy: Strategy, goals: list[Values], **arguments: Any) -> Any:
    grid = arguments.pop("grid", None) or Towards(goals)
    return run(grid, strategy, start=zeros(goals), **arguments)[0]


def streaming() -> StreamingFedAvg:
    return StreamingFedAvg(fraction_evaluate=0.0)


def test_streaming_fedavg_is_flowers_fedavg_on_floats() -> None:
    goals = targets(5, a="float32", b="float64", c="complex64")
    streamed = train(streaming(), goals, num_rounds=4)
    plain = FedAvg(fraction_evaluate=0.0).start(Towards(goals), zeros(goals), num_rounds=4)
    for name, array in plain.arrays.items():
        found = streamed.arrays[name].numpy()
        assert found.dtype == goals[0][name].dtype
        np.testing.assert_allclose(found, array.numpy(), rtol=1e-5, atol=1e-6)
    assert set(streamed.train_metrics_clientapp) == {1, 2, 3, 4}
    for at, metrics in plain.train_metrics_clientapp.items():
        assert streamed.train_metrics_clientapp[at] == pytest.approx(dict(metrics))


def test_streaming_fedavg_works_in_flowers_own_loop() -> None:
    goals = targets(5, a="float64")
    streamed = streaming().start(Towards(goals), zeros(goals), num_rounds=3)
    plain = FedAvg(fraction_evaluate=0.0).start(Towards(goals), zeros(goals), num_rounds=3)
    np.testing.assert_allclose(streamed.arrays["a"].numpy(), plain.arrays["a"].numpy(), rtol=1e-12)


@pytest.mark.parametrize("guarded", [True, False])
def test_streaming_fedavg_rounds_integers(guarded: bool) -> None:
    goals = [{"n": np.array(n), "on": np.array(on)} for n, on in ((4, True), (5, False), (6, True))]
    result = train(streaming(), goals, **({} if guarded else {"guard": None}))
    assert result.arrays["n"].numpy() == np.array(5)  # 32 / 6
    assert result.arrays["n"].numpy().dtype == np.int64
    assert result.arrays["on"].numpy() == np.array(True)  # 4 / 6
    assert result.arrays["on"].numpy().dtype == np.bool_


def test_streaming_fedavg_passes_over_errors_as_fedavg_does() -> None:
    class Refusing(Towards):
        def moved(self, message: Message, partition: int) -> Answer:
            return Error(2, "ill") if partition == 1 else super().moved(message, partition)

    goals = targets(4, a="float64")
    streamed = streaming().start(Refusing(goals), zeros(goals), num_rounds=2)
    plain = FedAvg(fraction_evaluate=0.0).start(Refusing(goals), zeros(goals), num_rounds=2)
    np.testing.assert_allclose(streamed.arrays["a"].numpy(), plain.arrays["a"].numpy(), rtol=1e-12)


def test_streaming_fedavg_without_a_good_reply_gives_nothing() -> None:
    assert StreamingFedAvg().aggregate_train(1, []) == (None, None)
    error = Message(Error(2, "ill"), reply_to=Message(RecordDict(), 5, "train"))
    assert StreamingFedAvg().aggregate_train(1, [error]) == (None, None)


def test_a_reply_that_cannot_be_averaged_is_an_error_that_names_the_node() -> None:
    goals: list[Values] = [targets(1, a="float64")[0], {"a": np.zeros((1, 4))}]
    replies = [
        Message(
            RecordDict({"arrays": record(**goal), "m": MetricRecord({"num-examples": 1})}),
            reply_to=Message(RecordDict(), node, "train"),
        )
        for node, goal in zip((7, 8), goals, strict=True)
    ]
    with pytest.raises(ValueError, match=r"node 8: a is float64 \(1, 4\)"):
        StreamingFedAvg().aggregate_train(1, replies)


def test_metrics_are_aggregated_by_the_function_of_fedavg() -> None:
    def largest(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        assert weighted_by == "num-examples"
        assert not any(len(arrays) for c in contents for arrays in c.array_records.values())
        losses = [m["loss"] for c in contents for m in c.metric_records.values()]
        return MetricRecord({"largest": max(losses)})

    strategy = StreamingFedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=largest)
    result = train(strategy, targets(3, a="float32"))
    assert result.train_metrics_clientapp == {1: {"largest": 2.0}}


# Memory


class Alive:
    """Counts how many of the replies that it was shown are alive, and remembers the most.

    An object that only waits for the garbage collector counts as alive.
    """

    def __init__(self) -> None:
        self.most = 0
        self._shown: list[list[weakref.ref[Array]]] = []

    def show(self, arrays: Iterable[Array]) -> None:
        self._shown.append([weakref.ref(array) for array in arrays])
        alive = sum(any(ref() is not None for ref in reply) for reply in self._shown)
        self.most = max(self.most, alive)

    @property
    def count(self) -> int:
        return len(self._shown)


class Pulled(Towards):
    """Makes each reply when it is pulled."""

    def __init__(self, targets: list[Values]) -> None:
        super().__init__(targets)
        self.alive = Alive()
        self.asked: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for number, message in enumerate(messages):
            set_message_id(message, f"{number}")
            self.asked[f"{number}"] = message
        return list(self.asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            reply = self.reply(self.asked.pop(message_id))
            self.alive.show(reply.content["arrays"].values())
            yield reply
            del reply


@pytest.mark.parametrize("outer", [None, OuterOptimizer()], ids=["alone", "outer"])
def test_at_most_one_reply_is_in_memory_while_replies_arrive_if_they_are_kept_in_a_file(
    outer: OuterOptimizer | None,
) -> None:
    goals = targets(20, a="float32", n="int64")
    grid = Pulled(goals)
    train(streaming(), goals, grid=grid, num_rounds=2, outer=outer, reply_memory=0)
    assert grid.alive.count == 40
    assert grid.alive.most == 1


def test_replies_within_the_budget_stay_in_memory() -> None:
    goals = targets(20, a="float32")
    grid = Pulled(goals)
    train(streaming(), goals, grid=grid)
    assert grid.alive.most == 20


def loaded_in(strategy: Strategy, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Alive:
    """Train with replies in a file, and return how many were alive after each was loaded."""
    alive = Alive()
    load = KeptReply.load

    def watched(kept: KeptReply) -> Message:
        reply = load(kept)
        alive.show(reply.content["arrays"].values())
        return reply

    monkeypatch.setattr(KeptReply, "load", watched)
    train(strategy, targets(20, a="float32", n="int64"), num_rounds=2, reply_memory=0, **arguments)
    assert alive.count == 40
    return alive


def test_streaming_fedavg_holds_one_reply_from_the_file_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert loaded_in(streaming(), monkeypatch).most == 1


def test_fedavg_of_flower_holds_all_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    # Flower's strategies leave replies in cycles, which only the garbage collector frees.
    alive = loaded_in(FedAvg(fraction_evaluate=0.0), monkeypatch, on_round=lambda _: gc.collect())
    assert alive.most == 20


class Counting(Compression):
    """Watches the arrays that it has decoded."""

    def __init__(self, **codecs: str) -> None:
        super().__init__(**codecs)
        self.alive = Alive()

    def decode(self, arrays: ArrayRecord) -> ArrayRecord:
        decoded = super().decode(arrays)
        encoded = {name for name, array in arrays.items() if is_compressed(array.stype)}
        assert encoded == {"a", "b"}
        self.alive.show(decoded[name] for name in encoded)
        return decoded


class Coded(Towards):
    """Clients with `compression_mod`."""

    def reply(self, message: Message) -> Message:
        context = self.contexts[message.metadata.dst_node_id]
        return compression_mod(message, context, lambda m, _: super(Coded, self).reply(m))


@pytest.mark.parametrize("memory", [0, 2**30])
def test_kept_replies_stay_encoded_and_one_decoded_reply_is_alive_at_a_time(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    goals = targets(12, a="float32", b="float64", n="int64")
    kept: list[KeptReply] = []
    keep = ReplyStore.keep

    def watched(store: ReplyStore, reply: Message) -> KeptReply:
        kept.append(keep(store, reply))
        arrays = kept[-1].load().content["arrays"]
        assert [is_compressed(arrays[name].stype) for name in "abn"] == [True, True, False]
        return kept[-1]

    monkeypatch.setattr(ReplyStore, "keep", watched)
    compression = Counting(uplink="int8", downlink="fp32")
    train(
        streaming(),
        goals,
        grid=Coded(goals),
        compression=compression,
        reply_memory=memory,
    )
    assert len(kept) == 12
    assert compression.alive.count == 24  # once to check the reply, once to average it
    assert compression.alive.most == 1
