"""Choose the nodes of a round. A seed and the labels of the nodes decide the choice."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from flower_adapter import protocol
from flower_adapter.printable import shown
from flower_adapter.server.record import LONGEST_LABEL
from flower_adapter.server.replies import receive

LABEL_TIMEOUT = 600.0  # seconds, the longest wait for labels
END_TIMEOUT = 30.0  # seconds, the longest wait for the answers at the end of the run

logger = logging.getLogger("flwr")

Configure = Callable[[Grid], Iterable[Message]]


class Nodes:
    """The labels of all nodes in a run, and the choice of nodes for each phase.

    Flower gives nodes new random ids in every run. It samples nodes with Python's global random
    generator, and sets no seed. The clients of `torch_client_app` can have a label that is the same
    in every run. If `seed` is given, nodes are sorted by label before the strategy samples, so that
    the same seed gives the same sample. Replies are always sorted by label before the strategy
    averages. Nodes without a label come last, in the order of their ids.
    """

    def __init__(self, grid: Grid, seed: int | None, timeout: float | None = None) -> None:
        self._grid = grid
        self._seed = seed
        self._timeout = LABEL_TIMEOUT if timeout is None else min(timeout, LABEL_TIMEOUT)
        self._labels: dict[int, str | None] = {}

    def label(self, node: int) -> str | None:
        """Return the label of a node, or None if the node has not sent a label."""
        return self._labels.get(node)

    def order(self, node: int) -> tuple[bool, str, int]:
        """Return the key that sorts nodes by label."""
        label = self._labels.get(node)
        return label is None, label or "", node

    def learn(self, labels: Mapping[int, str | None]) -> None:
        """Store the labels from replies. With a seed, warn if labels are missing or equal.

        The first label of a node counts, so a client cannot take another place later.
        """
        labels = {
            node: self._labels.get(node) or (shown(label, LONGEST_LABEL) if label else None)
            for node, label in labels.items()
        }
        self._labels.update({node: label for node, label in labels.items() if label is not None})
        if self._seed is not None and len(labels) > 1:
            _warn_of_missing_labels(labels)

    def choose(self, configure: Configure, name: str) -> list[Message]:
        """Let the strategy choose nodes, and return its messages.

        With a seed, Python's global random generator is seeded with the seed and `name` before the
        choice, and gets its old state back afterwards. A choice that leaves out some nodes depends
        on the labels of all nodes. In this case, each node without a known label is asked for its
        label, once in a run, and the strategy chooses again.
        """
        if self._seed is None:
            return list(configure(self._grid))
        messages = self._seeded(configure, name)
        chosen = {message.metadata.dst_node_id for message in messages}
        nodes = set(self._grid.get_node_ids())
        unknown = nodes - self._labels.keys()
        if chosen and unknown and nodes - chosen:
            self.ask(unknown)
            messages = self._seeded(configure, name)
        return messages

    def ask(self, nodes: Iterable[int]) -> None:
        """Ask each of the nodes for its label, unless it was asked before or its label is known."""
        asked = sorted(set(nodes) - self._labels.keys())
        if not asked:
            return
        queries = [Message(RecordDict(), node, protocol.LABEL_QUERY) for node in asked]
        answers: dict[int, str | None] = dict.fromkeys(asked)
        self._labels.update(answers)
        for node, reply in receive(self._grid, queries, self._timeout):
            if isinstance(reply, Message):
                answers[node] = protocol.label_of(reply)
        self.learn(answers)

    def end(self, tokens: Mapping[int, str]) -> None:
        """Tell each node that the run with its token has ended, and wait briefly for the answers.

        The run is complete without the answers. An exception is therefore only logged.
        """
        try:
            queries = [
                Message(
                    RecordDict({"config": ConfigRecord({protocol.RUN: token})}),
                    node,
                    protocol.END_QUERY,
                )
                for node, token in sorted(tokens.items())
            ]
            for _ in receive(self._grid, queries, END_TIMEOUT):
                pass
        except Exception:
            logger.warning("not every client knows that the run has ended", exc_info=True)

    def _seeded(self, configure: Configure, name: str) -> list[Message]:
        state = random.getstate()
        random.seed(f"{self._seed}-{name}")
        try:
            return list(configure(cast(Grid, _SortedGrid(self._grid, self.order))))
        finally:
            random.setstate(state)


def _warn_of_missing_labels(labels: Mapping[int, str | None]) -> None:
    unlabelled = sorted(node for node, label in labels.items() if label is None)
    if unlabelled:
        logger.warning("no label from nodes %s: their order is not reproducible", unlabelled)
    for label, count in Counter(labels.values()).items():
        if label is not None and count > 1:
            logger.warning(
                "%d nodes share the label %r: their order is not reproducible", count, label
            )


class _SortedGrid:
    """A grid that lists its nodes in a given order."""

    def __init__(self, grid: Grid, key: Callable[[int], Any]) -> None:
        self._grid = grid
        self._key = key

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self._grid.get_node_ids(), key=self._key)

    def get_nodes(self) -> Iterable[Any]:
        return sorted(self._grid.get_nodes(), key=lambda node: self._key(node.node_id))
