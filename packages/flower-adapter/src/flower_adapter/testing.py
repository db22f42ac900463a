"""Test a ClientApp and a strategy in milliseconds, with a federation in one process.

    from flower_adapter import run_rounds, to_arrays, torch_client_app
    from flower_adapter.testing import LocalGrid

    grid = LocalGrid(torch_client_app(build_model, train), num_nodes=3)
    result = run_rounds(grid, FedAvg(fraction_evaluate=0.0), to_arrays(model), num_rounds=2)

Flower's processes, ports and serialization are not used.
"""

import copy
import random
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from flower_adapter._flwr import ErrorCode, Run, become_a_server, set_message_id


class LocalGrid(Grid):
    """A grid that runs a ClientApp for each message, in this process.

    Like Flower's simulation, it gives each node a random id, the node config "partition-id" and
    "num-partitions", and a context that lasts as long as the grid. Replies come in random order. If
    the ClientApp raises ValueError, the reply is an error reply with the same text as in Flower's
    deployment. Any other exception is raised where the server sends the message. There `run_rounds`
    fails the round, or without a guard raises it to the test.

    In Flower, only the process of a ServerApp can make messages. The first grid therefore gives
    this process the identity of a ServerApp.

    Args:
        client_app: the ClientApp of every node.
        num_nodes: number of nodes.
        run_config: the run config in each node's context.
        node_config: more values for the node config of every node.
        seed: the seed for the node ids and the order of the replies.
        run_id: id of the run.

    Attributes:
        contexts: the context of each node, by node id.
        sent: every message, in the order of sending.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        *,
        run_config: Mapping[str, Any] | None = None,
        node_config: Mapping[str, Any] | None = None,
        seed: int = 0,
        run_id: int = 1,
    ) -> None:
        become_a_server()
        self.client_app = client_app
        self.run_id = run_id
        self.sent: list[Message] = []
        self._chance = random.Random(seed)
        self._replies: dict[str, Message] = {}  # by message id
        self.contexts = {
            node: Context(
                run_id,
                node,
                {
                    **(node_config or {}),
                    "partition-id": partition,
                    "num-partitions": num_nodes,
                },
                RecordDict(),
                dict(run_config or {}),
            )
            for partition, node in enumerate(self._chance.sample(range(1, 10**6), num_nodes))
        }

    def partition(self, node: int) -> int:
        """Return the partition id of a node."""
        return int(self.contexts[node].node_config["partition-id"])

    def node(self, partition: int) -> int:
        """Return the id of the node with this partition id."""
        return next(node for node in self.contexts if self.partition(node) == partition)

    def sent_of_type(self, message_type: str) -> list[Message]:
        """Return the messages of one type, such as "train", in the order of sending."""
        return [m for m in self.sent if m.metadata.message_type == message_type]

    def reply(self, message: Message) -> Message | None:
        """Return the reply to a message.

        A subclass may change the message or the reply. If it returns None, the node does not
        answer.
        """
        try:
            return self.client_app(message, self.contexts[message.metadata.dst_node_id])
        except ValueError as error:
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[str] = []
        replies: list[Message] = []
        for message in messages:
            set_message_id(message, str(uuid4()))
            # A strategy gives the same content to all messages. Each client gets its own copy.
            message.content = _copied(message.content)
            self.sent.append(copy.copy(message))
            self.sent[-1].content = _copied(message.content)
            ids.append(message.metadata.message_id)
            reply = self.reply(message)
            if reply is not None:
                replies.append(reply)
        self._chance.shuffle(replies)
        arrived = {reply.metadata.reply_to_message_id: reply for reply in replies}
        self._replies.update(arrived)
        return [*arrived, *(message_id for message_id in ids if message_id not in arrived)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        there = [message_id for message_id in message_ids if message_id in self._replies]
        return [self._replies.pop(message_id) for message_id in there]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    @property
    def run(self) -> Run:
        return SimpleNamespace(run_id=self.run_id)  # type: ignore[return-value]

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError


def _copied(content: RecordDict) -> RecordDict:
    """Return new records with the same arrays and values."""
    return RecordDict({key: type(record)(dict(record)) for key, record in content.items()})  # type: ignore[arg-type]
