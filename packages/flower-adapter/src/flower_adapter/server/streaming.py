"""FedAvg that holds one reply at a time."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from flower_adapter.arrays.average import Average


class StreamingFedAvg(FedAvg):
    """Flower's `FedAvg`, with one reply and the average in memory, however many clients there are.

    The arguments are those of `FedAvg`. `run_rounds` gives this strategy an iterator that decodes
    one reply at a time. Each reply loses its arrays once they are averaged, so the functions that
    aggregate metrics see none. Integer and bool arrays are rounded and do not become floats.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies.

        Raises:
            ValueError: a reply has other names, shapes or dtypes than the first one, or a weight
                that is not positive. The text names the node.
        """
        average = Average()
        contents: list[RecordDict] = []
        for reply in replies:
            if reply.has_error():
                continue
            content = reply.content
            arrays = next(r for r in content.values() if isinstance(r, ArrayRecord))
            metrics = next(r for r in content.values() if isinstance(r, MetricRecord))
            try:
                average.add(arrays, float(metrics[self.weighted_by_key]))  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"node {reply.metadata.src_node_id}: {error}") from error
            arrays.clear()
            contents.append(content)
        if not contents:
            return None, None
        return average.result(), self.train_metrics_aggr_fn(contents, self.weighted_by_key)
