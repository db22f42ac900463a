"""A strategy that hands every call to another: the base of the wrappers."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from flower_adapter.strategies.grid import StreamingGrid

# Flower's own logger, so that warnings appear where the strategy's lines do.
logger = logging.getLogger("flwr")

W = TypeVar("W", bound="Wrapper")


class Wrapper(Strategy):
    """`strategy` unchanged, but that replies reach it one by one, as they come.

    `start` is Flower's own and calls the methods of the outermost wrapper.
    """

    streams = True  # takes replies from an iterator

    outermost = False  # must not be wrapped

    def __init__(self, strategy: Strategy) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(f"strategy is {strategy!r}, should be one of Flower's or a wrapper")
        if getattr(strategy, "outermost", False):
            name = type(strategy).__name__
            raise ValueError(f"{name} must be the outermost wrapper: its start makes the rounds")
        self.strategy = strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self.strategy.aggregate_train(server_round, self._for_strategy(replies))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, self._for_strategy(replies))

    def summary(self) -> None:
        self.strategy.summary()

    def _for_strategy(self, replies: Iterable[Message]) -> Iterable[Message]:
        """Flower's own strategies may go through the replies twice, so they get a list."""
        return replies if getattr(self.strategy, "streams", False) else list(replies)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Flower's `start`; all arguments are its own."""
        self.begin(num_rounds)
        return super().start(
            StreamingGrid(grid),
            initial_arrays,
            num_rounds,
            timeout,
            train_config,
            evaluate_config,
            evaluate_fn,
        )

    def begin(self, num_rounds: int) -> None:
        """Told to every wrapper before the first round, from the outside in."""
        for inner in chain(self.strategy):
            if isinstance(inner, Wrapper):
                inner.begin(num_rounds)
                return

    def received(self, reply: Message) -> Message:
        """`reply` as the client's handler made it, which a wrapper inside may have to unpack."""
        for inner in chain(self.strategy):
            if isinstance(inner, Wrapper):
                return inner.received(reply)
        return reply

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this wrapper, but not of what it wraps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


def chain(strategy: object) -> Iterator[object]:
    """`strategy` and what it wraps, from the outside in: ours, and Flower's for privacy."""
    inner: object = strategy
    while inner is not None:
        yield inner
        inner = getattr(inner, "strategy", None)


def empty(reply: Message) -> None:
    """Let go of the arrays of a reply that has been used.

    Views of a message's content refer to themselves and so hold its records until the next garbage
    collection, which counts objects and not how large they are.
    """
    if reply.has_content():
        for record in reply.content.values():
            if isinstance(record, ArrayRecord):
                record.clear()


def weight_key(strategy: Strategy) -> str:
    """The metric that `strategy`, or the innermost one it wraps, weights replies by."""
    for inner in chain(strategy):
        key = getattr(inner, "weighted_by_key", None)
        if isinstance(key, str):
            return key
    return "num-examples"
