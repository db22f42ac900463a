"""Changes to an honest reply, from which the faults of group B are made."""

import ast
import hashlib
import math
import random
from collections.abc import Callable, Container
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord
from numpy.typing import NDArray

from faults.wire import Answer, Parcel, WireGrid, packed
from flower_adapter import protocol
from flower_adapter._flwr import ErrorCode

ANY_ROUND = range(1, 1000)
Change = Callable[[Message], Any]  # changes a reply in place, or returns another one
MAGIC = b"\x93NUMPY\x01\x00"  # format 1.0


def arrays_of(reply: Message) -> ArrayRecord:
    """Return the only ArrayRecord of a reply."""
    [record] = reply.content.array_records.values()
    return record


def metrics_of(reply: Message) -> MetricRecord:
    """Return the only MetricRecord of a reply."""
    [record] = reply.content.metric_records.values()
    return record


def first(reply: Message) -> Array:
    """Return the first array of a reply."""
    return next(iter(arrays_of(reply).values()))


def header_and_values(data: bytes) -> tuple[bytes, bytes]:
    """Divide the bytes of a npy file, format 1.0, into its header and its values."""
    start = 10 + int.from_bytes(data[8:10], "little")
    return data[10:start], data[start:]


def npy(header: bytes, values: bytes) -> bytes:
    """Return the bytes of a npy file, format 1.0."""
    return MAGIC + len(header).to_bytes(2, "little") + header + values


def with_header(header: bytes) -> Change:
    """Replace the npy header of the first array."""

    def change(reply: Message) -> None:
        array = first(reply)
        array.data = npy(header, header_and_values(array.data)[1])

    return change


def with_mutated_header(chance: random.Random) -> Change:
    """Replace some bytes of the first array's npy header, so that it says something else."""

    def change(reply: Message) -> None:
        array = first(reply)
        header, values = header_and_values(array.data)
        meaning = _meaning(header)
        mutated = bytearray(header)
        while _meaning(bytes(mutated)) == meaning:
            for _ in range(chance.randint(1, 4)):
                mutated[chance.randrange(len(mutated))] = chance.randrange(256)
        array.data = npy(bytes(mutated), values)

    return change


def _meaning(header: bytes) -> object:
    """Return what Python reads in a header, or None if it cannot read it."""
    try:
        return ast.literal_eval(header.decode("latin-1"))
    except Exception:  # a header can make Python's parser fail in many ways
        return None


def with_array(**fields: Any) -> Change:
    """Let the first array declare something else than it holds, or hold something else."""

    def change(reply: Message) -> None:
        for name, value in fields.items():
            setattr(first(reply), name, value)

    return change


def with_values(change_values: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    """Change the values of all arrays."""

    def change(reply: Message) -> None:
        record = arrays_of(reply)
        for name, array in list(record.items()):
            record[name] = Array(change_values(array.numpy()))

    return change


def with_metrics(**values: Any) -> Change:
    """Change metrics. None removes one. The names have "_" in place of "-"."""

    def change(reply: Message) -> None:
        record = metrics_of(reply)
        for key, value in values.items():
            name = key.replace("_", "-")
            if value is None:
                del record[name]
            else:
                record[name] = value

    return change


def with_label(label: Any) -> Change:
    """Change the label."""

    def change(reply: Message) -> None:
        reply.content[protocol.CLIENT][protocol.LABEL] = label

    return change


def from_node(node: int) -> Change:
    """Write another node id into the metadata of the reply.

    The SuperLink checks the metadata that travel beside the reply. The server reads those in it.
    """

    def change(reply: Message) -> None:
        reply.metadata.__dict__["_src_node_id"] = node

    return change


def with_body(kind: str, body: bytes) -> Change:
    """Replace the body of the first object of a class, such as "MetricRecord".

    All ids follow, so that the SuperLink and Flower's pull find nothing wrong.
    """

    def change(reply: Message) -> Parcel:
        parcel = packed(reply)
        old = next(i for i, content in parcel.objects.items() if content.startswith(kind.encode()))
        renamed: dict[str, str] = {}  # old id to new id, children first
        objects = {}
        for object_id, content in parcel.objects.items():
            head, _, own = content.partition(b"\x00")
            fields = head.split(b" ")
            if object_id == old:
                own = body
            for before, after in renamed.items():
                fields[1] = fields[1].replace(before.encode(), after.encode())
                own = own.replace(before.encode(), after.encode())
            fields[2] = str(len(own)).encode()
            content = b" ".join(fields) + b"\x00" + own
            renamed[object_id] = hashlib.sha256(content).hexdigest()
            objects[renamed[object_id]] = content
        return Parcel(renamed[parcel.object_id], objects)

    return change


def longer(grid: WireGrid, reply: Message, times: float) -> None:
    """Make the update in a reply longer: the difference to the global arrays that were sent."""
    sent = next(
        message
        for _, message in reversed(grid.sent)
        if message.metadata.message_id == reply.metadata.reply_to_message_id
    )
    before, record = arrays_of(sent), arrays_of(reply)
    for name, array in list(record.items()):
        base = before[name].numpy()
        record[name] = Array((base + times * (array.numpy() - base)).astype(base.dtype))


def lengthened(numbers: set[int], times: float) -> Answer:
    """Return an answer in which some clients send a longer update."""

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        if number in numbers and message.metadata.message_type == "train":
            longer(grid, reply, times)
        return reply

    return answer


def norm(values: dict[str, NDArray[Any]]) -> float:
    """Return the L2 norm over all arrays."""
    return math.sqrt(sum(float(np.square(v.astype(np.float64)).sum()) for v in values.values()))


def refusing(numbers: Container[int], reason: str, *, rounds: Container[int] = ANY_ROUND) -> Answer:
    """Return an answer in which some clients answer train messages with an error."""

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        server_round = protocol.config_of(message).get(protocol.SERVER_ROUND)
        is_train = message.metadata.message_type == "train"
        if number not in numbers or not is_train or server_round not in rounds:
            return reply
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    return answer


def silent(numbers: Container[int], message_type: str = "") -> Answer:
    """Return an answer in which some clients do not answer messages of a type, or any message."""

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message | None:
        is_meant = message.metadata.message_type.startswith(message_type)
        return None if number in numbers and is_meant else reply

    return answer
