"""Find the runs in a directory, and tell the state of each."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from nanogpt_flower.artifacts import CHECKPOINTS, CONFIG_FILE, RunDirectory
from nanogpt_flower.settings import Settings, SettingsError

LAUNCH_FILE, STATE_FILE = "launch.json", "state.json"
LATEST = "latest"


@dataclass(frozen=True)
class Run:
    """One line in the list of runs. Fields are None if the run has not written them."""

    path: Path
    started: datetime
    preset: str | None
    corpus: str | None
    rounds: int  # finished rounds
    num_rounds: int | None
    loss: float | None  # the last validation loss
    state: str


def is_run(path: Path) -> bool:
    """Tell whether a directory is that of a run."""
    return any((path / name).exists() for name in (LAUNCH_FILE, CONFIG_FILE, CHECKPOINTS))


def find_run(name: str, output_dir: Path) -> Path:
    """Return the directory of a run.

    Args:
        name: the path of the directory, the name of a directory in `output_dir`, or "latest" for
            the run in `output_dir` that was started last.
        output_dir: the directory with the runs.

    Raises:
        SettingsError: there is no such run. The message names the newest runs.
    """
    if name == LATEST:
        paths = _paths(output_dir)
        if not paths:
            raise SettingsError(f"there is no run in {output_dir}, so there is no latest run")
        return paths[-1]
    for path in (Path(name).expanduser(), output_dir / name):
        if path.is_dir():
            return path.resolve()
    newest = ", ".join(path.name for path in _paths(output_dir)[-5:]) or "no run"
    raise SettingsError(
        f"the run is {name!r}; it must be {LATEST!r}, the path of a run, or a run in "
        f"{output_dir}, which has {newest}"
    )


def all_runs(output_dir: Path) -> list[Run]:
    """Return all runs in a directory, in the order of their starts."""
    return [_describe_any(path) for path in _paths(output_dir)]


def _describe_any(path: Path) -> Run:
    try:
        return describe(path)
    except (SettingsError, TypeError, AttributeError, KeyError):  # one damaged run hides no other
        return Run(path, _started(path), None, None, 0, None, None, "damaged")


def describe(path: Path) -> Run:
    """Describe the run in a directory.

    Raises:
        SettingsError: if a file of the run is damaged. The message names the file.
    """
    directory = RunDirectory(path)
    launch, config = directory.read_json(LAUNCH_FILE), directory.read_json(CONFIG_FILE)
    rows = directory.read_lines("metrics.jsonl")
    settings: dict[str, Any] = config.get("settings") or launch.get("run_config") or {}
    for name, is_sound in (
        (CONFIG_FILE if config else LAUNCH_FILE, isinstance(settings, dict)),
        ("metrics.jsonl", all(isinstance(row.get("round"), int) for row in rows)),
    ):
        if not is_sound:
            raise SettingsError(f"{path / name} is damaged: it has other fields than a run writes")
    losses = [row.get("val_loss") or row.get("client_val_loss") for row in rows]
    corpus = (config.get("corpus") or {}).get("name") or settings.get("corpus")
    return Run(
        path,
        _started(path),
        launch.get("preset"),
        corpus and Path(corpus).name,
        rows[-1]["round"] if rows else 0,
        settings.get("num-server-rounds", Settings().num_server_rounds),
        losses[-1] if losses else None,
        state_of(directory),
    )


def state_of(directory: RunDirectory) -> str:
    """Return "running", "completed", "failed", "interrupted" or "unfinished".

    "unfinished" is a run that was not started by `nanogpt-flower run` and has written no sample.
    """
    saved = directory.read_json(STATE_FILE)
    if not saved:
        return "completed" if (directory.path / "sample.txt").exists() else "unfinished"
    if saved.get("state") != "running":
        return str(saved.get("state"))
    try:
        started = psutil.Process(saved["pid"]).create_time()
    except (psutil.Error, KeyError):
        return "interrupted"
    # Another process may have got the number of a process that has ended.
    return "running" if abs(started - saved.get("created", 0.0)) < 1.0 else "interrupted"


def write_state(directory: RunDirectory, state: str, message: str = "") -> None:
    """Write the state of a run that this process runs, so that a kill can be told from an end."""
    process = psutil.Process()
    document = {"state": state, "pid": process.pid, "created": process.create_time()}
    directory.write_json(STATE_FILE, {**document, "message": message})


def _paths(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    return sorted(filter(is_run, output_dir.resolve().iterdir()), key=_started)


def _started(path: Path) -> datetime:
    try:
        started = json.loads((path / LAUNCH_FILE).read_text(encoding="utf-8"))["started"]
        return datetime.fromisoformat(started).astimezone()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # The run was not started by `nanogpt-flower run`. Its first file tells when.
        first = path / CONFIG_FILE if (path / CONFIG_FILE).exists() else path
        return datetime.fromtimestamp(first.stat().st_mtime).astimezone()
