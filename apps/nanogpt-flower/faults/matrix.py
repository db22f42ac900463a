"""A fault, its outcome, the runner of all faults, and the table at the end."""

import json
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

GROUPS = ("A", "B", "C", "network")
TITLES = {
    "A": "what a server must not be able to do",
    "B": "what a client must not be able to do",
    "C": "accidents",
    "network": "network and processes",
}
SECONDS = {"A": 60, "B": 60, "C": 60, "network": 240}  # a fault that takes longer has failed


@dataclass
class Outcome:
    """The result of a fault. The losses are those of the last round on the validation text."""

    happened: str
    loss: float | None = None
    undisturbed: float | None = None
    lost: str = "nothing"


class Unexpected(Exception):
    """The error for a fault whose outcome is not the expected one."""

    def __init__(self, happened: str, outcome: Outcome | None = None) -> None:
        super().__init__(happened)
        self.outcome = outcome or Outcome(happened, lost="unknown")
        self.outcome.happened = happened


class TookTooLong(BaseException):
    """The error for a fault that does not end. No code under test should catch it."""


class Skipped(Exception):
    """The error for a fault that this machine cannot try. The message says why."""


Try = Callable[[Path], Outcome]


@dataclass(frozen=True)
class Fault:
    """A named fault.

    Attributes:
        name: the name of the function that tries the fault.
        title: one sentence, the docstring of the function.
        group: "A", "B", "C" or "network".
        entry: the entry in the list of threats, such as "C4".
        expected: one sentence about the outcome.
        attempt: tries the fault in an empty directory.
    """

    name: str
    title: str
    group: str
    entry: str
    expected: str
    attempt: Try


@dataclass
class Result:
    """One row of the table."""

    name: str
    title: str
    group: str
    entry: str
    expected: str
    status: str  # "pass", "FAIL" or "skipped"
    happened: str
    loss: float | None
    undisturbed: float | None
    lost: str
    seconds: float
    details: str = ""  # the traceback of an error that the fault did not expect


FAULTS: dict[str, Fault] = {}


def fault(group: str, entry: str, expected: str) -> Callable[[Try], Try]:
    """Register a function as a fault. The first line of its docstring is the fault's title."""

    def register(attempt: Try) -> Try:
        name, title = attempt.__name__, (attempt.__doc__ or "").strip().splitlines()[0]
        assert group in GROUPS, f"{name}: {group!r} is not one of {GROUPS}"
        assert name not in FAULTS, f"{name} exists twice"
        FAULTS[name] = Fault(name, title.rstrip("."), group, entry, expected, attempt)
        return attempt

    return register


def expect(condition: object, otherwise: str, outcome: Outcome | None = None) -> None:
    """Raise `Unexpected` with the text `otherwise` if the condition does not hold."""
    if not condition:
        raise Unexpected(otherwise, outcome)


def selected(names: Sequence[str]) -> list[Fault]:
    """Return the faults with these names, groups or entries, or all faults if there are no names.

    Raises:
        SystemExit: nothing has such a name.
    """
    wanted = [name.replace("-", "_").lower() for name in names]
    keys = {fault: {fault.name, fault.group.lower(), fault.entry.lower()} for fault in all_faults()}
    known = set().union(*keys.values())
    if unknown := [name for name in wanted if name not in known]:
        listed = "\n".join(f"  {fault.name}" for fault in keys)
        raise SystemExit(f"there is no fault {', '.join(unknown)}; the faults are:\n{listed}")
    return [fault for fault, own in keys.items() if not wanted or own.intersection(wanted)]


def all_faults() -> list[Fault]:
    """Return all faults in the order of their groups."""
    return sorted(FAULTS.values(), key=lambda fault: GROUPS.index(fault.group))


def attempt(fault: Fault) -> Result:
    """Try a fault in a new directory, and return its row."""
    started, status, details = time.monotonic(), "pass", ""
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as directory:
        try:
            with time_limit(SECONDS[fault.group]):
                outcome = fault.attempt(Path(directory))
        except Unexpected as error:
            status, outcome = "FAIL", error.outcome
        except Skipped as error:
            status, outcome = "skipped", Outcome(str(error), lost="-")
        except (Exception, TookTooLong) as error:
            status, outcome = "FAIL", Outcome(f"{type(error).__name__}: {error}", lost="unknown")
            details = traceback.format_exc()
    return Result(
        fault.name,
        fault.title,
        fault.group,
        fault.entry,
        fault.expected,
        status,
        _cut(outcome.happened),
        outcome.loss,
        outcome.undisturbed,
        outcome.lost,
        round(time.monotonic() - started, 1),
        details,
    )


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` in the main thread if the context lasts longer. Limits can be nested."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"not ended after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            passed = time.monotonic() - started
            signal.setitimer(signal.ITIMER_REAL, max(0.01, left - passed))


def run_faults(faults: Iterable[Fault], console: Console) -> list[Result]:
    """Try the faults one after the other, and print a line for each."""
    results = []
    for fault in faults:
        result = attempt(fault)
        console.print(
            f"{result.status:<7} {result.seconds:>6.1f} s  {fault.group} {fault.entry} "
            f"{fault.name}: {result.happened}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        results.append(result)
    return results


def show(results: Sequence[Result], console: Console) -> None:
    """Print the table of all results, and how many faults passed."""
    table = Table(show_lines=True, pad_edge=False)
    for heading, ratio in (("fault", 5), ("where", 1), ("what happened", 6)):
        table.add_column(heading, ratio=ratio, overflow="fold")
    for heading in ("loss", "undisturbed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("lost", ratio=2, overflow="fold")
    table.add_column("", no_wrap=True)
    for result in results:
        table.add_row(*cells(result))
    console.print(table, markup=False)
    console.print(summary(results), highlight=False)


def cells(result: Result) -> list[str]:
    """Return the cells of one row."""
    return [
        result.title,
        f"{result.group} {result.entry}".strip(),
        result.happened,
        number(result.loss),
        number(result.undisturbed),
        result.lost,
        result.status,
    ]


def number(loss: float | None) -> str:
    """Return a loss with four digits, or "-"."""
    return "-" if loss is None else f"{loss:.4f}"


def summary(results: Sequence[Result]) -> str:
    """Return how many faults passed, failed and were skipped."""
    counts = {status: sum(r.status == status for r in results) for status in ("FAIL", "skipped")}
    passed = len(results) - sum(counts.values())
    return (
        f"{len(results)} faults: {passed} passed, {counts['FAIL']} failed, "
        f"{counts['skipped']} skipped, {sum(r.seconds for r in results):.0f} s"
    )


def write(results: Sequence[Result], directory: Path) -> None:
    """Write the results to `faults.json` and `faults.md`."""
    directory.mkdir(exist_ok=True)
    document = json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False)
    (directory / "faults.json").write_text(document + "\n", encoding="utf-8")
    (directory / "faults.md").write_text(markdown(results), encoding="utf-8")


def markdown(results: Sequence[Result]) -> str:
    """Return the results as one table for each group."""
    lines = []
    for group in GROUPS:
        rows = [result for result in results if result.group == group]
        if not rows:
            continue
        lines += [f"## {group}: {TITLES[group]}", ""]
        lines += ["| fault | where | what happened | loss | undisturbed | lost | |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [f"| {' | '.join(map(_escaped, cells(result)))} |" for result in rows]
        lines += [""]
    return "\n".join([*lines, summary(results), ""])


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _cut(text: str, longest: int = 300) -> str:
    """Return a text in one line, without control characters and with at most 300 characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else f"{line[:longest]}…"
