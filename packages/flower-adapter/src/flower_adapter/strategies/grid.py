"""A grid whose replies come one by one, as an iterator, instead of all together in a list."""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

SHORTEST_WAIT, LONGEST_WAIT = 0.05, 1.0  # seconds between two looks for replies


class GridView(Grid):
    """`grid`, unchanged: the base of grids that change something."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    @property
    def run(self) -> Run:
        return self.grid.run

    def set_run(self, run: Run) -> None:
        self.grid.set_run(run)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.grid.send_and_receive(messages, timeout=timeout)


class StreamingGrid(GridView):
    """`grid` whose `send_and_receive` sends at once and pulls replies as they are asked for.

    Replies are pulled singly, so that no more of them are in memory than the strategy keeps.
    """

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        pending = list(self.push_messages(messages))
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        return self._replies(pending, deadline)

    def _replies(self, pending: list[str], deadline: float) -> Iterator[Message]:
        wait = SHORTEST_WAIT
        while pending:
            # Before looking: what came in time is found, however long the caller took.
            is_late = time.monotonic() >= deadline
            found = False
            for message_id in list(pending):
                replies = list(self.pull_messages([message_id]))
                if replies:
                    pending.remove(message_id)
                    found = True
                while replies:
                    yield replies.pop()  # and hold it no longer
            if is_late:
                return
            wait = SHORTEST_WAIT if found else min(2 * wait, LONGEST_WAIT)
            if pending:
                time.sleep(max(0.0, min(wait, deadline - time.monotonic())))
