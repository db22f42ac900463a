"""Write the finished rounds to the files of the run, and show them.

`metrics.jsonl` has one line for each round, and `clients.jsonl` one for each round and client. They
contain no times, so two runs with the same settings on one machine write the same lines. The times
are in `timings.jsonl`, and the samples are in `samples.jsonl`. `report.html` shows all of them.
"""

import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from flower_adapter import RoundRecord
from nanogpt_flower import progress
from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.report import write_report
from nanogpt_flower.trackers import Trackers, values_of

SAMPLES = "samples.jsonl"
EMPTY: dict[str, Any] = {
    "round": None,
    "client": None,
    "train_loss": None,
    "val_loss": None,
    "train_characters": None,
    "val_characters": None,
    "tokens": None,
    "update_norm": None,
    "bytes_down": 0,
    "bytes_up": 0,
    "fp32_bytes_down": 0,
    "fp32_bytes_up": 0,
    "left_out": None,
}

logger = logging.getLogger("flwr.nanogpt_flower")


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

    def to_dict(self) -> dict[str, Any]:
        """Return the line of this round in `metrics.jsonl`."""
        return {**asdict(self), "perplexity": self.perplexity}

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


def _whole(value: object) -> int | None:
    """Return a count from a client, or None if it cannot be one."""
    is_count = isinstance(value, int | float) and 0 <= value < 2**53 and value == int(value)
    return int(value) if is_count else None  # type: ignore[call-overload]


class History:
    """The list of finished rounds.

    Args:
        directory: the directory of the run.
        model_bytes: size of the model's arrays in a message without a codec.
        trackers: the trackers that get the values of each round.
        note: a note for the end of the table.
    """

    HEADER = f"{'round':>5}  {'train loss':>10}  {'val loss':>8}  {'perplexity':>10}"

    def __init__(
        self,
        directory: RunDirectory,
        *,
        model_bytes: int = 0,
        trackers: Trackers | None = None,
        note: str = "",
    ) -> None:
        self.directory = directory
        self.model_bytes = model_bytes
        self.trackers = trackers
        self.records: list[RoundRecord] = []
        self.rows: list[Row] = []
        self.samples = {line["round"]: line["text"] for line in directory.read_lines(SAMPLES)}
        self._notes = [note] if note else []

    def replay(self, record: RoundRecord) -> None:
        """Add a round that was finished before a resume, and print its row."""
        self._append(record, replayed=True)

    def add(self, record: RoundRecord, sample: str | None = None) -> None:
        """Add a round, print its row, and write all files of the run."""
        if sample is not None:
            self.samples[record.server_round] = sample
        self._append(record, replayed=False)
        self.write(running=True)

    def _append(self, record: RoundRecord, *, replayed: bool) -> None:
        if not self.rows:
            print(self.HEADER)
        row = Row.of_round(record)
        self.records.append(replace(record, arrays=None))  # all arrays would fill the memory
        self.rows.append(row)
        print(row, flush=True)
        if row.round in self.samples:
            progress.emit("sample", round=row.round, text=self.samples[row.round])
        for client in record.left_out:
            progress.emit(
                "left-out",
                round=row.round,
                phase=client.phase,
                client=client.label or f"node {client.node}",
                reason=client.reason,
            )
        seconds = round_seconds(record)
        progress.emit("round", **row.to_dict(), seconds=seconds, replayed=replayed)
        if self.trackers is not None:
            values = values_of(row.to_dict(), self._clients(record), record.seconds)
            self.trackers.log(row.round, values, self.samples.get(row.round))

    def _clients(self, record: RoundRecord) -> list[dict[str, Any]]:
        return client_lines(record, self.model_bytes)

    def write(self, *, running: bool) -> None:
        """Write the files, the curve and the report. The report of a running run reloads itself."""
        done = {row.round for row in self.rows}
        write = self.directory.write_lines
        write("metrics.jsonl", [row.to_dict() for row in self.rows])
        write("clients.jsonl", [line for found in self.records for line in self._clients(found)])
        write("timings.jsonl", map(timing_line, self.records))
        kept = sorted((at, text) for at, text in self.samples.items() if at in done)
        write(SAMPLES, [{"round": at, "text": text} for at, text in kept])
        try:
            self.directory.draw_curve(
                [(r.round, r.shown_val_loss) for r in self.rows if r.shown_val_loss is not None],
                [(r.round, r.train_loss) for r in self.rows if r.train_loss is not None],
            )
            write_report(self.directory.path, refresh=running)
        except Exception:  # a picture of the run must not end the run
            logger.exception("the report of round %d cannot be written", self.rows[-1].round)

    def table(self) -> str:
        """Return a table of all rounds with notes below it.

        The first note is the `note` of this history, if there is one. The other notes are about
        clients that were left out, and about updates and weights that the server has reduced.
        """
        about_clients = (*_left_out(self.records), *_reduced(self.records))
        notes = [f"note: {note}" for note in (*self._notes, *about_clients)]
        return "\n".join([self.HEADER, *map(str, self.rows), *notes])


def client_lines(record: RoundRecord, model_bytes: int) -> list[dict[str, Any]]:
    """Return the lines of one round in `clients.jsonl`, in the order of the labels.

    The bytes are those of all arrays to and from the client, in training and in evaluation. The
    `fp32_bytes` are the bytes that the same messages would have without a codec. A message to a
    client carries the model once, and so does the reply after training.
    """
    lines: dict[str, dict[str, Any]] = {}

    def line(label: str | None, node: int, sent: int, received: int) -> dict[str, Any]:
        name = label or f"node {node}"
        start = {**EMPTY, "round": record.server_round, "client": name, "left_out": []}
        found = lines.setdefault(name, start)
        for key, size in (("bytes_down", sent), ("bytes_up", received)):
            found[key] += size
            found[f"fp32_{key}"] += model_bytes if size else 0
        return found

    for client in record.train_clients:
        found = line(client.label, client.node, client.bytes_sent, client.bytes_received)
        found["train_loss"] = client.metrics.get("train-loss")
        found["train_characters"] = _whole(client.metrics.get("num-examples"))
        found["tokens"] = _whole(client.metrics.get("tokens"))
        found["update_norm"] = client.update_norm
    for client in record.evaluate_clients:
        found = line(client.label, client.node, client.bytes_sent, client.bytes_received)
        found["val_loss"] = client.metrics.get("val-loss")
        # The first character of the validation text is not predicted.
        found["val_characters"] = int(client.metrics.get("num-examples", -1)) + 1
    for missed in record.left_out:
        found = line(missed.label, missed.node, missed.bytes_sent, missed.bytes_received)
        found["left_out"].append({"phase": missed.phase, "reason": missed.reason})
    return [lines[name] for name in sorted(lines)]


def round_seconds(record: RoundRecord) -> float:
    """Return the seconds of a round. Encoding and decoding are parts of the two phases."""
    return sum(
        seconds for part, seconds in record.seconds.items() if part not in ("encode", "decode")
    )


def timing_line(record: RoundRecord) -> dict[str, Any]:
    """Return the line of one round in `timings.jsonl`."""
    clients = {
        client.label or f"node {client.node}": {
            "train": client.metrics.get("train-seconds"),
            "reply": client.seconds,
        }
        for client in record.train_clients
    }
    return {"round": record.server_round, "seconds": record.seconds, "clients": clients}


def _reduced(records: list[RoundRecord]) -> list[str]:
    """Return a line for each client whose updates or weights the server has reduced."""
    rounds: dict[tuple[str, str], list[int]] = {}
    for record in records:
        for client in record.train_clients:
            name = client.label or f"node {client.node}"
            if client.scaled < 1:
                rounds.setdefault(("update", name), []).append(record.server_round)
            if client.reduced_weight is not None:
                rounds.setdefault(("weight", name), []).append(record.server_round)
    return [
        f"REDUCED the {what} in round {', '.join(map(str, reduced))}: {name}"
        for (what, name), reduced in rounds.items()
    ]


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
