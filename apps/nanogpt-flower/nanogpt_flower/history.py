"""The rounds so far: the table that grows, and the rows of `metrics.jsonl`."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from nanogpt_flower.artifacts import RunDirectory


@dataclass(frozen=True)
class Row:
    """One round in the table and in `metrics.jsonl`; losses in nats a character."""

    round: int
    train_loss: float | None  # mean over the clients' steps, weighted by num-examples
    val_loss: float | None  # of the average on the whole validation split, if the server has it
    client_val_loss: float | None  # mean over the clients' validation parts
    clients: int  # whose training went into the average

    @property
    def shown_val_loss(self) -> float | None:
        """The server's figure, else the clients'."""
        return self.client_val_loss if self.val_loss is None else self.val_loss

    @property
    def perplexity(self) -> float | None:
        """e to the validation loss; capped, so that a loss gone wild is still a number."""
        loss = self.shown_val_loss
        return None if loss is None else math.exp(min(loss, 700.0))

    def __str__(self) -> str:
        cells = [
            f"{self.round:>5}",
            _cell(self.train_loss, 10, 4),
            _cell(self.shown_val_loss, 8, 4),
            _cell(self.perplexity, 10, 2),
        ]
        return "  ".join(cells)


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


class History:
    """The rounds so far: a row each, printed and written as it is finished."""

    HEADER = f"{'round':>5}  {'train loss':>10}  {'val loss':>8}  {'perplexity':>10}"

    def __init__(self, directory: RunDirectory, *, note: str = "") -> None:
        self.directory = directory
        self.rows: list[Row] = []
        self.notes = [note] if note else []
        self._metrics: dict[str, float] = {}
        self._clients = 0

    def aggregate(self, key: str) -> Callable[[list[RecordDict], str], MetricRecord]:
        """A `…_metrics_aggr_fn` for a strategy: Flower's weighted mean, with `key` kept."""

        def aggregate(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
            metrics = aggregate_metricrecords(replies, weighted_by)
            self._metrics[key] = cast(float, metrics[key])
            if key == "train-loss":
                self._clients = len(replies)
            return metrics

        return aggregate

    def finish_round(self, server_round: int, val_loss: float | None) -> None:
        """Print the row, append it to `metrics.jsonl`, draw the curve anew."""
        row = Row(
            round=server_round,
            train_loss=self._metrics.pop("train-loss", None),
            val_loss=val_loss,
            client_val_loss=self._metrics.pop("val-loss", None),
            clients=self._clients,
        )
        if not self.rows:
            print(self.HEADER)
        print(row, flush=True)
        self.rows.append(row)
        self.directory.append_metrics({**asdict(row), "perplexity": row.perplexity})
        self.directory.draw_curve(
            [(r.round, r.shown_val_loss) for r in self.rows if r.shown_val_loss is not None],
            [(r.round, r.train_loss) for r in self.rows if r.train_loss is not None],
        )

    def table(self) -> str:
        """All rows, and under them what a reader must know to compare them."""
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.HEADER, *map(str, self.rows), *notes])
