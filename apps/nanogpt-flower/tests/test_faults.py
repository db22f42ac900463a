"""The runner of the fault matrix, and the fastest of its faults. `nox -s faults` tries all."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

if sys.platform == "win32":
    pytest.skip("the faults need Unix signals", allow_module_level=True)

from faults import __main__ as command
from faults import matrix
from faults.matrix import FAULTS, Outcome, Skipped, Unexpected, attempt, selected

pytestmark = pytest.mark.deployed

FAST = [
    "path_in_a_message",
    "one_window_in_one_step",
    "name_of_another_run",
    "declared_array_of_a_gibibyte",
    "label_that_is_a_digest_of_the_text",
    "header_with_deep_brackets",
    "object_that_flower_cannot_put_together",
    "num_examples_of_1e300",
    "metrics_near_the_largest_double",
    "error_reason_with_terminal_escapes",
    "reply_in_the_name_of_another",
    "nine_of_ten_refuse",
    "flipped_bit_in_the_arrays",
    "state_after_the_end_of_a_run",
]


@pytest.mark.parametrize("name", FAST)
def test_a_fault_ends_as_expected(name: str) -> None:
    result = attempt(FAULTS[name])
    assert result.status == "pass", f"{result.happened}\nexpected: {result.expected}"


def test_the_matrix_has_forty_faults_of_every_group_and_letter() -> None:
    assert len(FAULTS) >= 40
    entries = {(fault.group, fault.entry) for fault in FAULTS.values()}
    letters = {"A": "S1 S2 S3 S4 S5 P4", "B": "C1 C2 C3 C4 C5 C6 C7 C8 C9 A1 A2 P5 clip"}
    letters |= {"C": "D1 D2 D3 D4 P3 power disk"}
    letters |= {"network": "SuperLink SuperNode ServerApp clock slow link"}
    wanted = {(group, entry) for group, names in letters.items() for entry in names.split()}
    assert wanted <= entries
    for fault in FAULTS.values():
        assert fault.title
        assert fault.expected
        assert not fault.title.endswith(".")


@pytest.fixture
def three_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the faults by one that passes, one that fails and one that raises an error."""

    def good(directory: Path) -> Outcome:
        """A good one."""
        assert not list(directory.iterdir())
        return Outcome("as expected", 1.5, 1.25, "1 of 3 rounds")

    def bad(directory: Path) -> Outcome:
        """A bad one."""
        raise Unexpected("the run ended\x1b[2J\nwith | this", Outcome("", 2.0, 1.0, "everything"))

    def broken(directory: Path) -> Outcome:
        """A broken one."""
        raise KeyError("place")

    def impossible(directory: Path) -> Outcome:
        """One that only root can try."""
        raise Skipped("only root can mount")

    monkeypatch.setattr(matrix, "FAULTS", {})
    for fault, entry in ((good, "S1"), (bad, "C4"), (broken, "C4"), (impossible, "D1")):
        matrix.fault("A" if entry == "S1" else "B", entry, "expected")(fault)


@pytest.mark.usefixtures("three_faults")
def test_the_exit_status_is_0_only_if_no_fault_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    assert command.main(["good", "impossible"]) == 0
    assert "2 faults: 1 passed, 0 failed, 1 skipped" in capsys.readouterr().out
    assert command.main([]) == 1
    assert "4 faults: 1 passed, 2 failed, 1 skipped" in capsys.readouterr().out
    rows = {
        row["name"]: row for row in json.loads((tmp_path / ".benchmarks/faults.json").read_text())
    }
    assert rows["bad"]["happened"] == "the run ended [2J with | this"
    assert (rows["bad"]["loss"], rows["bad"]["lost"]) == (2.0, "everything")
    assert rows["broken"]["status"] == "FAIL"
    assert "KeyError: 'place'" in rows["broken"]["details"]
    written = (tmp_path / ".benchmarks/faults.md").read_text()
    assert "| A good one | A S1 | as expected | 1.5000 | 1.2500 | 1 of 3 rounds | pass |" in written
    assert "with \\| this" in written


@pytest.mark.usefixtures("three_faults")
def test_faults_are_selected_by_name_group_or_entry() -> None:
    def names(*arguments: str) -> list[str]:
        return [fault.name for fault in selected(arguments)]

    assert names("A") == ["good"]
    assert names("c4") == ["bad", "broken"]
    assert names("bad", "good") == ["good", "bad"]
    assert len(names()) == 4
    with pytest.raises(SystemExit, match="there is no fault nonsense"):
        names("nonsense")


def test_a_fault_that_does_not_end_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(directory: Path) -> Outcome:
        """An endless one."""
        while True:
            try:
                raise ValueError
            except Exception:
                continue

    monkeypatch.setattr(matrix, "FAULTS", {})
    monkeypatch.setattr(matrix, "SECONDS", {"B": 0.2})
    matrix.fault("B", "A1", "expected")(endless)
    result = attempt(matrix.FAULTS["endless"])
    assert (result.status, result.happened) == ("FAIL", "TookTooLong: not ended after 0.2 s")


def test_a_row_is_shown_in_the_table() -> None:
    result = matrix.Result(
        "name", "A title", "B", "C4", "expected", "pass", "left out", 2.0, 1.0, "nothing", 0.1
    )
    console = Console(width=160, record=True, file=io.StringIO())
    matrix.show([result], console)
    shown = console.export_text()
    assert "A title" in shown
    assert "2.0000" in shown
    assert "1 faults: 1 passed, 0 failed, 0 skipped" in shown
