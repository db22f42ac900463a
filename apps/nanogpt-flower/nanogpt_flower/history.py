"""The rounds so far: the table that grows, and the rows of `metrics.jsonl`."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from flower_adapter import Checkpoint
from nanogpt_flower.artifacts import RunDirectory


@dataclass(frozen=True)
class Row:
    """One round in the table and in `metrics.jsonl`; losses in nats a character."""

    round: int
    train_loss: float | None  # mean over the clients' steps, weighted by num-examples
    val_loss: float | None  # of the average on the whole validation split, if the server has it
    client_val_loss: float | None  # mean over the clients' validation parts
    clients: int  # whose training went into the average

    @classmethod
    def of_round(cls, server_round: int, checkpoint: Checkpoint) -> "Row":
        """The row of a round up to that of the checkpoint."""

        def metric(name: str, by_round: dict[int, Any]) -> Any:
            return by_round.get(server_round, {}).get(name)

        return cls(
            round=server_round,
            train_loss=metric("train-loss", checkpoint.train_metrics),
            val_loss=metric("val-loss", checkpoint.server_metrics),
            client_val_loss=metric("val-loss", checkpoint.evaluate_metrics),
            clients=metric("num-replies", checkpoint.train_metrics) or 0,
        )

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

    def show(self, checkpoint: Checkpoint) -> None:
        """Print the rows that are new, write `metrics.jsonl` and draw the curve anew."""
        new = range(len(self.rows), checkpoint.server_round + 1)
        if not self.rows:
            print(self.HEADER)
        for server_round in new:
            self.rows.append(Row.of_round(server_round, checkpoint))
            print(self.rows[-1], flush=True)
        self.directory.write_metrics(
            [{**asdict(row), "perplexity": row.perplexity} for row in self.rows]
        )
        self.directory.draw_curve(
            [(r.round, r.shown_val_loss) for r in self.rows if r.shown_val_loss is not None],
            [(r.round, r.train_loss) for r in self.rows if r.train_loss is not None],
        )

    def table(self) -> str:
        """All rows, and under them what a reader must know to compare them."""
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.HEADER, *map(str, self.rows), *notes])
