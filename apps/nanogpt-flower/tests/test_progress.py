"""Events that one process writes and another reads, and signals that wait for a safe moment."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanogpt_flower import progress
from nanogpt_flower.interrupts import ENDING_SIGNALS, deferred, handle_signals


def test_without_the_variable_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    progress.emit("round", round=1)
    assert list(tmp_path.iterdir()) == []


def test_events_of_several_processes_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "events"
    monkeypatch.setenv(progress.VARIABLE, str(file))
    program = (
        "from nanogpt_flower import progress\n"
        "for i in range(300): progress.emit('sample', round=i, text='x' * 5000)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    lines, found = progress.Lines(file), []
    while any(process.poll() is None for process in processes):
        found += lines.new()
    found += lines.new()
    events = [json.loads(line) for line in found]
    assert len(events) == 900
    assert sorted(event["round"] for event in events) == sorted([*range(300)] * 3)


def test_an_unfinished_line_is_read_when_it_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "events"
    lines = progress.Lines(file)
    assert lines.new() == []
    for text, expected in (("a\nb", ["a"]), ("", []), ("c\n", ["bc"])):
        with file.open("a") as output:
            output.write(text)
        assert lines.new() == expected


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    handle_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING_SIGNALS)
@pytest.mark.usefixtures("handlers")
def test_an_ending_signal_interrupts_once(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    for later in ENDING_SIGNALS:
        os.kill(os.getpid(), later)  # ignored while the program ends


@pytest.mark.usefixtures("handlers")
def test_a_deferred_signal_interrupts_at_the_end_of_the_outer_context() -> None:
    reached = []

    def clean_up() -> None:
        with deferred():
            with deferred():
                os.kill(os.getpid(), signal.SIGINT)
                reached.append("inner")
            reached.append("outer")

    with pytest.raises(KeyboardInterrupt):
        clean_up()
    assert reached == ["inner", "outer"]
    with deferred():  # the signal interrupts only once
        reached.append("clean-up")


@pytest.mark.usefixtures("handlers")
def test_an_error_in_the_context_is_not_hidden_by_the_signal() -> None:
    def fail() -> None:
        with deferred():
            os.kill(os.getpid(), signal.SIGINT)
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
