"""A grid that runs ClientApps in this process."""

import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class LocalGrid(Grid):
    """Runs `app` for each message on nodes of random id; replies come in random order.

    A ClientApp without a function for a message raises ValueError; it becomes an error reply with
    the text that Flower's deployment gives it. Anything else that an app raises fails the test.
    """

    def __init__(self, app: ClientApp, num_nodes: int, seed: int = 0, run_id: int = 1) -> None:
        self.app = app
        self.run_id = run_id
        self.waiting: dict[str, Message] = {}
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

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        replies = [self.reply(message) for message in messages]
        self.chance.shuffle(replies)
        self.waiting = {reply.metadata.reply_to_message_id: reply for reply in replies}
        return list(self.waiting)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.waiting.pop(message_id) for message_id in list(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def reply(self, message: Message) -> Message:
        self.sent.append(message)
        message.metadata.__dict__["_message_id"] = str(uuid4())
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except ValueError as err:
            return Message(Error(2, f"{type(err)}:<'{err}'>"), reply_to=message)

    @property
    def run(self) -> Run:
        return SimpleNamespace(run_id=self.run_id)  # type: ignore[return-value]

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError
