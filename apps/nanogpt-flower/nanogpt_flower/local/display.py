"""Show the progress of a run: a live screen on a terminal, plain lines everywhere else."""

import io
import math
import time
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.text import Text

Clock = Callable[[], float]

PLAIN_SECONDS = 5.0  # least time between two progress lines of a PlainDisplay
PLAIN_CLIENTS = 4  # clients that one progress line names
FEW_CLIENTS = 8  # a federation of at most so many clients shows each of them, if they fit
SAMPLE_LINES, SAMPLE_LINE_LENGTH = 8, 1200
LABEL_LENGTH = 40
NARROW_LABEL = 24  # columns of a label on a terminal that is not wide
MIN_BAR, MAX_BAR = 6, 40  # a narrower bar is not drawn, and a wider one is no clearer
MAX_NOTES = 20  # newest notes and clients left out that are shown
WIDE = 110  # a terminal with so many columns shows the sample beside the table
MAX_REASON = 300  # characters of a reason or a note
TABLE_HEADER = f"{'round':>5}  {'train loss':>10}  {'val loss':>8}  {'perplexity':>10}  {'time':>8}"


def visible(text: str, *, lines: bool = False) -> str:
    """Return text that cannot control the terminal.

    Control characters, such as the first character of an ANSI escape, become U+FFFD. So do
    invisible characters that change the direction of text. With `lines`, line ends stay.
    """
    text = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(
        char if unicodedata.category(char)[0] != "C" or (lines and char == "\n") else "\ufffd"
        for char in text
    )


def fitted(text: str, width: int) -> str:
    """Return text of exactly `width` terminal columns: padded, or cropped with an ellipsis."""
    if cell_len(text) > width:
        text = set_cell_size(text, max(width - 1, 0)) + "…"
    return set_cell_size(text, width)


def shortened(text: str, length: int) -> str:
    """Return one visible line of at most `length` characters."""
    text = visible(text[: length + 1])
    return text if len(text) <= length else text[: length - 1] + "…"


def value(event: Mapping[str, Any], key: str) -> str:
    """Return a value of an event as text, or `-` if it is missing."""
    found = event.get(key)
    return "-" if found is None else str(found)


def duration(seconds: float | None) -> str:
    """Return `65` as `1:05`, and `3605` as `1:00:05`."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def number(value: float | None, digits: int = 0) -> str:
    """Return a number with `digits` decimals. If it is very large, use scientific notation."""
    if value is None:
        return "-"
    return (
        f"{value:,.{digits}f}"
        if abs(value) < 10 ** (8 - digits if digits else 12)
        else f"{value:.1e}"
    )


@dataclass
class Client:
    """The newest state of one client in the round that is running."""

    label: str  # as the client sent it
    name: str  # the label as it is shown
    state: str = "waiting"  # or "training", "trained", "evaluating", "done", "left out"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    updated: int = 0  # number of the event that changed the client last

    @property
    def active(self) -> bool:
        """True while the client trains or evaluates."""
        return self.state in ("training", "evaluating")

    @property
    def fraction(self) -> float:
        """The share of this round's training steps that is done."""
        if self.state in ("trained", "evaluating", "done"):
            return 1.0
        return min(self.step / self.steps, 1.0) if self.steps else 0.0


@dataclass
class Run:
    """The state of a run, put together from its progress events."""

    clock: Clock
    stage: str = ""  # what the command waits for; empty while clients work
    plan: Mapping[str, Any] = field(default_factory=dict)
    rounds: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # the finished ones
    clients: dict[str, Client] = field(default_factory=dict)
    left_out: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sample: tuple[int, list[str]] | None = None  # round and visible lines
    events: int = 0

    def __post_init__(self) -> None:
        self.started = self._round_started = self.clock()
        self._round = 0  # newest round that a client has worked on

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one progress event. Late events of finished rounds change no client."""
        self.events += 1
        name, server_round = event.get("event"), event.get("round") or 0
        if name in ("plan", "client", "evaluate"):
            self.stage = ""
        if name == "plan":
            self.plan = event
        elif name in ("client", "evaluate") and server_round >= self.current_round:
            self._add_client(server_round, event)
        elif name == "sample":
            self.sample = (server_round, sample_lines(value(event, "text")))
        elif name == "left-out":
            label = value(event, "client")
            key = (value(event, "phase"), label, value(event, "reason"))
            self.left_out.setdefault(key, []).append(server_round)
            if label in self.clients and server_round == self._round:
                self.clients[label].state = "left out"
        elif name == "note":
            self.notes.append(value(event, "text"))
        elif name == "round":
            self.rounds[server_round] = event
            if event.get("replayed") and self.sample and self.sample[0] == server_round:
                self.sample = None
            self._round_started = self.clock()
            for client in self.clients.values():
                if client.state not in ("waiting", "left out"):
                    client.state = "done"

    def _add_client(self, server_round: int, event: Mapping[str, Any]) -> None:
        if server_round > self._round:
            self._round, self._round_started = server_round, self.clock()
            self.clients = {c.label: Client(c.label, c.name) for c in self.clients.values()}
        label = value(event, "client")
        client = self.clients.setdefault(label, Client(label, shortened(label, LABEL_LENGTH)))
        client.updated = self.events
        if event["event"] == "evaluate":
            client.state = "evaluating"
            return
        client.step, client.steps = event.get("step") or 0, event.get("steps") or 0
        client.loss = event.get("loss")
        client.tokens_per_second = event.get("tokens_per_second")
        client.seconds_left = event.get("seconds_left")
        client.state = "trained" if client.step >= client.steps > 0 else "training"

    @property
    def first_round(self) -> int:
        """The first round that this command trains. It is above 1 in a resumed run."""
        return int(self.plan.get("first_round") or 1)

    @property
    def finished(self) -> int:
        """The number of finished training rounds."""
        return max(self.rounds, default=0)

    @property
    def total(self) -> int:
        """The number of training rounds of the whole run."""
        return int(self.plan.get("rounds") or 0)

    @property
    def current_round(self) -> int:
        """The round that is running, or will run next. After the last round it is one more."""
        return max(self._round, self.finished + 1, self.first_round)

    @property
    def client_count(self) -> int:
        """The number of clients that the plan names, or more if more have reported."""
        return max(int(self.plan.get("clients") or 0), len(self.clients))

    @property
    def elapsed(self) -> float:
        """The seconds since the display was made."""
        return self.clock() - self.started

    @property
    def tokens_per_second(self) -> float:
        """The training speed of all clients that train at the moment."""
        training = (c for c in self.clients.values() if c.state == "training")
        return sum(client.tokens_per_second or 0.0 for client in training)

    @property
    def round_fraction(self) -> float:
        """The share of the running round's training steps that is done."""
        if self._round <= self.finished:
            return 0.0
        return sum(c.fraction for c in self.clients.values()) / self.client_count

    @property
    def seconds_left(self) -> float | None:
        """The estimated time until the last round ends, or None if it is too early to tell.

        A round is expected to take as long as the last three rounds did on average. In the first
        round, the expected time follows from the share of the steps that is done.
        """
        spent = self.clock() - self._round_started
        own = (r for n, r in self.rounds.items() if n > 0 and not r.get("replayed"))
        times = [r["seconds"] for r in own if r.get("seconds") is not None]
        if times:
            expected = fmean(times[-3:])
        elif self.round_fraction >= 0.05:
            expected = spent / self.round_fraction
        else:
            return None
        others = max(self.total - self.finished - 1, 0)
        return others * expected + max(expected - spent, 0.0)

    def others(self, shown: list[Client]) -> str:
        """Return a line about the clients that are not shown: `and 12 more: 12 waiting`."""
        count = self.client_count - len(shown)
        if not count:
            return ""
        if not self.clients:
            return f"waiting for {count} client{'s' * (count > 1)}"
        states = Counter(c.state for c in self.clients.values() if c not in shown)
        states["waiting"] += self.client_count - len(self.clients)
        named = ", ".join(f"{n} {state}" for state, n in sorted(states.items()) if n)
        return f"and {count} more: {named}" if shown else f"{count} clients: {named}"

    def outcome(self) -> str:
        """Return the last line of the display."""
        rounds = f"{self.finished} of {self.total} rounds" if self.plan else "no round finished"
        return f"{rounds}, {duration(self.elapsed)} elapsed"


def plan_lines(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the name and the text of each line that describes the plan of a run."""
    if not plan:
        return []

    def shown(key: str) -> str:
        found = plan.get(key)
        return number(found) if isinstance(found, int) else shortened(value(plan, key), MAX_REASON)

    lines = [
        (
            "text",
            f"{shown('text')}, {shown('characters')} characters, "
            f"{shown('clients')} client{'s' * (plan.get('clients') != 1)}, {shown('partition')}",
        ),
        (
            "model",
            f"{shown('parameters')} parameters on {shown('device')}, {shown('precision')}, "
            f"compile {shown('compile')}",
        ),
        (
            "training",
            f"{shown('rounds')} round{'s' * (plan.get('rounds') != 1)} x {shown('steps')} steps, "
            f"{shown('tokens_per_round')} tokens a round, {shown('tokens')} in all",
        ),
    ]
    if (first := plan.get("first_round") or 1) > 1:
        lines.append(("resumed", f"goes on after round {first - 1}"))
    if auto := plan.get("auto"):
        # A long reason comes last, so that a short terminal crops no other value.
        became = sorted(
            (f"{key} = {shortened(str(auto[key]), MAX_REASON)}" for key in auto), key=len
        )
        lines.append(("auto", "; ".join(became)))
    lines += [("note", shortened(note, MAX_REASON)) for note in plan.get("notes") or []]
    if directory := plan.get("directory"):
        path = Path(directory)
        if path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        lines.append(("run", visible(str(path))))
    return lines


def sample_lines(text: str) -> list[str]:
    """Return the first visible lines of a sample, without empty ones at its start and end."""
    lines = visible(text, lines=True).strip("\n").split("\n")[:SAMPLE_LINES]
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    return [line[:SAMPLE_LINE_LENGTH] for line in lines]


def table_row(result: Mapping[str, Any]) -> str:
    """Return the table's row for a finished round."""
    val_loss = result.get("val_loss")
    if val_loss is None:
        val_loss = result.get("client_val_loss")
    seconds = None if result.get("replayed") else result.get("seconds")
    return (
        f"{result.get('round', 0):>5}  {number(result.get('train_loss'), 4):>10}  "
        f"{number(val_loss, 4):>8}  {number(result.get('perplexity'), 2):>10}  "
        f"{duration(seconds):>8}"
    )


class Display(ABC):
    """The display of one run. Use it as a context manager, and from one thread only."""

    def __init__(
        self, console: Console, *, verbose: bool = False, clock: Clock = time.monotonic
    ) -> None:
        self.console = console
        self.verbose = verbose
        self.run = Run(clock)
        if isinstance(console.file, io.TextIOWrapper):
            # A sample can hold characters that the encoding of a terminal or pipe lacks.
            console.file.reconfigure(errors="replace")

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Show the final state."""

    @abstractmethod
    def event(self, event: Mapping[str, Any]) -> None:
        """Take in one progress event of the run."""

    @abstractmethod
    def stage(self, text: str) -> None:
        """Say what the command waits for, until clients report."""

    @abstractmethod
    def tick(self) -> None:
        """Show the current state. Call this about five times a second."""

    @abstractmethod
    def _print(self, text: str) -> None:
        """Print one line that stays."""

    def log(self, line: str) -> None:
        """Print a line of the run's log, if the display is verbose. Its colours are removed."""
        if self.verbose:
            self._print(visible(Text.from_ansi(line).plain, lines=True))


class PlainDisplay(Display):
    """The display for pipes and files: plain lines without escape codes."""

    def __init__(
        self, console: Console, *, verbose: bool = False, clock: Clock = time.monotonic
    ) -> None:
        super().__init__(console, verbose=verbose, clock=clock)
        self._printed_at = -math.inf
        self._printed_events = 0
        self._header_printed = False

    def __exit__(self, *_: object) -> None:
        self._print(self.run.outcome())

    def event(self, event: Mapping[str, Any]) -> None:
        """Take in one event. A plan, a finished round, a left-out client and a note are printed."""
        self.run.add(event)
        name = event.get("event")
        if name == "plan":
            for title, text in plan_lines(event):
                self._print(f"{title:<8}  {text}")
        elif name == "round":
            self._print_round(event)
        elif name == "left-out":
            self._print(
                f"left out of {visible(value(event, 'phase'))} in round {value(event, 'round')}: "
                f"{shortened(value(event, 'client'), LABEL_LENGTH)}: "
                f"{shortened(value(event, 'reason'), MAX_REASON)}"
            )
        elif name == "note":
            self._print(f"note: {shortened(value(event, 'text'), MAX_REASON)}")

    def stage(self, text: str) -> None:
        """Print what the command waits for."""
        if text != self.run.stage:
            self.run.stage = text
            self._print(visible(text))

    def tick(self) -> None:
        """Print a progress line if the last one is five seconds old and clients have reported."""
        working = any(client.active for client in self.run.clients.values())
        late = self.run.clock() - self._printed_at >= PLAIN_SECONDS
        if working and late and self.run.events > self._printed_events:
            self._printed_at, self._printed_events = self.run.clock(), self.run.events
            self._print(self._progress())

    def _progress(self) -> str:
        """Return one line about the round, its clients, their speed and the time left."""
        # Of a large federation, only clients that work now are named.
        few = self.run.client_count <= PLAIN_CLIENTS
        named = [client for client in self.run.clients.values() if few or client.active]
        shown = sorted(named, key=lambda client: client.label)[:PLAIN_CLIENTS]
        clients = [
            f"{client.name}: "
            + (
                f"step {client.step}/{client.steps} loss {number(client.loss, 2)}"
                if client.state == "training"
                else client.state
            )
            for client in shown
        ]
        parts = [
            f"round {self.run.current_round}/{self.run.total or '-'}",
            ", ".join([*clients, *filter(None, [self.run.others(shown)])]),
        ]
        if speed := self.run.tokens_per_second:
            parts.append(f"{number(speed)} tokens/s")
        if (seconds := self.run.seconds_left) is not None:
            parts.append(f"{duration(seconds)} left")
        return "  ".join(parts)

    def _print_round(self, result: Mapping[str, Any]) -> None:
        if not self._header_printed:
            self._print(TABLE_HEADER)
            self._header_printed = True
        self._print(table_row(result))
        if self.run.sample and self.run.sample[0] == result.get("round"):
            for line in self.run.sample[1]:
                self._print(f"      | {shortened(line, WIDE)}".rstrip())

    def _print(self, text: str) -> None:
        self.console.out(text, highlight=False)


@dataclass
class Block:
    """A part of the live screen. `body(n)` returns its n most important lines."""

    wanted: int
    body: Callable[[int], list[Text]]
    heading: list[Text] = field(default_factory=lambda: [Text()])  # a blank line

    def lines(self, count: int) -> list[Text]:
        """Return the heading and `count` lines, or nothing if `count` is 0."""
        return [*self.heading, *self.body(count)] if count else []


def cropped(lines: list[Text], count: int) -> list[Text]:
    """Return the first `count` lines. The last one ends with an ellipsis if others follow."""
    if count >= len(lines):
        return lines
    return [*lines[: count - 1], Text.assemble(lines[count - 1], " …")]


# The lines that each block of the live screen may have, in order of importance. A later entry
# raises the limit of its block. If the terminal is full, the entries that follow get nothing.
SHARES = [
    ("round", 1),
    ("rows", 1),
    ("clients", 2),
    ("plan", 3),
    ("clients", 4),
    ("notes", 2),
    ("rows", 3),
    ("clients", FEW_CLIENTS),
    ("plan", 5),
    ("rows", 6),
    ("sample", 3),
    ("notes", 4),
    ("rows", 12),
    ("sample", SAMPLE_LINES),
    ("plan", 1000),
    ("notes", 1000),
    ("clients", 1000),
    ("rows", 1000),
]
BESIDE = len(TABLE_HEADER) + 4  # column of the sample that stands beside the table


class LiveDisplay(Display):
    """The display for a terminal. It redraws one area that is never taller than the terminal."""

    def __init__(
        self, console: Console, *, verbose: bool = False, clock: Clock = time.monotonic
    ) -> None:
        super().__init__(console, verbose=verbose, clock=clock)
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._slots: list[str] = []  # the labels on the lines of the clients
        self._most_clients = FEW_CLIENTS  # it only grows, so that the lines below stay in place
        self._drawn: list[Text] = []
        self._size = console.size
        utf = console.encoding.lower().startswith("utf")
        self._full, self._half, self._empty = "━╸─" if utf else "##-"

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        blocks = self._blocks(bars=False).values()
        lines = [line for block in blocks for line in block.lines(block.wanted)]
        try:
            self._draw([*lines, Text(), Text(self.run.outcome(), style="bold")][1:])
        finally:
            self._live.stop()

    def event(self, event: Mapping[str, Any]) -> None:
        """Take in one event. The next `tick` shows it."""
        self.run.add(event)

    def stage(self, text: str) -> None:
        """Show what the command waits for, in the place of the bar of the rounds."""
        self.run.stage = text
        self.tick()

    def tick(self) -> None:
        """Draw the screen again if anything has changed."""
        if self._size != self.console.size:
            # A terminal that became narrower has wrapped the lines of the last drawing.
            self._size = self.console.size
            self._drawn = []
            self.console.control(Control.clear(), Control.home())
        self._draw(self._fit(self._size.height - 1))

    def _print(self, text: str) -> None:
        self.console.print(Text(text))

    def _draw(self, lines: list[Text]) -> None:
        for line in lines:
            line.truncate(self._size.width, overflow="ellipsis")
            line.no_wrap = True
        if lines != self._drawn:
            self._drawn = lines
            self._live.update(Group(*lines), refresh=True)

    def _fit(self, height: int) -> list[Text]:
        """Return at most `height` lines: the most important ones of each block."""
        blocks = self._blocks()
        given = dict.fromkeys(blocks, 0)
        free = height + 1  # the blank line of the first block is not drawn
        for name, limit in SHARES:
            if name in blocks:
                block = blocks[name]
                heading = 0 if given[name] else len(block.heading)
                extra = min(min(limit, block.wanted) - given[name], free - heading)
                if extra > 0:
                    given[name] += extra
                    free -= extra + heading
        return [line for name in blocks for line in blocks[name].lines(given[name])][1:]

    def _blocks(self, *, bars: bool = True) -> dict[str, Block]:
        """Return the blocks of the screen from top to bottom."""
        width = self._size.width
        plan = [
            line
            for name, text in plan_lines(self.run.plan)
            for line in self._named(name, text, "dim")
        ]
        blocks = {"plan": Block(len(plan), lambda n: cropped(plan, n))}
        if bars:
            blocks |= self._bars()
        rows = [Text(table_row(self.run.rounds[n])) for n in sorted(self.run.rounds)]
        header = Text(TABLE_HEADER, style="dim")
        beside = width >= WIDE
        title, sample = self._sample(width - BESIDE if beside else width)
        if beside and rows and sample:

            def both(count: int) -> list[Text]:
                return [
                    Text.assemble(fitted(row.plain if row else "", BESIDE), line or "")
                    for row, line in zip_longest(rows[-count:], sample[:count])
                ]

            header = Text.assemble((fitted(TABLE_HEADER, BESIDE), "dim"), title)
            blocks["rows"] = Block(max(len(rows), len(sample)), both, [Text(), header])
        else:
            blocks["rows"] = Block(len(rows), lambda n: rows[-n:], [Text(), header])
            blocks["sample"] = Block(len(sample), lambda n: sample[:n], [Text(), title])
        notes = self._notes()
        blocks["notes"] = Block(len(notes), lambda n: cropped(notes, n))
        return blocks

    def _named(self, name: str, text: str, style: str) -> list[Text]:
        """Return a name in a narrow column, and the text that belongs to it in a wide one."""
        lines = Text(text).wrap(self.console, max(self._size.width - 10, 10))
        return [
            Text.assemble((fitted("" if n else name, 10), style), line)
            for n, line in enumerate(lines)
        ]

    def _notes(self) -> list[Text]:
        """Return the lines about clients that were left out, and the notes, newest first."""
        notes = []
        for phase, label, reason in list(reversed(self.run.left_out))[:MAX_NOTES]:
            rounds = self.run.left_out[phase, label, reason]
            when = f"{len(rounds)} rounds, last in " if len(rounds) > 1 else ""
            text = (
                f"{shortened(label, LABEL_LENGTH)}, {visible(phase)}, {when}round {rounds[-1]}: "
                f"{shortened(reason, MAX_REASON)}"
            )
            notes += self._named("left out", text, "yellow")
        if (more := len(self.run.left_out) - MAX_NOTES) > 0:
            notes += self._named("left out", f"{more} more times", "yellow")
        for note in reversed(self.run.notes[-MAX_NOTES:]):
            notes += self._named("note", shortened(note, MAX_REASON), "dim")
        return notes

    def _sample(self, width: int) -> tuple[Text, list[Text]]:
        """Return the title and the lines of the newest sample."""
        if self.run.sample is None:
            return Text(), []
        server_round, text = self.run.sample
        lines = Text("\n".join(text)).wrap(self.console, width)
        return Text(f"sample after round {server_round}", style="dim"), list(lines)[:SAMPLE_LINES]

    def _bar(self, fraction: float, width: int) -> Text:
        """Return a bar and the gap after it, or nothing if there is no room for a bar."""
        if width == 0:
            return Text()
        halves = int(fraction * width * 2)
        done = self._full * (halves // 2) + self._half * (halves % 2)
        style = "green" if fraction >= 1 else "cyan"
        return Text.assemble((done, style), (self._empty * (width - len(done)), "dim"), "  ")

    def _bars(self) -> dict[str, Block]:
        """Return the bar of the rounds with those of the clients, or the current stage."""
        run = self.run
        if run.stage or not run.plan:
            stage = Text(f"{visible(run.stage) or 'waiting'} … {duration(run.elapsed)}")
            return {"round": Block(1, lambda _: [stage])}
        wide = self._size.width >= WIDE
        clients = list(run.clients.values())
        title = f"round {min(run.current_round, run.total)} of {run.total}"
        # All clients count, not only those that are shown, so that the columns do not move.
        step = max([7, *(2 * len(str(client.steps)) + 1 for client in clients)])
        label = max([len(title), *(cell_len(client.name) for client in clients)])
        label = min(label, LABEL_LENGTH if wide else NARROW_LABEL)
        free = self._size.width - len("  ") - (step + len("  12.345  1,234,567   0:40 left"))
        bar = min(free - label - len("  "), MAX_BAR)
        if bar < MIN_BAR:
            bar, label = 0, max(min(label, free), len(title))

        fraction = min((run.finished + run.round_fraction) / max(run.total, 1), 1.0)
        times = f"{duration(run.elapsed)} elapsed"
        if (seconds := run.seconds_left) is not None and run.finished < run.total:
            times += f", about {duration(seconds)} left"
        if wide and run.tokens_per_second:
            times += f", {number(run.tokens_per_second)} tokens/s"
        bar_of_rounds = Text.assemble(
            (fitted(title, label), "bold"), "  ", self._bar(fraction, bar), times
        )

        def client_line(client: Client) -> Text:
            steps = f"{client.step}/{client.steps}" if client.steps else "-"
            figures = (
                f"{steps:>{step}}  {number(client.loss, 3):>6}  "
                f"{number(client.tokens_per_second):>9}"
            )
            state, style = client.state, "" if client.active else "dim"
            if state == "training":
                state = f"{duration(client.seconds_left)} left"
            elif state == "left out":
                style = "yellow"
            name = fitted(client.name, label)
            bar_of_client = self._bar(client.fraction, bar)
            return Text.assemble(name, "  ", bar_of_client, figures, (f"{state:>12}", style))

        def client_lines(count: int) -> list[Text]:
            # The last line is about the clients for which there is no room.
            shown = self._chosen(count if count >= run.client_count else count - 1)
            others = run.others(shown)
            return [*map(client_line, shown), *([Text(others, style="dim")] if others else [])]

        columns = f"{'step':>{step}}  {'loss':>6}  {'tokens/s':>9}"
        gap = fitted("client", label + 2 + (bar + 2 if bar else 0))
        heading = [Text(gap + columns, style="dim")] if clients else []
        self._most_clients = max(self._most_clients, sum(client.active for client in clients))
        shown = min(len(clients), self._most_clients)
        return {
            "round": Block(1, lambda _: [bar_of_rounds]),
            "clients": Block(shown + (shown < run.client_count), client_lines, heading),
        }

    def _chosen(self, count: int) -> list[Client]:
        """Return the clients to show, those that work now first. A client keeps its line."""
        clients = self.run.clients
        if len(clients) <= count:
            self._slots = sorted(clients)
        else:
            ranked = sorted(clients.values(), key=lambda c: (not c.active, -c.updated, c.label))
            chosen = [client.label for client in ranked[:count]]
            new = iter([label for label in chosen if label not in self._slots[:count]])
            kept = [label if label in chosen else next(new) for label in self._slots[:count]]
            self._slots = [*kept, *new]
        return [clients[label] for label in self._slots]


def make_display(
    console: Console, *, verbose: bool = False, clock: Clock = time.monotonic
) -> Display:
    """Return a live display for a terminal that can move its cursor, and a plain one otherwise."""
    live = console.is_terminal and not console.is_dumb_terminal
    return (LiveDisplay if live else PlainDisplay)(console, verbose=verbose, clock=clock)
