"""This module defines a FedAvg strategy that holds one reply at a time."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from flower_adapter.arrays.average import Average


class StreamingFedAvg(FedAvg):
    """A `FedAvg` that holds only one reply and the average in memory, for any number of clients.

    The arguments are those of `FedAvg`. `run_rounds` gives this strategy an iterator that decodes
    one reply at a time. After the arrays of a reply are averaged, they are removed from the reply.
    The functions that aggregate metrics therefore see no arrays. Averages of integer and bool
    arrays are rounded, so these arrays do not become floats.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies.

        Raises:
            ValueError: a reply has other names, shapes or dtypes than the first reply, or a weight
                that is not positive. The message names the node.
        """
        average = Average()
        contents: list[RecordDict] = []
        for reply in replies:
            if reply.has_error():
                continue
            content = reply.content
            arrays = next((r for r in content.values() if isinstance(r, ArrayRecord)), None)
            metrics = next((r for r in content.values() if isinstance(r, MetricRecord)), None)
            node = f"node {reply.metadata.src_node_id}"
            if arrays is None or metrics is None or self.weighted_by_key not in metrics:
                raise ValueError(f"{node}: has no arrays, or no metric {self.weighted_by_key}")
            try:
                average.add(arrays, float(metrics[self.weighted_by_key]))  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"{node}: {error}") from error
            arrays.clear()
            contents.append(content)
        if not contents:
            return None, None
        return average.result(), self.train_metrics_aggr_fn(contents, self.weighted_by_key)
