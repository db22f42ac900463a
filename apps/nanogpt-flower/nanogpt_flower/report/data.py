"""Read the files of a run's directory, and compute the figures that its report shows."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CLIENTS = "clients.jsonl"
TIMINGS = "timings.jsonl"
SAMPLES = "samples.jsonl"
FINAL_SAMPLE = "sample.txt"
PARTS = "parts.json"
LAUNCH = "launch.json"
STATE = "state.json"

T = TypeVar("T")

TIME_KINDS = ("training", "waiting", "encoding", "averaging", "evaluating", "saving")


class ReportError(ValueError):
    """The error for a run's directory that cannot be reported. The message names the file."""


@dataclass(frozen=True)
class Round:
    """A line of `metrics.jsonl`. Losses are in nats per character."""

    round: int
    train_loss: float | None
    val_loss: float | None  # on the server's validation text
    client_val_loss: float | None  # mean over the clients' validation texts
    clients: int

    @property
    def shown_loss(self) -> float | None:
        """The server's validation loss or, if the server has no text, the clients' mean."""
        return self.client_val_loss if self.val_loss is None else self.val_loss


@dataclass(frozen=True)
class LeftOut:
    """A client that did not count in one phase of a round."""

    phase: str
    client: str
    reason: str


@dataclass(frozen=True)
class ClientRound:
    """A line of `clients.jsonl`: one client in one round."""

    round: int
    client: str
    train_loss: float | None
    val_loss: float | None
    train_characters: int | None
    val_characters: int | None
    tokens: int | None  # training tokens of this round
    bytes_down: int
    bytes_up: int
    fp32_bytes_down: int
    fp32_bytes_up: int
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class Timing:
    """A line of `timings.jsonl`."""

    round: int
    seconds: Mapping[str, float]
    client_training: Mapping[str, float]  # seconds of training by client

    @property
    def total(self) -> float:
        """Seconds of the round. Encoding and decoding are parts of the other phases."""
        phases = ("train", "evaluate", "aggregate", "server-evaluate", "checkpoint")
        return sum(self.seconds.get(phase, 0.0) for phase in phases)

    def shares(self) -> tuple[float, ...]:
        """Divide the seconds of the round among `TIME_KINDS`. The sum is `total`.

        Training is the time of the slowest client. If no client reported its time, the whole phase
        counts as training.
        """
        train, evaluate, coding = (
            sum(self.seconds.get(phase, 0.0) for phase in phases)
            for phases in (("train",), ("evaluate",), ("encode", "decode"))
        )
        slowest = max(self.client_training.values(), default=train - coding)
        training = min(max(slowest, 0.0), train)
        coding = min(coding, train + evaluate - training)
        # The codec also works in the evaluation. A negative rest is its time there.
        rest = train - training - coding
        return (
            training,
            max(rest, 0.0),
            coding,
            self.seconds.get("aggregate", 0.0),
            evaluate + min(rest, 0.0) + self.seconds.get("server-evaluate", 0.0),
            self.seconds.get("checkpoint", 0.0),
        )


@dataclass(frozen=True)
class Part:
    """The text of one client."""

    label: str
    train: int | None  # characters
    val: int | None  # characters
    speakers: int | None
    plays: int | None
    divergence: float | None  # from the whole text, in bits
    holds: str = ""  # the names of its plays or roles


@dataclass(frozen=True)
class Partition:
    """The contents of `parts.json`."""

    scheme: str
    options: Mapping[str, Any]
    left_out: int | None  # characters that no client holds
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Config:
    """The contents of `config.json`."""

    settings: Mapping[str, Any]
    parameters: int | None
    corpus: Mapping[str, Any] | None
    server: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """All that the report shows. A value that comes from a missing file is None or empty."""

    name: str
    rounds: tuple[Round, ...]
    config: Config | None
    clients: tuple[ClientRound, ...] | None
    timings: tuple[Timing, ...] | None
    samples: tuple[tuple[int, str], ...]  # (round, text)
    final_sample: str | None
    partition: Partition | None
    launch: Mapping[str, Any]
    state: str
    message: str  # why the run failed

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the run."""
        return self.config.settings if self.config else {}

    def labels(self) -> list[str]:
        """Return the labels of all clients, in the order in which they first occur."""
        return list(dict.fromkeys(row.client for row in self.clients or ()))

    def tokens_by_round(self) -> dict[int, int] | None:
        """Return the number of tokens that all clients processed until the end of each round.

        The result is None if a client trained but its tokens are not known.
        """
        if self.clients is None:
            return None
        if any(row.tokens is None and row.train_loss is not None for row in self.clients):
            return None
        sums: dict[int, int] = {}
        for row in self.clients:
            sums[row.round] = sums.get(row.round, 0) + (row.tokens or 0)
        totals, total = {}, 0
        for record in self.rounds:
            if record.round and record.round not in sums:
                return None
            total += sums.get(record.round, 0)
            totals[record.round] = total
        return totals


class _Fields:
    """A JSON object. Each method returns the value of a key and checks its type."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, dict):
            raise ReportError(f"{where} is damaged: {_shown(values)} must be a JSON object")
        self.values: dict[str, Any] = values
        self.where = where

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.wrong(key, "a number or null")
        if not -1e300 < value < 1e300:
            self.wrong(key, "a finite number")
        return float(value)

    def optional_whole(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < 2**63):
            self.wrong(key, "a whole number of at least 0")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.optional_whole(key)
        if value is None and default is None:
            self.wrong(key, "a whole number of at least 0")
        return value if value is not None else default or 0

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        values = self.values.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            self.wrong(key, "a list of texts")
        return list(values)

    def mapping(self, key: str) -> "_Fields":
        value = self.values.get(key)
        return _Fields({} if value is None else value, f"{self.where}, {key}")

    def objects(self, key: str) -> "list[_Fields]":
        value = self.values.get(key, [])
        if not isinstance(value, list):
            self.wrong(key, "a list")
        return [_Fields(item, f"{self.where}, {key}") for item in value]

    def numbers(self) -> dict[str, float]:
        """Return the values of all keys, which must be numbers."""
        found = {key: self.number(key) for key in self.values}
        return {key: value for key, value in found.items() if value is not None}

    def wrong(self, key: str, allowed: str) -> NoReturn:
        value = _shown(self.values.get(key))
        raise ReportError(f"{self.where} is damaged: {key} is {value}; it must be {allowed}")


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:79] + "…"


def read_run(directory: Path) -> Run:
    """Read the files of a run. Every file but `metrics.jsonl` may be missing.

    Raises:
        ReportError: if a file is damaged, or if there is no `metrics.jsonl`.
    """
    rounds = _lines(directory / METRICS, _round)
    if not rounds:
        raise ReportError(f"{directory / METRICS} must be a file with at least one round")
    for before, after in pairwise(rounds):
        if after.round <= before.round:
            raise ReportError(
                f"{directory / METRICS} is damaged: round {after.round} comes after round "
                f"{before.round}"
            )
    state = _object(directory / STATE)
    launch = _object(directory / LAUNCH)
    return Run(
        name=directory.resolve().name,
        rounds=rounds,
        config=_config(_object(directory / CONFIG)),
        clients=_lines(directory / CLIENTS, _client_round),
        timings=_lines(directory / TIMINGS, _timing),
        samples=_lines(directory / SAMPLES, lambda f: (f.whole("round"), f.text("text"))) or (),
        final_sample=_text(directory / FINAL_SAMPLE),
        partition=_partition(_object(directory / PARTS)),
        launch=launch.values if launch else {},
        state=state.text("state", "") if state else "",
        message=state.text("message", "") if state else "",
    )


def _text(path: Path) -> str | None:
    """Return the text of a file, or None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is damaged: it is not UTF-8") from error
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from error


def _parse(text: str, where: str) -> _Fields:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number of JSON")

    try:
        return _Fields(json.loads(text, parse_constant=refuse), where)
    except ReportError:
        raise
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where} is damaged: {error}") from error


def _object(path: Path) -> _Fields | None:
    text = _text(path)
    return None if text is None else _parse(text, str(path))


def _lines(path: Path, convert: Callable[[_Fields], T]) -> tuple[T, ...] | None:
    text = _text(path)
    if text is None:
        return None
    # Only "\n" ends a line: JSON may hold the other line breaks of `str.splitlines`.
    numbered = enumerate(text.split("\n"), start=1)
    return tuple(convert(_parse(line, f"{path}, line {n}")) for n, line in numbered if line.strip())


def _round(fields: _Fields) -> Round:
    return Round(
        fields.whole("round"),
        fields.number("train_loss"),
        fields.number("val_loss"),
        fields.number("client_val_loss"),
        fields.whole("clients", 0),
    )


def _client_round(fields: _Fields) -> ClientRound:
    client = fields.text("client")
    return ClientRound(
        fields.whole("round"),
        client,
        fields.number("train_loss"),
        fields.number("val_loss"),
        fields.optional_whole("train_characters"),
        fields.optional_whole("val_characters"),
        fields.optional_whole("tokens"),
        fields.whole("bytes_down", 0),
        fields.whole("bytes_up", 0),
        fields.whole("fp32_bytes_down", 0),
        fields.whole("fp32_bytes_up", 0),
        tuple(
            LeftOut(item.text("phase"), client, item.text("reason"))
            for item in fields.objects("left_out")
        ),
    )


def _timing(fields: _Fields) -> Timing:
    clients = fields.mapping("clients")
    training = {label: clients.mapping(label).number("train") for label in clients.values}
    return Timing(
        fields.whole("round"),
        fields.mapping("seconds").numbers(),
        {label: seconds for label, seconds in training.items() if seconds is not None},
    )


def _partition(fields: _Fields | None) -> Partition | None:
    if fields is None:
        return None
    parts = tuple(
        Part(
            item.text("label"),
            item.optional_whole("train"),
            item.optional_whole("val"),
            item.optional_whole("speakers"),
            item.optional_whole("plays"),
            item.number("divergence"),
            ", ".join(item.texts("holds")),
        )
        for item in fields.objects("clients")
    )
    options = fields.mapping("options").values
    return Partition(fields.text("scheme"), options, fields.optional_whole("left_out"), parts)


def _config(fields: _Fields | None) -> Config | None:
    if fields is None:
        return None
    corpus = fields.mapping("corpus").values
    return Config(
        settings=fields.mapping("settings").values,
        parameters=fields.optional_whole("parameters"),
        corpus=corpus or None,
        server=fields.mapping("server").values,
        machine=fields.mapping("machine").values,
        versions=fields.mapping("versions").values,
    )


def perplexity(loss: float) -> float:
    """Return the exponential of a loss. The loss is capped at 700, so the result is finite."""
    return math.exp(min(loss, 700.0))
