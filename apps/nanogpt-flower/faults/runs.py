"""Small runs of the app over the wire of one process, and the undisturbed runs beside them."""

import atexit
import contextlib
import io
import itertools
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file
from torch import Tensor

from faults import contract
from faults.contract import LONGEST_REASON
from faults.matrix import Outcome, Unexpected, expect
from faults.wire import Answer, Client, WireGrid, ask, honest
from flower_adapter import protocol
from nanogpt_flower.client_app import app as client_app
from nanogpt_flower.server_app import main
from nanogpt_flower.settings import Settings
from shakespeare_data import load_corpus, partition

ROUNDS = 3
HONEST = (0, 1, 2)  # the clients of most runs
HOSTILE = 3  # one more
ALL = (*HONEST, HOSTILE)
SMALL: dict[str, Any] = {
    "n-layer": 1,
    "n-head": 1,
    "n-embd": 16,
    "block-size": 16,
    "batch-size": 8,
    "max-steps": 4,
    "num-server-rounds": ROUNDS,
    "learning-rate": 0.01,
    "warmup-steps": 2,
    "dropout": 0.1,
    "device": "cpu",
    "precision": "fp32",
    "sample-tokens": 5,
    "round-sample-tokens": 0,
}

torch.set_num_threads(1)  # the tensors are small, so threads would only wait for each other


@dataclass
class Finished:
    """A run that has ended.

    Attributes:
        directory: the directory of the run.
        grid: the grid with the clients and the messages of the server.
        log: everything that the run logged and printed.
        error: the error with which the run ended, or None.
    """

    directory: Path
    grid: WireGrid
    log: str
    error: BaseException | None = None

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a file in the directory of the run."""
        path = self.directory / f"{name}.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    @property
    def loss(self) -> float | None:
        """The last validation loss."""
        rows = self.lines("metrics")
        last = rows[-1] if rows else {}
        return last.get("client_val_loss") if last.get("val_loss") is None else last["val_loss"]

    @property
    def rounds(self) -> int:
        """The number of rounds in which replies were averaged."""
        return sum(row["train_loss"] is not None for row in self.lines("metrics"))

    def model(self) -> dict[str, Tensor]:
        """Return the final weights, or nothing if there are none."""
        path = self.directory / "model" / "model.safetensors"
        return load_file(path) if path.exists() else {}

    def averaged(self) -> dict[int, set[int]]:
        """Return the numbers of the clients whose weights were averaged, by round.

        A client that has lied about its label is missing.
        """
        numbers = {client.label: number for number, client in self.grid.clients.items()}
        rounds: dict[int, set[int]] = {}
        for line in self.lines("clients"):
            if line["update_norm"] is not None and line["client"] in numbers:
                rounds.setdefault(line["round"], set()).add(numbers[line["client"]])
        return rounds

    def reasons(self) -> list[str]:
        """Return why clients were left out, in the order of the rounds."""
        return [why["reason"] for line in self.lines("clients") for why in line["left_out"]]


@cache
def workshop() -> Path:
    """Return a directory for texts and undisturbed runs. It is deleted when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@cache
def text_file() -> Path:
    """Write the text of all runs, 12,000 characters that a tiny model can learn."""
    choice = random.Random(0).choice
    words = [choice(["to be", "or not", "my lord", "good night", "sweet"]) for _ in range(3000)]
    path = workshop() / "text.txt"
    path.write_text("\n".join(words)[:12_000], encoding="utf-8")
    return path


@cache
def policy_file() -> Path:
    """Write the policy of the honest clients, which allows small runs."""
    path = workshop() / "policy.toml"
    path.write_text(contract.SMALL_RUNS, encoding="utf-8")
    return path


@cache
def parts(count: int) -> list[Path]:
    """Divide the text among clients, and return the directories of their parts."""
    corpus = load_corpus(str(text_file()))
    return list(partition(corpus, count).write(workshop() / f"parts-{count}"))


@cache
def first_states(count: int) -> list[Path]:
    """Return each client's state directory after its first message.

    A client draws its windows from a secret in this directory. Runs with copies of one directory
    therefore draw the same windows.
    """
    states = []
    for number, part in enumerate(parts(count)):
        state = workshop() / f"states-{count}" / f"{number}"
        state.mkdir(parents=True, mode=0o700)
        client = Client(client_app, contract.deployed(part, state, policy_file()))
        ask(
            client,
            protocol.LABEL_QUERY,
            RecordDict(),
            number=number,
            run_config=settings({}),
            run_id=1,
        )
        states.append(state)
    return states


def new_clients(
    directory: Path, numbers: Sequence[int] = HONEST, *, of: int = len(ALL)
) -> dict[int, Client]:
    """Return SuperNodes with their own text, and with a state directory each in `directory`."""
    clients = {}
    for number in numbers:
        state = directory / f"state-{number}"
        if not state.exists():
            shutil.copytree(first_states(of)[number], state)
        node_config = contract.deployed(parts(of)[number], state, policy_file())
        clients[number] = Client(client_app, node_config)
    return clients


def settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run config of a small run, with some settings changed."""
    given = {**SMALL, "corpus": str(text_file()), **changes}
    return Settings.from_run_config(given).to_run_config()


@dataclass
class Log(logging.Handler):
    """Keeps everything that Flower and the app log."""

    stream: io.StringIO = field(default_factory=io.StringIO)

    def __post_init__(self) -> None:
        super().__init__()

    __hash__ = logging.Handler.__hash__

    def emit(self, record: logging.LogRecord) -> None:
        self.stream.write(f"{record.levelname} {self.format(record)}\n")


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Capture what is logged and printed."""
    log, logger = Log(), logging.getLogger("flwr")
    before, logger.handlers = logger.handlers, [log]
    try:
        with contextlib.redirect_stdout(log.stream), contextlib.redirect_stderr(log.stream):
            yield log.stream
    finally:
        logger.handlers = before


def run(
    directory: Path,
    numbers: Sequence[int] = HONEST,
    *,
    of: int = len(ALL),
    answer: Answer = honest,
    delay: Mapping[int, float] | None = None,
    clients: Mapping[int, Client] | None = None,
    name: str = "run",
    resume: bool = False,
    **changes: Any,
) -> Finished:
    """Run the app to its end, and return the finished run. An error is kept in the finished run.

    Args:
        directory: holds the directory of the run and those of the clients' states.
        numbers: the clients.
        of: number of parts into which the text is divided.
        answer: what the clients send, see `Answer`.
        delay: seconds until the reply of a client can be pulled, by number.
        clients: the clients by number, in place of new ones.
        name: name of the run.
        resume: True resumes the run of this name. As after a restart, the clients have new
            contexts, and the run has a new id.
        changes: changed settings, with "_" in place of "-".
    """
    given = {"min-clients": len(numbers), "output-dir": str(directory), "run-name": name}
    if resume:
        given["resume-from"] = str(directory / name)
    config = settings(given | {key.replace("_", "-"): value for key, value in changes.items()})
    clients = clients or new_clients(directory, numbers, of=of)
    run_id = next(_run_ids)
    grid = WireGrid(clients, config, answer=answer, delay=delay, run_id=run_id)
    error = None
    with captured() as log:
        try:
            main(grid, Context(run_id, 0, {}, RecordDict(), config))
        except (Exception, SystemExit, PowerCut) as caught:
            error = caught
        learn_labels(clients, config)
    return Finished(directory / name, grid, log.getvalue(), error)


_run_ids = itertools.count(1)


class PowerCut(BaseException):
    """Ends a run as a power cut does. No code under test should catch it."""


def undisturbed(numbers: Sequence[int] = HONEST, *, of: int = len(ALL), **changes: Any) -> Finished:
    """Return a run of these clients in which nothing goes wrong. Each one is run once.

    Raises:
        Unexpected: the run ended with an error.
    """
    return _undisturbed(tuple(numbers), of, tuple(sorted(changes.items())))


@cache
def _undisturbed(
    numbers: tuple[int, ...], of: int, changes: tuple[tuple[str, Any], ...]
) -> Finished:
    directory = Path(tempfile.mkdtemp(dir=workshop(), prefix="undisturbed-"))
    finished = run(directory, numbers, of=of, **dict(changes))
    if finished.error is not None:
        raise Unexpected(f"the undisturbed run ended: {describe(finished.error)}")
    return finished


def describe(error: BaseException) -> str:
    """Return the class of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def compared(happened: str, finished: Finished, reference: Finished) -> Outcome:
    """Return the outcome of a run beside a run without the fault."""
    return Outcome(happened, finished.loss, reference.loss, lost(finished, reference))


def lost(finished: Finished, reference: Finished) -> str:
    """Return how many rounds and replies of the reference do not count in the finished run."""
    found, wanted = finished.averaged(), reference.averaged()
    counted = {row["round"]: row["clients"] for row in finished.lines("metrics")}
    rounds = replies = 0
    for number, clients in wanted.items():
        known = found.get(number, set())
        unknown = max(0, counted.get(number, 0) - len(known))  # they count under other labels
        replies += max(0, len(clients - known) - unknown)
        rounds += not counted.get(number)
    if not replies:
        return "nothing"
    total = sum(map(len, wanted.values()))
    return f"{rounds} of {len(wanted)} rounds, {replies} of {total} replies"


def learn_labels(clients: Mapping[int, Client], run_config: Mapping[str, Any]) -> None:
    """Ask the clients of which no honest reply has told the label."""
    for number, client in clients.items():
        if client.label is None:
            query = protocol.LABEL_QUERY, RecordDict()
            ask(client, *query, number=number, run_config=run_config, run_id=0)


def completed(finished: Finished, reference: Finished) -> None:
    """Expect that a run did not end with an error."""
    if finished.error is not None:
        text = f"the run ended: {describe(finished.error)}"
        raise Unexpected(text, compared(text, finished, reference))


def same_result(
    happened: str, finished: Finished, *references: Finished, rounding: bool = False
) -> Outcome:
    """Expect that a run completed with the very weights of a reference, and return the outcome.

    Args:
        happened: the text of the outcome.
        finished: the run.
        references: runs without the fault. One of them must have the same weights.
        rounding: True allows the rounding error of a mean in another order.
    """
    completed(finished, references[0])
    for reference in references:
        largest = distance(finished, reference)
        if largest == 0.0 or (rounding and largest < 1e-6):
            return compared(happened, finished, reference)
    text = f"the weights differ by up to {largest:.2g} from the undisturbed run's; {happened}"
    raise Unexpected(text, compared(text, finished, references[0]))


def distance(finished: Finished, reference: Finished) -> float:
    """Return the largest difference between the final weights of two runs."""
    own, others = finished.model(), reference.model()
    if own.keys() != others.keys():
        return float("inf")
    return max(float((own[name] - others[name]).abs().max()) for name in own)


def left_out(
    directory: Path,
    answer: Answer,
    *,
    numbers: Sequence[int] = ALL,
    hostile: Sequence[int] = (HOSTILE,),
    of: int = len(ALL),
    delay: Mapping[int, float] | None = None,
    **changes: Any,
) -> Outcome:
    """Run with hostile clients. Expect that they are left out, and that the log says so.

    The weights must be those of a run without these clients. The reason must stand below the table
    that the run prints.
    """
    finished = run(directory, numbers, of=of, answer=answer, delay=delay, **changes)
    others = [number for number in numbers if number not in hostile]
    reference = undisturbed(others, of=of, **changes)
    completed(finished, reference)
    reasons = finished.reasons()
    happened = f"left out: {reasons[0]}" if reasons else "not left out"
    outcome = same_result(happened, finished, reference)
    expect(reasons, "nothing says that the client was left out", outcome)
    longest = max(map(len, reasons))
    expect(longest <= LONGEST_REASON, f"a reason has {longest:,} characters", outcome)
    expect("LEFT OUT" in finished.log, "the table does not say who was left out", outcome)
    return outcome
