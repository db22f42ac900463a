"""Runs by name, and their states."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.history import History
from nanogpt_flower.local.launch import Launch
from nanogpt_flower.runs import all_runs, describe, find_run, state_of, write_state
from nanogpt_flower.settings import Settings, SettingsError


def make_run(path: Path, started: str) -> RunDirectory:
    path.mkdir(parents=True)
    launch = {"preset": "quick", "started": started, "run_config": {"num-server-rounds": 4}}
    (path / "launch.json").write_text(json.dumps(launch))
    return RunDirectory(path)


def test_latest_is_the_run_that_was_started_last(tmp_path: Path) -> None:
    make_run(tmp_path / "b", "2026-11-24T22:15:00+00:00")
    newest = make_run(tmp_path / "a", "2026-11-24T23:30:00+01:00")
    make_run(tmp_path / "c", "2026-11-24T22:29:59+00:00")
    (tmp_path / "notes").mkdir()
    assert find_run("latest", tmp_path) == newest.path
    assert [run.path.name for run in all_runs(tmp_path)] == ["b", "c", "a"]
    assert find_run("b", tmp_path) == find_run(str(tmp_path / "b"), Path("elsewhere"))


def test_without_a_run_there_is_no_latest(tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SettingsError, match="there is no run in"):
            find_run("latest", output)


def test_a_run_that_has_just_started_has_no_loss(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "2026-11-24T22:15:00+00:00")
    (run,) = all_runs(tmp_path)
    assert (run.preset, run.rounds, run.num_rounds, run.loss) == ("quick", 0, 4, None)


def test_a_run_whose_process_is_gone_was_interrupted(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a", "2026-11-24T22:15:00+00:00")
    write_state(directory, "running")
    assert state_of(directory) == "running"
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    directory.write_json("state.json", {"state": "running", "pid": finished.pid, "created": 1.0})
    assert state_of(directory) == "interrupted"


def test_another_process_with_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a", "2026-11-24T22:15:00+00:00")
    created = psutil.Process().create_time()
    for seconds, state in ((0, "running"), (100, "interrupted")):
        document = {"state": "running", "pid": os.getpid(), "created": created - seconds}
        directory.write_json("state.json", document)
        assert state_of(directory) == state


def test_a_run_of_flwr_run_is_completed_when_it_has_a_sample(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert state_of(directory) == "unfinished"
    directory.write_sample("my lord")
    assert state_of(directory) == "completed"


@pytest.mark.parametrize("name", ["state.json", "config.json", "metrics.jsonl"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a", "2026-11-24T22:15:00+00:00")
    (directory.path / name).write_text("{")
    make_run(tmp_path / "b", "2026-11-24T22:16:00+00:00")
    with pytest.raises(SettingsError, match=f"{name} is damaged"):
        describe(directory.path)
    damaged, whole = all_runs(tmp_path)
    assert (damaged.path.name, damaged.state) == ("a", "damaged")
    assert whole.state != "damaged"


DAMAGED = ["", "{", "[]", "1", "null", '"x"', "\x00", "[" * 100_000, '{"settings": 1}', "{}"]


@pytest.mark.parametrize("name", ["state.json", "config.json", "launch.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_file_of_any_other_content_is_an_error_that_names_it_or_no_error(
    name: str, text: str, tmp_path: Path
) -> None:
    directory = make_run(tmp_path / "a", "2026-11-24T22:15:00+00:00")
    (directory.path / name).write_text(text)
    for use in (
        describe,
        lambda path: state_of(RunDirectory(path)),
        lambda path: Launch.read(RunDirectory(path)).settings,
        lambda path: RunDirectory.resume(Settings(resume_from=str(path)), None),
        lambda path: History(RunDirectory(path)),
    ):
        fault = ""
        try:
            use(directory.path)
        except SettingsError as error:
            fault = str(error)
        assert not fault or name in fault or "has no checkpoints" in fault or "no run" in fault
    assert len(all_runs(tmp_path)) == 1
