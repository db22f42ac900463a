"""This module defines the record of a round: metrics, clients, failures, sizes and times."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from flwr.app import ArrayRecord

Metrics = dict[str, Any]  # numbers, or lists of numbers, by name

LONGEST_REASON, LONGEST_LABEL = 500, 100  # characters
MOST_LEFT_OUT = 1000  # entries that the records of earlier rounds keep, all together


@dataclass
class ClientRecord:
    """The record of one client in one phase of a round."""

    node: int
    label: str | None
    metrics: Metrics
    update_norm: float  # L2 norm of its update; 0 in an evaluation and without a guard
    bytes_sent: int  # size of the arrays to the client
    bytes_received: int  # size of the arrays from the client
    seconds: float  # from the start of sending to the arrival of the reply
    scaled: float = 1.0  # the guard has multiplied the update by this factor
    reduced_weight: float | None = None  # the weight that counted, if the guard has reduced it


@dataclass
class LeftOut:
    """A client whose reply did not count, or did not arrive."""

    phase: str  # "train" or "evaluate"
    node: int
    label: str | None
    reason: str
    bytes_sent: int = 0  # size of the arrays to the client
    bytes_received: int = 0  # size of the arrays from the client


@dataclass
class RoundRecord:
    """The record of one round.

    Round 0 is the evaluation of the initial arrays on the server. Metrics are None if the phase
    failed, or if the strategy or `evaluate_fn` returned no metrics.
    """

    server_round: int
    train_metrics: Metrics | None = None  # from the clients, aggregated by the strategy
    evaluate_metrics: Metrics | None = None  # from the clients, aggregated by the strategy
    server_metrics: Metrics | None = None  # from the server's evaluation
    train_clients: list[ClientRecord] = field(default_factory=list)  # given to the strategy
    evaluate_clients: list[ClientRecord] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)  # see `forget_left_out`
    num_left_out: int = 0  # with the entries that `left_out` no longer has
    failures: list[str] = field(default_factory=list)  # a sentence for each phase that failed
    bytes_sent: int = 0  # size of all arrays to clients
    bytes_received: int = 0  # size of all arrays from clients, including left-out replies
    # By part of the round. "encode" and "decode" are the server's own work while it sends messages
    # and checks replies, so "train" and "evaluate" include them.
    seconds: dict[str, float] = field(default_factory=dict)
    arrays: ArrayRecord | None = None  # the global arrays after the round, see `run_rounds`

    def metric(self, name: str) -> float | None:
        """Return a metric from the server's evaluation, else from the clients' evaluation."""
        for metrics in (self.server_metrics, self.evaluate_metrics):
            value = (metrics or {}).get(name)
            if isinstance(value, int | float):
                return float(value)
        return None

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measure a part of the round, and add its seconds to the record."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started

    def to_dict(self) -> dict[str, Any]:
        """Return the record as nested dicts, without its arrays."""
        fields = vars(self) | {"arrays": None}
        return asdict(RoundRecord(**fields))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Rebuild a record from the dicts that `to_dict` returned."""
        clients = ("train_clients", "evaluate_clients")
        rebuilt = {name: [ClientRecord(**client) for client in fields[name]] for name in clients}
        left_out = [LeftOut(**client) for client in fields["left_out"]]
        return cls(**{**fields, **rebuilt, "left_out": left_out})


def forget_left_out(records: Sequence[RoundRecord]) -> None:
    """Keep only the newest `MOST_LEFT_OUT` entries of clients that were left out.

    Clients choose the texts in these entries. Without a limit, they could fill the memory of the
    server and its checkpoints.
    """
    room = MOST_LEFT_OUT
    for record in reversed(records):
        del record.left_out[room:]
        room -= len(record.left_out)


class RoundFailed(RuntimeError):
    """An error: too many rounds in a row have failed.

    If an exception made the last round fail, it is the `__cause__` of this error.

    Attributes:
        phase: "train", "evaluate", "server-evaluate", "checkpoint" or "on-round".
        server_round: the round, from 1.
        reason: why the last round failed, for example too few good replies.
        left_out: each client without a good reply, with the reason.
    """

    def __init__(self, phase: str, server_round: int, reason: str, left_out: list[LeftOut]) -> None:
        super().__init__(phase, server_round, reason, left_out)
        self.phase = phase
        self.server_round = server_round
        self.reason = reason
        self.left_out = left_out

    def __str__(self) -> str:
        lines = [f"  node {client.node}: {client.reason}" for client in self.left_out]
        return "\n".join([f"{self.phase} round {self.server_round}: {self.reason}", *lines])
