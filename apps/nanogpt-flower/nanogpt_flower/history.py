"""Show the finished rounds as a table in the terminal, and write them to `metrics.jsonl`."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from flower_adapter import RoundRecord
from nanogpt_flower.artifacts import RunDirectory


@dataclass(frozen=True)
class Row:
    """One round in the table and in `metrics.jsonl`. Losses are in nats per character."""

    round: int
    train_loss: float | None  # mean over the clients, weighted by num-examples
    val_loss: float | None  # of the global model, on the server's validation text
    client_val_loss: float | None  # mean over the clients' validation texts
    clients: int  # number of clients whose weights were averaged

    @classmethod
    def of_round(cls, record: RoundRecord) -> "Row":
        """Create the row for one round."""

        def metric(metrics: dict[str, Any] | None, name: str) -> Any:
            return None if metrics is None else metrics.get(name)

        return cls(
            round=record.server_round,
            train_loss=metric(record.train_metrics, "train-loss"),
            val_loss=metric(record.server_metrics, "val-loss"),
            client_val_loss=metric(record.evaluate_metrics, "val-loss"),
            clients=len(record.train_clients),
        )

    @property
    def shown_val_loss(self) -> float | None:
        """The validation loss that the table and the curve show.

        This is the server's validation loss. If the server has no text, it is the clients'
        validation loss.
        """
        return self.client_val_loss if self.val_loss is None else self.val_loss

    @property
    def perplexity(self) -> float | None:
        """The exponential of the validation loss.

        The loss is capped at 700, so the result is finite.
        """
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
    """The list of finished rounds. Each new round is printed and written immediately."""

    HEADER = f"{'round':>5}  {'train loss':>10}  {'val loss':>8}  {'perplexity':>10}"

    def __init__(self, directory: RunDirectory, *, note: str = "") -> None:
        self.directory = directory
        self.records: list[RoundRecord] = []
        self.rows: list[Row] = []
        self._notes = [note] if note else []

    def add(self, record: RoundRecord) -> None:
        """Print the row of a round, write `metrics.jsonl` and draw the curve."""
        if not self.rows:
            print(self.HEADER)
        self.records.append(replace(record, arrays=None))  # all arrays would fill the memory
        self.rows.append(Row.of_round(record))
        print(self.rows[-1], flush=True)
        self.directory.write_metrics(
            [{**asdict(row), "perplexity": row.perplexity} for row in self.rows]
        )
        self.directory.draw_curve(
            [(r.round, r.shown_val_loss) for r in self.rows if r.shown_val_loss is not None],
            [(r.round, r.train_loss) for r in self.rows if r.train_loss is not None],
        )

    def table(self) -> str:
        """Return a table of all rounds with notes below it.

        The first note is the `note` of this history, if there is one. The other notes are about
        clients that were left out.
        """
        notes = [f"note: {note}" for note in (*self._notes, *_left_out(self.records))]
        return "\n".join([self.HEADER, *map(str, self.rows), *notes])


def _left_out(records: list[RoundRecord]) -> list[str]:
    """Return lines about the clients that were left out.

    Each line names one phase, one client and one reason, and lists the rounds.
    """
    rounds: dict[tuple[str, int, str], list[int]] = {}
    for record in records:
        for client in record.left_out:
            key = (client.phase, client.node, client.reason)
            rounds.setdefault(key, []).append(record.server_round)
    return [
        f"LEFT OUT of {phase} in round {', '.join(map(str, missed))}: node {node}: {reason}"
        for (phase, node, reason), missed in rounds.items()
    ]
