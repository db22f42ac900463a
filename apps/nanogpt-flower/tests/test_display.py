import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from nanogpt_flower.local.display import (
    Display,
    LiveDisplay,
    PlainDisplay,
    duration,
    make_display,
    visible,
)

SIZES = [(80, 24), (140, 40), (60, 12), (40, 8)]
# The codes with which rich goes back to the first line of the live area.
REDRAW = re.compile(r"\r\x1b\[2K(?:\x1b\[1A\x1b\[2K)*")
CODE = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")

PLAN = {
    "event": "plan",
    "text": "nine-plays",
    "characters": 1115394,
    "clients": 2,
    "partition": "contiguous",
    "parameters": 809856,
    "rounds": 4,
    "steps": 200,
    "tokens_per_round": 307200,
    "tokens": 1228800,
    "device": "cpu",
    "precision": "bf16",
    "compile": "off",
    "first_round": 1,
    "auto": {"device": "cpu", "corpus": "nine-plays: Tiny Shakespeare is not available"},
    "notes": ["Small differences are expected."],
    "directory": "/runs/quick",
}


class Clock:
    """A clock that a test moves by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Shown:
    """A display that writes to a string."""

    def __init__(self, width: int = 80, height: int = 24, *, live: bool = True, **options: Any):
        self.file = io.StringIO()
        self.clock = Clock()
        self.console = Console(
            file=self.file,
            force_terminal=live,
            width=width,
            height=height,
            color_system=None,
            _environ={},
        )
        self.display: Display = make_display(self.console, clock=self.clock, **options)

    def feed(self, *events: dict[str, Any], seconds: float = 0.0) -> None:
        for event in events:
            self.display.event(event)
        self.clock.now += seconds
        self.display.tick()

    @property
    def frames(self) -> list[list[str]]:
        """The lines of each drawing of a live display."""
        return [CODE.sub("", f).split("\n") for f in REDRAW.split(self.file.getvalue())]

    @property
    def screen(self) -> str:
        return "\n".join(self.frames[-1])

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def training(
    client: str = "partition 0000 of 2", server_round: int = 1, step: int = 120, **changes: Any
) -> dict[str, Any]:
    return {
        "event": "client",
        "round": server_round,
        "client": client,
        "step": step,
        "steps": 200,
        "loss": 2.31,
        "tokens_per_second": 5120.0,
        "seconds_left": 40.0,
        **changes,
    }


def finished(server_round: int, **changes: Any) -> dict[str, Any]:
    return {
        "event": "round",
        "round": server_round,
        "train_loss": 2.1,
        "val_loss": 2.0,
        "client_val_loss": 2.05,
        "perplexity": 7.389,
        "clients": 2,
        "seconds": 65.2,
        **changes,
    }


def sample(server_round: int, text: str) -> dict[str, Any]:
    return {"event": "sample", "round": server_round, "text": text}


def left_out(server_round: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "event": "left-out",
        "round": server_round,
        "phase": "train",
        "client": "partition 0001 of 2",
        "reason": "the update is too long",
        **changes,
    }


def feed_whole_run(shown: Shown, clients: int = 2) -> None:
    labels = [f"partition {n:04} of {clients}" for n in range(clients)]
    with shown.display as display:
        display.stage("starting the SuperLink")
        shown.feed({**PLAN, "clients": clients}, seconds=1)
        for server_round in range(15):
            for start in range(0, clients, 20):
                some = labels[start : start + 20]
                shown.feed(*(training(label, server_round) for label in some))
            name = {"event": "evaluate", "round": server_round}
            shown.feed(*(name | {"client": label} for label in labels))
            shown.feed(sample(server_round, "ROMEO: 中文😀 " * 40 + "\n" * 9 + "x"))
            shown.feed(left_out(server_round, reason="too long " * server_round))
            shown.feed({"event": "note", "text": "A note."})
            shown.feed(finished(server_round), seconds=60)
        shown.feed({"event": "end"})


@pytest.mark.parametrize("clients", [2, 9, 100])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_live_area_stays_inside_the_terminal(width: int, height: int, clients: int) -> None:
    shown = Shown(width, height)
    feed_whole_run(shown, clients)
    assert len(shown.frames) > 20
    assert all(cell_len(line) <= width for frame in shown.frames for line in frame)
    # Only the last drawing may be taller. The terminal scrolls, and nothing is drawn after it.
    assert all(len(frame) <= height for frame in shown.frames[:-1])


@pytest.mark.parametrize("width", [80, 140])
def test_live_area_shows_plan_bars_table_sample_and_left_out(width: int) -> None:
    shown = Shown(width)
    with shown.display:
        shown.feed(PLAN, sample(0, "ROMEO: zzq"), finished(0, train_loss=None), seconds=60)
        shown.feed(training(), training("partition 0001 of 2", step=200), left_out())
        for text in (
            "nine-plays, 1,115,394 characters, 2 clients, contiguous",
            "809,856 parameters on cpu, bf16, compile off",
            "4 rounds x 200 steps, 307,200 tokens a round, 1,228,800 in all",
            "Tiny Shakespeare is not available",
            "round 1 of 4",
            "1:00 elapsed",
            "120/200   2.310      5,120   0:40 left",
            "    0           -    2.0000        7.39      1:05",
            "sample after round 0",
            "ROMEO: zzq",
            "partition 0001 of 2, train, round 1: the update is too long",
        ):
            assert text in shown.screen
        beside = any("round  train loss" in x and "sample after" in x for x in shown.frames[-1])
        assert beside == (width == 140)


def test_bar_shows_the_share_of_steps() -> None:
    shown = Shown()
    with shown.display:
        shown.feed(PLAN, training(step=100))
        (line,) = [line for line in shown.frames[-1] if "100/200" in line]
        full, half, empty = (line.count(char) for char in "━╸─")
    assert abs((full + half / 2) / (full + half + empty) - 0.5) < 0.05


def test_client_goes_from_training_over_evaluating_to_done() -> None:
    shown = Shown()
    states = []
    with shown.display:
        for event in (
            PLAN | {"clients": 1},
            training(),
            training(step=200),
            {"event": "evaluate", "round": 1, "client": "partition 0000 of 2"},
            finished(1),
            training(server_round=2, step=1),
        ):
            shown.feed(event)
            found = [line for line in shown.frames[-1] if line.startswith("partition")]
            states += [line.split("  ")[-1].strip() for line in found]
    assert states == ["0:40 left", "trained", "evaluating", "done", "0:40 left"]


def test_large_federation_shows_the_clients_that_train_and_counts_the_others() -> None:
    shown = Shown()
    with shown.display:
        shown.feed(PLAN | {"clients": 100})
        assert "waiting for 100 clients" in shown.screen
        for n in range(50):
            shown.feed(training(f"partition {n:04} of 100", step=200))
        shown.feed(training("partition 0003 of 100"), training("partition 0007 of 100"))
        assert "partition 0003 of 100" in shown.screen
        assert "partition 0007 of 100" in shown.screen
        shown_clients = shown.screen.count(" of 100")
        trained = 50 - shown_clients
        expected = f"and {100 - shown_clients} more: {trained} trained, 50 waiting"
        assert expected in shown.screen


def test_terminal_without_room_for_clients_counts_them() -> None:
    shown = Shown(height=7)
    with shown.display:
        shown.feed(PLAN | {"clients": 3}, finished(0), training(), training("b", step=200))
        assert "3 clients: 1 trained, 1 training, 1 waiting" in shown.screen


def test_huge_perplexity_keeps_the_columns() -> None:
    shown = Shown(live=False)
    with shown.display:
        shown.feed(finished(1, perplexity=1.01e304), finished(2, perplexity=999999.0))
    assert shown.lines[1].endswith("    1.0e+304      1:05")
    assert len({len(line) for line in shown.lines[:3]}) == 1


def test_clients_keep_their_lines() -> None:
    shown = Shown()

    def lines() -> list[str]:
        return [line.split("  ")[0] for line in shown.frames[-1] if " of 100 " in line]

    with shown.display:
        shown.feed(PLAN | {"clients": 100})
        for n in range(20):
            shown.feed(training(f"partition {n:04} of 100"))
        before = lines()
        shown.feed(training(before[2], step=200))
        after = lines()
    assert len(before) == len(after)
    assert [n for n in range(len(before)) if before[n] != after[n]] == [2]


def test_last_screen_has_the_whole_table_and_no_bars() -> None:
    shown = Shown(height=12)
    with shown.display:
        shown.feed(PLAN | {"rounds": 30}, training())
        for server_round in range(31):
            shown.feed(finished(server_round))
        assert "\n    9  " not in shown.screen
        shown.clock.now = 3600
        shown.feed({"event": "end"})
    rows = [line for line in shown.frames[-1] if re.match(r" +\d+  ", line)]
    assert [int(row.split()[0]) for row in rows] == list(range(31))
    assert "━" not in shown.screen
    assert "partition 0000" not in shown.screen
    assert "30 of 30 rounds, 1:00:00 elapsed" in shown.screen


def test_exception_ends_the_live_area() -> None:
    shown = Shown()

    def interrupted() -> None:
        with shown.display:
            shown.feed(PLAN, finished(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "1 of 4 rounds" in shown.screen
    assert shown.file.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is back


def test_unchanged_screen_is_not_drawn_again() -> None:
    shown = Shown()
    with shown.display as display:
        shown.feed(PLAN, training())
        before = shown.file.getvalue()
        display.tick()
        assert shown.file.getvalue() == before


def test_narrower_terminal_gets_narrower_lines() -> None:
    shown = Shown(140, 40)
    with shown.display:
        shown.feed(PLAN, training(), finished(0))
        shown.console.size = (60, 12)  # type: ignore[assignment]
        shown.feed(training(step=121))
        assert len(shown.frames[-1]) <= 12
        assert all(cell_len(line) <= 60 for line in shown.frames[-1])
        assert "121/200" in shown.screen


def test_stage_is_shown_until_the_plan_is_there() -> None:
    shown = Shown()
    with shown.display as display:
        display.stage("starting 2 SuperNodes")
        shown.feed(seconds=12)
        assert "starting 2 SuperNodes … 0:12" in shown.screen
        shown.feed(PLAN)
        assert "SuperNodes" not in shown.screen


@pytest.mark.parametrize("live", [True, False])
def test_untrusted_text_is_literal_and_cannot_control_the_terminal(live: bool) -> None:
    shown = Shown(live=live, verbose=True)
    evil = "[red]x[/red]\x1b[31m\x1b]0;title\x07\u202e\nsecond"
    with shown.display as display:
        display.stage(evil)
        display.log("\x1b[92mINFO\x1b[0m :smile: " + evil)
        shown.feed(PLAN | {"text": evil, "auto": {"corpus": evil}, "notes": [evil]})
        shown.feed(training(evil), left_out(client=evil, reason=evil, phase=evil))
        shown.feed({"event": "note", "text": evil}, sample(1, evil), finished(1))
        shown.clock.now += 9
        shown.feed(training(evil, 2))
    written = shown.file.getvalue()
    for code in ("\x1b[31m", "\x1b]", "\x1b[92m", "\x07", "\u202e"):
        assert code not in written
    assert ("\x1b" in written) == live
    assert "INFO :smile: [red]x[/red]" in written
    assert written.count("[red]x[/red]\ufffd") >= 6


@pytest.mark.parametrize("live", [True, False])
def test_any_order_of_events_and_missing_values_are_shown(live: bool) -> None:
    shown = Shown(live=live)
    with shown.display:
        shown.feed({"event": "round", "round": 2})
        shown.feed({"event": "client", "round": 1, "client": "late"})
        shown.feed({"event": "evaluate", "round": 3, "client": "unknown"})
        shown.feed({"event": "client", "round": 3, "client": "unknown"})
        shown.feed(left_out(3, client="node 123", reason=None))
        shown.feed({"event": "sample", "round": 3}, {"event": "unheard of"}, {})
        shown.feed({"event": "plan"}, {"event": "round"}, {"event": "client"})
        shown.feed(PLAN)
        text = shown.screen if live else shown.file.getvalue()
    assert "    2           -         -           -         -" in text
    assert "node 123" in text
    assert "late" not in text


def test_clients_loss_stands_in_for_a_server_without_text() -> None:
    shown = Shown(live=False)
    with shown.display:
        shown.feed(finished(1, val_loss=None))
    assert "    1      2.1000    2.0500        7.39      1:05" in shown.lines


@pytest.mark.parametrize("live", [True, False])
def test_resumed_run_shows_earlier_rounds_without_time_and_sample(live: bool) -> None:
    shown = Shown(live=live)
    with shown.display:
        shown.feed(PLAN | {"first_round": 3})
        for server_round in range(3):
            shown.feed(sample(server_round, "old verse"), finished(server_round, replayed=True))
        shown.feed(training(server_round=3), sample(3, "new verse"))
        if live:
            assert "round 3 of 4" in shown.screen
        shown.feed(finished(3))
        text = shown.screen if live else shown.file.getvalue()
    assert "goes on after round 2" in text
    assert text.count("    2.0000        7.39         -") == 3
    assert "    3      2.1000    2.0000        7.39      1:05" in text
    assert "old verse" not in text
    assert "new verse" in text


def test_time_left_follows_from_finished_rounds() -> None:
    shown = Shown()
    with shown.display:
        shown.feed(PLAN, finished(0, seconds=1000), training())
        shown.feed(finished(1, seconds=60), training(server_round=2))
        shown.feed(seconds=20)
        assert "about 2:40 left" in shown.screen  # 40 s of this round and two rounds of 60 s


def test_time_left_in_the_first_round_follows_from_the_steps() -> None:
    shown = Shown()
    with shown.display:
        shown.feed(PLAN, training(step=1), training("partition 0001 of 2", step=1))
        assert "about" not in shown.screen
        shown.clock.now = 10
        shown.feed(training(step=50), training("partition 0001 of 2", step=50))
        assert "about 2:30 left" in shown.screen  # a quarter of the first of 4 rounds took 10 s


def test_plain_lines() -> None:
    shown = Shown(live=False)
    with shown.display as display:
        display.stage("starting the SuperLink")
        display.stage("starting the SuperLink")
        shown.feed(PLAN, finished(0, train_loss=None))
        shown.feed(training(), training("partition 0001 of 2", step=118, loss=2.35))
        shown.feed({"event": "note", "text": "A note."}, left_out())
        shown.feed(sample(1, "ROMEO:\n\nAy me!\n"), finished(1))
        shown.clock.now = 70
        shown.feed(finished(2), {"event": "end"})
    assert shown.lines == [
        "starting the SuperLink",
        "text      nine-plays, 1,115,394 characters, 2 clients, contiguous",
        "model     809,856 parameters on cpu, bf16, compile off",
        "training  4 rounds x 200 steps, 307,200 tokens a round, 1,228,800 in all",
        "auto      device = cpu; corpus = nine-plays: Tiny Shakespeare is not available",
        "note      Small differences are expected.",
        "run       /runs/quick",
        "round  train loss  val loss  perplexity      time",
        "    0           -    2.0000        7.39      1:05",
        "round 1/4  partition 0000 of 2: step 120/200 loss 2.31, "
        "partition 0001 of 2: step 118/200 loss 2.35  10,240 tokens/s  0:00 left",
        "note: A note.",
        "left out of train in round 1: partition 0001 of 2: the update is too long",
        "    1      2.1000    2.0000        7.39      1:05",
        "      | ROMEO:",
        "      |",
        "      | Ay me!",
        "    2      2.1000    2.0000        7.39      1:05",
        "2 of 4 rounds, 1:10 elapsed",
    ]


def test_plain_progress_line_comes_at_most_each_five_seconds() -> None:
    shown = Shown(live=False)
    with shown.display:
        shown.feed(PLAN)
        for step in range(150):  # 30 seconds
            shown.feed(training(step=step), seconds=0.2)
        progress = [line for line in shown.lines if line.startswith("round 1/4")]
        assert 5 <= len(progress) <= 7
        shown.feed(seconds=60)  # without news there is nothing to say
        shown.feed(seconds=60)
        assert len(shown.lines) <= 7 + len(progress)


def test_plain_progress_line_condenses_a_large_federation() -> None:
    shown = Shown(live=False)
    with shown.display:
        shown.feed(PLAN | {"clients": 100}, *(training(f"client {n}") for n in range(10, 40)))
    (line,) = [line for line in shown.lines if line.startswith("round 1/4")]
    assert line.count("step 120/200") == 4
    assert "and 96 more: 26 training, 70 waiting  153,600 tokens/s" in line


def test_log_lines_are_shown_only_if_verbose() -> None:
    for verbose in (True, False):
        shown = Shown(live=False, verbose=verbose)
        with shown.display as display:
            display.log("\x1b[92mINFO\x1b[0m Starting Flower")
        assert ("INFO Starting Flower" in shown.lines) == verbose


def test_log_lines_stand_above_the_live_area() -> None:
    shown = Shown(verbose=True)
    with shown.display as display:
        shown.feed(PLAN, training())
        display.log("INFO Starting Flower")
        assert shown.frames[-1][0] == "INFO Starting Flower"
        assert "120/200" in shown.screen


@pytest.mark.parametrize(
    ("terminal", "term", "kind"),
    [
        (True, "xterm", LiveDisplay),
        (True, "dumb", PlainDisplay),
        (False, "xterm", PlainDisplay),
    ],
)
def test_display_fits_the_terminal(terminal: bool, term: str, kind: Callable[..., Display]) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, _environ={"TERM": term})
    assert type(make_display(console)) is kind


def test_characters_that_the_output_cannot_encode_are_replaced() -> None:
    raw = io.BytesIO()
    with make_display(
        Console(file=io.TextIOWrapper(raw, encoding="ascii"), _environ={})
    ) as display:
        display.stage("waiting for 中文")
    assert raw.getvalue().splitlines()[0] == b"waiting for ??"


def test_visible_keeps_only_what_is_seen() -> None:
    assert visible("a\tb\r\nc\x1b[0m") == "a   b\ufffdc\ufffd[0m"
    assert visible("a\r\nb\x00", lines=True) == "a\nb\ufffd"
    assert visible("é 中 😀 [b]") == "é 中 😀 [b]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (float("inf"), "-"), (0.4, "0:00"), (65.2, "1:05"), (3605.0, "1:00:05")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
