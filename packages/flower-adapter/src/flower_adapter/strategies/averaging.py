"""FedAvg that keeps no replies, and the outer optimizer of DiLoCo."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from flwr.serverapp.strategy.strategy_utils import validate_message_reply_consistency

from flower_adapter import npy
from flower_adapter.average import Average
from flower_adapter.strategies.grid import StreamingGrid
from flower_adapter.strategies.wrapper import Wrapper, empty, logger


class StreamingFedAvg(FedAvg):
    """Flower's `FedAvg`, which folds each reply into the average as it comes.

    In memory are the average and one reply, however many clients there are. Arguments are those of
    `FedAvg`. Replies are emptied of their arrays, so the functions that aggregate metrics get none.
    Integer and bool arrays are rounded instead of becoming floats.

    Raises:
        ValueError: from `aggregate_train`, a reply has other names, shapes or dtypes than the one
            before or a weight that is not positive; the node is named. `Guarded` drops such replies
            instead.
    """

    streams = True

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        average = Average()
        contents: list[RecordDict] = []
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                logger.info("\t> Received error in reply from node %d: %s", node, reply.error)
                continue
            content = reply.content
            validate_message_reply_consistency([content], self.weighted_by_key, True)
            [arrays], [metrics] = content.array_records.values(), content.metric_records.values()
            try:
                average.add(arrays, float(metrics[self.weighted_by_key]))  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"node {node}: {error}") from error
            empty(reply)
            contents.append(content)
            del reply, content, arrays, metrics
        logger.info("aggregate_train: averaged %d results", len(contents))
        if not contents:
            return None, None
        validate_message_reply_consistency(contents, self.weighted_by_key, False)
        return average.result(), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """Flower's `start`, with replies that come one by one."""
        return super().start(StreamingGrid(grid), *args, **kwargs)


class OuterOptimizer(Wrapper):
    """Nesterov momentum on the update that `strategy` aggregates: DiLoCo (arXiv 2311.08105).

    With w the global arrays, d = (what `strategy` made of the replies) - w, and v = 0 at first:
    v <- momentum v + d; w <- w + learning_rate (d + momentum v). That is SGD of torch with
    `nesterov=True` and the gradient -d. Learning rate 1 and momentum 0 give what `strategy` gives,
    bit for bit. Integer and bool arrays are taken from `strategy` as they are.

    Args:
        learning_rate: above 0; DiLoCo's is 0.7.
        momentum: from 0 to below 1; DiLoCo's is 0.9.
    """

    def __init__(
        self, strategy: Strategy, *, learning_rate: float = 0.7, momentum: float = 0.9
    ) -> None:
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate is {learning_rate}, should be a number above 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, should be at least 0 and below 1")
        super().__init__(strategy)
        self.learning_rate = learning_rate
        self.momentum = momentum
        self._velocity: dict[str, torch.Tensor] = {}
        self._sent = ArrayRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            self._velocity = dict(
                self._velocity
            )  # not in place: `Guarded` takes failed rounds back
            arrays = ArrayRecord({name: self._step(name, array) for name, array in arrays.items()})
        return arrays, metrics

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": dict(self._velocity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._velocity = state["velocity"]

    def summary(self) -> None:
        logger.info(
            "\t├──> Outer optimizer: learning rate %g, Nesterov momentum %g",
            self.learning_rate,
            self.momentum,
        )
        super().summary()

    def _step(self, name: str, array: Array) -> Array:
        values = npy.from_array(array)
        is_integer = np.dtype(self._sent[name].dtype).kind not in "fc"
        if is_integer or (self.learning_rate == 1 and self.momentum == 0):
            return array
        aggregated = npy.tensor_view(values)
        update = aggregated - npy.tensor_view(npy.from_array(self._sent[name]))
        change = (self.learning_rate - 1) * update
        before = self._velocity.get(name)
        velocity = update if before is None else update + self.momentum * before
        self._velocity[name] = velocity
        change += self.learning_rate * self.momentum * velocity
        moved, target = npy.allocate(np.dtype(array.dtype), tuple(array.shape))
        torch.add(aggregated, change, out=target)
        return moved
