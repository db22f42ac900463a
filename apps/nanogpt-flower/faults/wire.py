"""A federation in one process. Each message and each reply passes through Flower's serialization.

Flower sends a message as objects: the message, its records, arrays and chunks, each with the
SHA-256 of its bytes as its id. The receiver puts the objects together again. The grid here does the
same with Flower's own functions, so a client and the server get what the network would deliver. The
server reads the metadata of a reply from these objects, so a client can write anything there.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from flower_adapter import protocol
from flower_adapter._flwr import ErrorCode, Run, become_a_server, set_message_id

Objects = dict[str, bytes]  # by object id


@dataclass
class Parcel:
    """A message on its way: the id of its first object, and all its objects."""

    object_id: str
    objects: Objects


# A client's answer to a message: it gets the honest reply and returns what is sent instead. None
# sends nothing.
Answer = Callable[["WireGrid", int, Message, Message], "Message | Parcel | None"]


@dataclass
class Client:
    """A SuperNode: its app, and the node config that its operator has given it."""

    app: ClientApp
    node_config: dict[str, Any]
    contexts: dict[int, Context] = field(default_factory=dict)  # by run id
    label: str | None = None  # from its honest replies

    def handle(self, parcel: Parcel, run_id: int, run_config: Mapping[str, Any]) -> Message:
        """Answer a message as a `flwr-clientapp` process does."""
        message = unpacked(parcel)
        node = message.metadata.dst_node_id
        fresh = Context(run_id, node, dict(self.node_config), RecordDict(), dict(run_config))
        context = context_from_proto(context_to_proto(self.contexts.get(run_id, fresh)))
        try:
            reply = self.app(message, context)
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        self.contexts[run_id] = context
        self.label = protocol.label_of(reply) or self.label
        return reply


def honest(grid: "WireGrid", number: int, message: Message, reply: Message) -> Message:
    """Return the honest reply."""
    return reply


class WireGrid(Grid):
    """A grid over some clients, by their numbers.

    Args:
        clients: the clients by number. A client has the same node id in every grid.
        run_config: the run config that the clients get.
        answer: what each client sends, see `Answer`.
        delay: seconds until the reply of a client can be pulled, by number.
        run_id: id of the run.

    Attributes:
        sent: every message of the server, in the order of sending, with the client's number.
    """

    def __init__(
        self,
        clients: Mapping[int, Client],
        run_config: Mapping[str, Any],
        *,
        answer: Answer = honest,
        delay: Mapping[int, float] | None = None,
        run_id: int = 1,
    ) -> None:
        become_a_server()
        self.clients = dict(clients)
        self.run_config = dict(run_config)
        self.answer = answer
        self.delay = dict(delay or {})
        self.run_id = run_id
        self.sent: list[tuple[int, Message]] = []
        self._replies: dict[str, tuple[float, Parcel]] = {}  # by message id: when, and what
        self._order = random.Random(run_id)

    def number(self, node: int) -> int:
        """Return the number of the client with this node id."""
        return next(number for number in self.clients if node_id(number) == node)

    def messages(self, message_type: str) -> list[tuple[int, Message]]:
        """Return the sent messages of one type, such as "train", each with the client's number."""
        return [(n, m) for n, m in self.sent if m.metadata.message_type == message_type]

    def get_node_ids(self) -> Iterable[int]:
        return [node_id(number) for number in self.clients]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids, replies = [], []
        for message in messages:
            number = self.number(message.metadata.dst_node_id)
            parcel = packed(message)
            self.sent.append((number, unpacked(parcel)))
            ids.append(parcel.object_id)
            reply = self.clients[number].handle(parcel, self.run_id, self.run_config)
            answer = self.answer(self, number, self.sent[-1][1], reply)
            if answer is not None:
                there_at = time.monotonic() + self.delay.get(number, 0.0)
                replies.append((parcel.object_id, (there_at, as_parcel(answer))))
        self._order.shuffle(replies)
        self._replies.update(replies)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        now = time.monotonic()
        wanted = set(message_ids)
        there = [i for i, (at, _) in self._replies.items() if i in wanted and at <= now]
        # As in Flower, a reply that was pulled is gone, even if it cannot be put together.
        return [unpacked(parcel) for _, parcel in [self._replies.pop(found) for found in there]]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        until = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while len(replies) < len(ids) and time.monotonic() < until:
            replies += self.pull_messages(ids)
            time.sleep(0.01)
        return replies

    @property
    def run(self) -> Run:
        return SimpleNamespace(run_id=self.run_id)  # type: ignore[return-value]

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError


def node_id(number: int) -> int:
    """Return the node id of a client. As in Flower, it does not follow the number."""
    return random.Random(f"node {number}").getrandbits(63)


def as_parcel(answer: Message | Parcel) -> Parcel:
    """Return an answer as a parcel."""
    return answer if isinstance(answer, Parcel) else packed(answer)


def packed(message: Message) -> Parcel:
    """Turn a message into objects, and set its id."""
    objects = {name: found.deflate() for name, found in get_all_nested_objects(message).items()}
    set_message_id(message, message.object_id)
    return Parcel(message.object_id, objects)


def unpacked(parcel: Parcel) -> Message:
    """Put a message together from its objects."""
    message = inflate_object_from_contents(parcel.object_id, dict(parcel.objects))
    assert isinstance(message, Message)
    set_message_id(message, parcel.object_id)
    return message


def ask(
    client: Client,
    message_type: str,
    content: RecordDict,
    *,
    number: int,
    run_config: Mapping[str, Any],
    run_id: int,
) -> Message:
    """Send one message to a client in a run of its own, and return the reply."""
    become_a_server()
    parcel = packed(Message(content, node_id(number), message_type))
    return unpacked(packed(client.handle(parcel, run_id, run_config)))


def only(numbers: Sequence[int], change: Callable[[Message], Any]) -> Answer:
    """Return an answer in which some clients change their train replies.

    The function `change` changes the reply in place or returns another one.
    """

    def answer(
        grid: WireGrid, number: int, message: Message, reply: Message
    ) -> Message | Parcel | None:
        if number not in numbers or message.metadata.message_type != "train" or reply.has_error():
            return reply
        changed = change(reply)
        return reply if changed is None else changed

    return answer
