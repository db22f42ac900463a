"""Checkpoints of a run on the server: a directory for each round, whole or not there.

    <directory>/round-000004/arrays.safetensors   the global arrays, for anyone to read
                             state.safetensors    strategy, random states, metrics so far
                             round.json           run, round, metrics of the round

Files are written beside their place, synced and moved into it with one rename. Nothing is pickled.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result

from flower_adapter.packing import pack, read_file, sync, unpack, write_file

FORMAT = 1
_NAME = re.compile(r"round-(\d{6,})")


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the text names the file and what is wrong."""


@dataclass
class Checkpoint:
    """What a run needs to go on after `server_round` as if it had never stopped."""

    run: str  # the id of the first run, which a resumed one takes over
    resumed: list[str]  # "4:1f0c…": round and attempt, for each time it was resumed
    server_round: int
    arrays: ArrayRecord
    model: dict[str, str]  # dtype and shape of each of the initial arrays
    strategy: list[Any]  # class and packed state of each wrapper and of the strategy inside
    random_states: dict[str, Any]
    train_metrics: dict[int, MetricRecord]  # of clients, by round
    evaluate_metrics: dict[int, MetricRecord]  # of clients
    server_metrics: dict[int, MetricRecord]  # of the server's own evaluation

    def result(self) -> Result:
        """What Flower's `start` would have returned after the round."""
        return Result(self.arrays, self.train_metrics, self.evaluate_metrics, self.server_metrics)

    def metric(self, name: str, server_round: int) -> float | None:
        """A metric of a round by the server's evaluation, else by the clients'."""
        for metrics in (self.server_metrics, self.evaluate_metrics):
            value = metrics.get(server_round, MetricRecord()).get(name)
            if isinstance(value, int | float):
                return float(value)
        return None


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    found = [path for path in Path(directory).iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=round_of)


def holds_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint, by its name, or a directory with one."""
    return bool(_NAME.fullmatch(path.name)) or bool(checkpoints(path))


def round_of(path: Path) -> int:
    """The round of a checkpoint, by its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint: its name should be like round-000004")
    return int(match[1])


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, atomically, in place of one of the same round.

    Raises:
        TypeError: the state holds what cannot be saved; the message gives its path.
        OSError: it cannot be written. What was there before still is.
    """
    names = list(checkpoint.arrays)
    state = {name: value for name, value in vars(checkpoint).items() if name != "arrays"}
    structure, arrays = pack(state, "checkpoint")
    place = directory / f"round-{checkpoint.server_round:06d}"
    beside = directory / f".{place.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write_file(beside / "arrays.safetensors", json.dumps(names), checkpoint.arrays)
    write_file(beside / "state.safetensors", structure, arrays)
    about = beside / "round.json"
    text = json.dumps(_about(checkpoint), indent=2, allow_nan=False)
    about.write_text(text + "\n", encoding="utf-8")
    sync(about)
    sync(beside)
    if place.exists():
        remove_checkpoint(place)
    beside.rename(place)
    sync(directory)
    return place


def read_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint by its own path, or the newest in a directory of them.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, or of another version of the format.
    """
    path = find_checkpoint(path)
    try:
        about = json.loads((path / "round.json").read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is of format {about.get('format')!r}, should be of format {FORMAT}"
            )
        names, arrays = read_file(path / "arrays.safetensors")
        structure, packed = read_file(path / "state.safetensors")
        record = ArrayRecord({name: arrays[name] for name in json.loads(names)})
        return Checkpoint(arrays=record, **unpack(structure, packed))
    except CheckpointError:
        raise
    except (FileNotFoundError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; one beside it can be resumed into another directory"
        ) from error


def find_checkpoint(path: str | Path) -> Path:
    """`path` if it is a checkpoint, else the newest in it.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    if _NAME.fullmatch(path.name):
        if not path.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}")
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint")
    return found[-1]


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, so that no half of it can be taken for a whole one."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(directory: Path) -> None:
    """Remove what writing or removing checkpoints left when the process was killed."""
    for path in directory.glob(".round-*"):
        if path.suffix in (".partial", ".removed"):
            shutil.rmtree(path, ignore_errors=True)


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    at = checkpoint.server_round
    return {
        "format": FORMAT,
        "run": checkpoint.run,
        "round": at,
        "train-metrics": _printable(checkpoint.train_metrics.get(at)),
        "evaluate-metrics": _printable(checkpoint.evaluate_metrics.get(at)),
        "server-metrics": _printable(checkpoint.server_metrics.get(at)),
    }


def _printable(metrics: MetricRecord | None) -> dict[str, Any]:
    """Metrics as JSON has them: NaN and Inf, which it lacks, as text."""
    return {
        name: value if np.isfinite(value).all() else str(value)
        for name, value in (metrics or {}).items()
    }
