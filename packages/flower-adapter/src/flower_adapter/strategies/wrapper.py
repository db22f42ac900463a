"""A strategy that hands every call to another: the base of the wrappers."""

import logging
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

# Flower's own logger, so that warnings appear where the strategy's lines do.
logger = logging.getLogger("flwr")


class Wrapper(Strategy):
    """`strategy` unchanged. `start` is Flower's own and calls the methods of the wrapper."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()


def weight_key(strategy: Strategy) -> str:
    """The metric that `strategy`, or the innermost one it wraps, weights replies by."""
    inner: object = strategy
    while inner is not None:
        key = getattr(inner, "weighted_by_key", None)
        if isinstance(key, str):
            return key
        inner = getattr(inner, "strategy", None)
    return "num-examples"
