"""One seed, one run: nodes are sampled and replies are summed in an order that is not chance.

Flower gives nodes new random ids in every run, samples them with the global, unseeded `random`,
and hands over replies in the order of their arrival, in which floats add up differently. Clients
made by `torch_client_app` have a label that is the same in every run; here it decides the order.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from flower_adapter.label import LABEL_QUERY, label_of
from flower_adapter.strategies.grid import GridView
from flower_adapter.strategies.wrapper import Wrapper, logger

LABEL_TIMEOUT = 600.0  # seconds

Configure = Callable[[int, ArrayRecord, ConfigRecord, Grid], Iterable[Message]]


class Seeded(Wrapper):
    """`strategy`, with node sampling and summation order decided by `seed` and client labels.

    Replies reach the strategy sorted by the label they carry: each waits until those before it are
    there, and in the first round, when labels are new, all wait for the last. While the strategy
    chooses nodes, the global `random` is seeded from seed, round and phase, and put back
    afterwards, and the grid lists nodes by label. Labels are asked for with one query to each node,
    and only once the strategy leaves out a node; the strategy then chooses again. Nodes without a
    label come last, by id, and nodes that share one go by id: a warning says that this is not
    reproducible.

    Reproducible means the same for the same set of connected nodes. numpy's and torch's random
    state, and so the noise of Flower's differential privacy, are not touched.
    """

    def __init__(self, strategy: Strategy, *, seed: int) -> None:
        super().__init__(strategy)
        self.seed = seed
        self._labels: dict[int, str | None] = {}
        self._sent_to: list[int] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._configure("train", super().configure_train, server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, self._in_order(replies))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._configure(
            "evaluate", super().configure_evaluate, server_round, arrays, config, grid
        )

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return super().aggregate_evaluate(server_round, self._in_order(replies))

    def _configure(
        self,
        phase: str,
        configure: Configure,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> list[Message]:
        def choose() -> list[Message]:
            global_state = random.getstate()
            random.seed(f"{self.seed}-{server_round}-{phase}")
            try:
                return list(configure(server_round, arrays, config, _Ordered(grid, self._order)))
            finally:
                random.setstate(global_state)

        messages = choose()
        chosen = {message.metadata.dst_node_id for message in messages}
        nodes = set(grid.get_node_ids())
        unknown = nodes - self._labels.keys()
        if chosen and unknown and nodes - chosen:
            self._ask(sorted(unknown), grid)
            messages = choose()
        self._sent_to = [message.metadata.dst_node_id for message in messages]
        return messages

    def _ask(self, nodes: list[int], grid: Grid) -> None:
        queries = [Message(RecordDict(), node, LABEL_QUERY) for node in nodes]
        self._labels.update(dict.fromkeys(nodes))
        for reply in grid.send_and_receive(queries, timeout=LABEL_TIMEOUT):
            self._labels[reply.metadata.src_node_id] = label_of(reply)
        _warn_of_chance(self._labels)

    def _order(self, node: int) -> tuple[bool, str, int]:
        label = self._labels.get(node)
        return label is None, label or "", node

    def _in_order(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Replies by label; where all labels are known, each as soon as its turn comes."""
        known = all(self._labels.get(node) is not None for node in self._sent_to)
        order = sorted(self._sent_to, key=self._order) if known else []
        waiting: dict[int, list[Message]] = {}
        for reply in replies:
            waiting.setdefault(reply.metadata.src_node_id, []).append(reply)
            while order and waiting.get(order[0]):
                yield waiting[order.pop(0)].pop(0)
        rest = [reply for replies in waiting.values() for reply in replies]
        waiting.clear()
        self._learn(reply for reply in rest if not reply.has_error())
        rest.sort(key=lambda reply: self._order(reply.metadata.src_node_id), reverse=True)
        while rest:
            yield rest.pop()

    def _learn(self, replies: Iterable[Message]) -> None:
        labels = {reply.metadata.src_node_id: label_of(reply) for reply in replies}
        if len(labels) > 1:
            _warn_of_chance(labels)
        self._labels.update({node: label for node, label in labels.items() if label is not None})


def _warn_of_chance(labels: dict[int, str | None]) -> None:
    unlabelled = [node for node, label in labels.items() if label is None]
    if unlabelled:
        logger.warning("no label from nodes %s: their order is not reproducible", unlabelled)
    for label, count in Counter(labels.values()).items():
        if label is not None and count > 1:
            logger.warning("%d nodes share the label %r: not reproducible", count, label)


class _Ordered(GridView):
    """A view of `grid` that lists its nodes in the order of `key`."""

    def __init__(self, grid: Grid, key: Callable[[int], tuple[bool, str, int]]) -> None:
        super().__init__(grid)
        self._key = key

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.grid.get_node_ids(), key=self._key)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return sorted(self.grid.get_nodes(), key=lambda node: self._key(node.node_id))
