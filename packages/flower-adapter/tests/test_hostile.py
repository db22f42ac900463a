"""A client may send anything. Its replies travel through Flower's own serialization.

In each case three clients are sound and one sends what Hypothesis draws. The run must not end, and
the mean must be that of the sound clients, or lie within the guard's bounds if the reply counts.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from grids import Answer, Answering, good, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flower_adapter import Compression, StreamingFedAvg
from flower_adapter.protocol import CLIENT, COMPRESSION, KEEPS_STATE, LABEL
from flower_adapter.server.nodes import Nodes

SOUND = (1.0, 2.0, 3.0)  # the values that the sound clients send
HOSTILE = len(SOUND)  # the partition of the other client
COUNTS: Counter[str] = Counter()  # how many replies were left out, or counted


class Still:
    """Stands in for `time` where replies are awaited. Its clock moves when somebody waits."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True, scope="module")
def no_waiting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flower_adapter.server.replies.time", Still())
        yield
    print(f"\nreplies: {dict(COUNTS)}")


class Travelling(Answering):
    """Replies travel as the objects into which Flower divides a message.

    `change` may change the objects of the reply of the hostile client.
    """

    def __init__(self, hostile: Answer, change: Any = None) -> None:
        def answer(message: Message, partition: int) -> Answer:
            return hostile if partition == HOSTILE else good(SOUND[partition], f"{partition}")

        super().__init__(answer, HOSTILE + 1)
        self.change = change

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.travelled(reply) for reply in super().pull_messages(message_ids)]

    def travelled(self, reply: Message) -> Message:
        is_hostile = self.partition(reply.metadata.src_node_id) == HOSTILE
        objects = get_all_nested_objects(reply)
        contents = {name: object.deflate() for name, object in objects.items()}
        if is_hostile and self.change is not None:
            contents = self.change(contents)
        found = inflate_object_from_contents(reply.object_id, contents)
        assert isinstance(found, Message)
        return found

    def reply(self, message: Message) -> Message:
        is_train = message.metadata.message_type == "train"
        if is_train or self.partition(message.metadata.dst_node_id) != HOSTILE:
            return super().reply(message)
        answer = self.answer(message, HOSTILE)  # an evaluate reply may hold arrays here
        return Message(answer, reply_to=message)


texts = st.text(max_size=30) | st.sampled_from(
    ["", "\x1b[2J", "a\nb", "\u202e", "\x00", "x" * 10_000, "num-examples", "loss", "arrays"]
)
integers = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, -1, 2**53, 2**53 + 1, 2**62])
floats = st.floats() | st.sampled_from([1e300, 5e-324, -0.0, 1.7e308, 0.5, 1e101])
numbers = integers | floats
lists = (
    st.lists(integers, max_size=5)
    | st.lists(floats, max_size=5)
    | st.sampled_from([[1.0] * 5000, []])
)
metric_values = numbers | lists
config_values = (
    st.booleans() | numbers | texts | st.binary(max_size=20) | lists | st.lists(texts, max_size=3)
)
names = st.sampled_from(["w", "n", "x", "", "w\x00"])
dtypes = st.sampled_from(["float32", "float64", "int64", "float16", "object", "V0", "", "|V0"])
stypes = st.sampled_from(
    ["numpy.ndarray", "", "torch", "pickle"]
    + [f"flower-adapter/{name}/2" for name in ("2-bit", "int8", "fp32", "top-k:1e-300", "x")]
    + ["flower-adapter/2-bit/9", "flower-adapter/", "flower-adapter/top-k:/2"]
)
shapes = st.lists(st.integers(0, 3) | st.integers(-(2**62), 2**62), max_size=4).map(tuple)


@st.composite
def values(draw: st.DrawFn) -> bytes:
    """Return bytes in numpy's format, often with a changed header or of another array."""
    dtype = draw(st.sampled_from([np.float32, np.float64, np.int64, np.int8]))
    length = draw(st.sampled_from([None, 0, 1, 2, 3, 7]))
    value = draw(st.sampled_from([0, 1, 100]))
    array = np.full(() if length is None else length, value, dtype)
    if draw(st.booleans()) and array.size and array.dtype.kind == "f":
        array.flat[0] = draw(st.sampled_from([np.nan, np.inf, 1e30, -1e4]))
    data = bytearray(Array(array).data)
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(data) - 1))
        data[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
        data = data or bytearray(b"\x93")
    return bytes(data)


arrays = st.builds(Array, dtypes, shapes, stypes, values() | st.binary(max_size=40))
usual_w = st.builds(Array, st.just("float32"), st.just((2,)), stypes, values())
usual_n = st.builds(Array, st.just("int64"), st.just(()), st.just("numpy.ndarray"), values())


@st.composite
def array_records(draw: st.DrawFn) -> ArrayRecord:
    record = ArrayRecord({"w": draw(usual_w | arrays), "n": draw(usual_n | arrays)})
    if draw(st.integers(0, 3)) == 0:
        record[draw(names)] = draw(arrays)
    if draw(st.integers(0, 5)) == 0:
        record.pop(draw(st.sampled_from(["w", "n"])), None)
    return ArrayRecord(dict(draw(st.permutations([*record.items()]))))


@st.composite
def metric_records(draw: st.DrawFn) -> MetricRecord:
    usual = st.sampled_from([{"num-examples": 1, "loss": 2.0}, {"num-examples": 1.0, "loss": 2}])
    record = dict(draw(usual))
    record.update(draw(st.dictionaries(st.sampled_from([*record]), metric_values, max_size=2)))
    record.update(draw(st.dictionaries(texts, metric_values, max_size=2)))
    for name in draw(st.sets(st.sampled_from(["num-examples", "loss"]), max_size=1)):
        record.pop(name, None)
    if draw(st.integers(0, 20)) == 0:
        record.update({f"m{k}": 0.5 for k in range(200)})
    return MetricRecord(record)


client_records = st.dictionaries(
    st.sampled_from([LABEL, KEEPS_STATE, "more"]), config_values, max_size=3
).map(ConfigRecord)
headers = st.dictionaries(
    st.sampled_from(["format", "downlink", "uplink", "base", "version"]),
    config_values | st.just(1),
).map(ConfigRecord)
records = (
    array_records() | metric_records() | st.dictionaries(texts, config_values).map(ConfigRecord)
)


@st.composite
def contents(draw: st.DrawFn) -> RecordDict:
    """Return the content of a reply. Each of its parts is sound in half of the cases."""
    content = good(2.0)
    for key, part in (
        ("arrays", array_records()),
        ("metrics", metric_records()),
        (CLIENT, client_records),
        (COMPRESSION, headers),
    ):
        if draw(st.booleans()):
            content[key] = draw(part)
    for key in draw(st.sets(st.sampled_from(["arrays", "metrics"]), max_size=1)):
        if draw(st.booleans()):
            del content[key]
    if draw(st.integers(0, 3)) == 0:
        content.update(draw(st.dictionaries(texts, records, max_size=1)))
    for key in draw(st.sets(st.sampled_from([*content]), max_size=1)):
        content[draw(texts)] = content.pop(key)
    return content


errors = st.builds(Error, st.integers(0, 300), st.none() | texts)


def check(
    hostile: Answer, change: Any = None, *, compression: bool = False, streaming: bool = False
) -> None:
    """Run a round with this reply, and check what became of the mean."""
    grid = Travelling(hostile, change)
    strategy = (StreamingFedAvg if streaming else FedAvg)(min_available_nodes=1)
    result, [_, record] = run(
        grid,
        strategy,
        timeout=60.0,
        compression=Compression(uplink="2-bit", downlink="bf16") if compression else None,
    )
    assert not record.failures
    assert record.train_metrics is not None
    assert record.evaluate_metrics is not None
    mean = result.arrays["w"].numpy()
    counted = {grid.partition(client.node) for client in record.train_clients}
    assert {0, 1, 2} <= counted
    if HOSTILE in counted:
        COUNTS["counted"] += 1
        # It moves by three times the median at most, and weighs ten times as much at most.
        assert np.abs(mean).max() <= 3 * 3.0 * np.sqrt(2) + 1e-5
    else:
        COUNTS["left out"] += 1
        [reason] = [
            c.reason for c in record.left_out if (c.phase, c.node) == ("train", grid.node(HOSTILE))
        ]
        assert 0 < len(reason) <= 500
        assert reason.isprintable()
        np.testing.assert_array_equal(mean, np.full(2, 2.0, np.float32))
    for client in (*record.train_clients, *record.evaluate_clients, *record.left_out):
        assert client.label is None or (len(client.label) <= 100 and client.label.isprintable())
    assert np.isfinite(list(record.evaluate_metrics.values())).all()

    nodes = Nodes(grid, 1, timeout=60.0)
    nodes.ask(grid.get_node_ids())
    assert [nodes.label(grid.node(k)) for k in range(3)] == ["0", "1", "2"]


FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True
)
MANY = settings(max_examples=1000, deadline=None, suppress_health_check=[*HealthCheck])
amounts = pytest.mark.parametrize(
    "amount", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)


def bits(seed: int) -> Any:
    """Return a function that changes the bytes of one object of a message, or several."""

    def change(contents: dict[str, bytes]) -> dict[str, bytes]:
        chance = random.Random(seed)
        for _ in range(chance.randint(1, 3)):
            name = chance.choice([*contents])
            data = bytearray(contents[name])
            place = chance.randrange(len(data)) if data else 0
            kind = chance.randrange(5)
            if kind == 0 and data:
                data[place] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del data[place:]
            elif kind == 2:
                del data[place : place + chance.randint(1, 8)]
            elif kind == 3:
                data[place:place] = chance.randbytes(chance.randint(1, 8))
            else:
                words = [b"null", b"[]", b"{}", b'"x"', b"1e999", b"[" * 2000, b"-1", b"\xff"]
                data[place : place + chance.randint(0, 8)] = chance.choice(words)
            contents[name] = bytes(data)
        return contents

    return change


def any_content(hostile: Answer, compression: bool, streaming: bool) -> None:
    check(hostile, compression=compression, streaming=streaming)


def any_bytes(seed: int, compression: bool) -> None:
    check(good(2.0, "3"), bits(seed), compression=compression)


@pytest.mark.parametrize(
    "amount", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_no_content_of_a_reply_ends_a_run(amount: settings) -> None:
    amount(given(contents() | errors, st.booleans(), st.booleans())(any_content))()


@pytest.mark.parametrize(
    "amount", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_no_change_of_the_bytes_of_a_reply_ends_a_run(amount: settings) -> None:
    amount(given(st.integers(0, 2**32), st.booleans())(any_bytes))()


@pytest.mark.parametrize(
    "amount", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_no_array_of_a_reply_ends_a_run(amount: settings) -> None:
    def any_arrays(hostile: ArrayRecord, compression: bool) -> None:
        check(RecordDict({**good(2.0, "3"), "arrays": hostile}), compression=compression)

    amount(given(array_records(), st.booleans())(any_arrays))()


@pytest.mark.parametrize(
    "amount", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_no_metrics_of_a_reply_end_a_run(amount: settings) -> None:
    def any_metrics(hostile: MetricRecord, streaming: bool) -> None:
        check(RecordDict({**good(2.0, "3"), "metrics": hostile}), streaming=streaming)

    amount(given(metric_records(), st.booleans())(any_metrics))()
