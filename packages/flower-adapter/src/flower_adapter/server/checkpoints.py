"""Write and read checkpoints of a run. Each checkpoint is a directory.

    <directory>/round-000004/arrays.safetensors   the global arrays, readable without this package
                             state.safetensors    the other fields of `Checkpoint`
                             round.json           the format, the run id, the record of the round,
                                                  and the SHA-256 of the other files and of itself

No checkpoint is ever half-written. Its files are first written and synced in a temporary directory.
One rename then moves this directory to its final place. A reader checks each file against its
SHA-256, so it never uses a damaged file. The module does not use pickle.

`state.safetensors` holds the secret of the run, from which the clients' tokens are computed. Its
owner alone can read this file.
"""

import hashlib
import hmac
import json
import logging
import random
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout
from flwr.app import ArrayRecord, ConfigRecord

from flower_adapter.arrays.convert import describe
from flower_adapter.packing import make_directory, pack, read_file, sync, unpack, write_file
from flower_adapter.server.record import RoundRecord, forget_left_out

FORMAT = 4
ARRAYS_FILE, STATE_FILE = "arrays.safetensors", "state.safetensors"
SUMMARY_FILE = "round.json"
_NAME = re.compile(r"round-(\d{6,})")

logger = logging.getLogger("flwr")


class CheckpointError(ValueError):
    """An error: a checkpoint or its directory cannot be used. The message says why."""


class _Damaged(CheckpointError):
    """An error: the files of a checkpoint are not those that were written."""


@dataclass
class Checkpoint:
    """The state after a round. A run continues from it as if the run had never stopped."""

    run: str  # id of the first attempt; a resume does not change it
    attempts: list[str]  # "4:1f0c…" for each resume: the round before the resume, and an id
    server_round: int
    arrays: ArrayRecord
    model: dict[str, str]  # dtype and shape of each initial array
    states: dict[str, Any] = field(default_factory=dict)  # keys: strategy, compression, outer
    failed_rounds: dict[str, int] = field(default_factory=dict)  # failed rounds in a row, by phase
    random_states: dict[str, Any] = field(default_factory=dict)
    # By phase: the config that `run_rounds` was given, and the config as the strategy changed it.
    configs: dict[str, tuple[ConfigRecord, ConfigRecord]] = field(default_factory=dict)
    records: list[RoundRecord] = field(default_factory=list)  # of rounds 0 to `server_round`
    secret: str = ""  # 64 hex digits, known to this server alone

    def add(self, record: RoundRecord) -> None:
        """Add the record of the round that has ended."""
        forget_left_out(self.records)
        self.records.append(record)
        self.server_round = record.server_round

    def token(self, label: str) -> str:
        """Return the token by which the client with this label recognizes the run.

        A client keeps its state on disk under this token. Nobody else can compute it, so no other
        run can ask for the state.
        """
        return hmac.new(bytes.fromhex(self.secret), label.encode(), hashlib.sha256).hexdigest()


class Checkpoints:
    """Write a checkpoint to `directory` after every round, and find the one to resume from.

    Old checkpoints are removed, except the last `keep` and the best one. Only one process at a time
    can write into a directory.

    Args:
        directory: holds the checkpoints and nothing else. It is made if it does not exist.
        keep: how many of the last checkpoints stay, at least 1.
        best: the name of a metric. The checkpoint with the lowest value of this metric is the best
            one. The value comes from the server's evaluation, or from the clients' evaluation if
            the server's evaluation has no such metric. With None only the last `keep` stay.
        highest_is_best: True if the checkpoint with the highest value is the best one.
        resume: False starts a new run, and `directory` must not hold checkpoints. True continues
            from the newest checkpoint in `directory`. A path is either a checkpoint to continue
            from, or another directory whose newest checkpoint is used. If this directory and
            `directory` hold no checkpoint yet, the run starts at round 1. If the newest checkpoint
            of a directory is damaged, the newest one that is not damaged is used, with a warning.
            The damaged checkpoints in `directory` are renamed to ".damaged-round-000004".
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        best: str | None = None,
        highest_is_best: bool = False,
        resume: bool | str | Path = False,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, should be at least 1")
        self.directory = Path(directory).expanduser().absolute()
        self.keep = keep
        self.best = best
        self.highest_is_best = highest_is_best
        self.resume: Path | None = None
        if resume:
            self.resume = self.directory if resume is True else Path(resume).expanduser().absolute()

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.directory)!r}, keep={self.keep})"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the directory, and keep all other runs out of it until the context ends.

        Raises:
            CheckpointError: another run uses the directory.
        """
        make_directory(self.directory)
        # The lock file stands beside the directory. If the process is killed, its lock ends.
        lock = FileLock(self.directory.with_name(f".{self.directory.name}.lock"), blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise CheckpointError(f"{self.directory} is in use by another run") from error
        try:
            yield
        finally:
            lock.release()

    def find(self, initial_arrays: ArrayRecord) -> Checkpoint | None:
        """Return the checkpoint from which the run continues, or None to start at round 1.

        Raises:
            CheckpointError: `directory` holds checkpoints that the run would overwrite, or the
                checkpoint to resume from is damaged or belongs to another model.
            FileNotFoundError: the path to resume from does not exist, or it holds no checkpoint
                although `directory` holds one.
        """
        _remove_leftovers(self.directory)
        here = list_checkpoints(self.directory)
        if self.resume is None:
            if here:
                raise CheckpointError(
                    f"{self.directory} holds checkpoints up to round {round_of(here[-1])}; use "
                    "another directory, or resume this run"
                )
            return None
        if self.resume.is_dir() and not here and not _is_checkpoint_or_holds_one(self.resume):
            logger.warning("%s holds no checkpoint yet: starting at round 1", self.resume)
            return None
        path = find_checkpoint(self.resume)
        if here and not path.samefile(here[-1]):
            raise CheckpointError(
                f"{self.directory} holds checkpoints up to round {round_of(here[-1])}, which a "
                f"resume from {path} (round {round_of(path)}) would overwrite; use another "
                "directory"
            )
        checkpoint, damaged = _newest_sound(self.resume)
        _require_same_model(checkpoint, initial_arrays)
        for path in damaged:
            if path.parent.samefile(self.directory):
                _move_aside(path)
        # An attempt may end before it writes a checkpoint. The next attempt then resumes after the
        # same round. Only the id tells the files of the two attempts apart on the clients.
        checkpoint.attempts.append(f"{checkpoint.server_round}:{uuid4().hex}")
        return checkpoint

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and remove old checkpoints that should not be kept."""
        write_checkpoint(self.directory, checkpoint)
        best = self._best(checkpoint.records)
        if self.best is not None and best is None and checkpoint.server_round == 1:
            logger.warning(
                "no evaluation has the metric %r yet, so no checkpoint is best", self.best
            )
        for path in list_checkpoints(self.directory)[: -self.keep]:
            if round_of(path) != best:
                _remove_checkpoint(path)

    def _best(self, records: list[RoundRecord]) -> int | None:
        """Return the round with the best metric. If values are equal, return the first round."""
        if self.best is None:
            return None
        values = {record.server_round: record.metric(self.best) for record in records}
        found = {r: value for r, value in values.items() if value is not None and value == value}
        if not found:
            return None
        return (max if self.highest_is_best else min)(found, key=found.__getitem__)


def new_checkpoint(run: str, initial_arrays: ArrayRecord) -> Checkpoint:
    """Return the state of a run that has not begun."""
    model = {name: describe(array) for name, array in initial_arrays.items()}
    return Checkpoint(
        run=run,
        attempts=[],
        server_round=0,
        arrays=initial_arrays,
        model=model,
        secret=secrets.token_hex(32),
    )


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Return the checkpoints in a directory, oldest first."""
    found = [path for path in Path(directory).iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=round_of)


def round_of(path: Path) -> int:
    """Return the round number in the name of a checkpoint."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint: its name should be like round-000004")
    return int(match[1])


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically. There must be no checkpoint of this round yet.

    Raises:
        TypeError: a state holds a value that cannot be saved. The message says where in the state
            the value is.
        OSError: the checkpoint cannot be written. The earlier checkpoints stay.
    """
    names = list(checkpoint.arrays)
    state = {name: value for name, value in vars(checkpoint).items() if name != "arrays"}
    # As bytes, because safetensors limits the size of the text that its header can hold.
    records = json.dumps([record.to_dict() for record in checkpoint.records])
    state["records"] = np.frombuffer(records.encode(), np.uint8)
    structure, arrays = pack(state, "checkpoint")
    place = directory / f"round-{checkpoint.server_round:06d}"
    partial = directory / f".{place.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    make_directory(partial)
    try:
        write_file(partial / ARRAYS_FILE, json.dumps(names), checkpoint.arrays)
        (partial / STATE_FILE).touch(mode=0o600)
        write_file(partial / STATE_FILE, structure, arrays)
        (partial / STATE_FILE).chmod(0o600)
        files = {name: _file_hash(partial / name) for name in (ARRAYS_FILE, STATE_FILE)}
        summary = partial / SUMMARY_FILE
        summary.write_text(_summary_text(_summary(checkpoint, files)), encoding="utf-8")
        sync(summary)
        sync(partial)
        partial.rename(place)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the space
        raise
    sync(directory)
    return place


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the checkpoint at `path`, or the newest sound checkpoint in the directory `path`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        CheckpointError: the checkpoint, or each checkpoint in the directory, is damaged, or it has
            another format.
    """
    return _newest_sound(Path(path))[0]


def _newest_sound(path: Path) -> tuple[Checkpoint, list[Path]]:
    """Read a checkpoint as `read_checkpoint` does. Return the newer damaged checkpoints as well."""
    newest = find_checkpoint(path)
    if newest == path:
        return _read(newest), []
    damaged: list[Path] = []
    faults: list[str] = []
    for place in reversed(list_checkpoints(path)):
        try:
            checkpoint = _read(place)
        except _Damaged as error:
            damaged.append(place)
            faults.append(str(error))
            continue
        for fault in faults:
            logger.error("%s", fault)
        if faults:
            logger.error("the run goes on from %s, the newest sound checkpoint", place)
        return checkpoint, damaged
    raise CheckpointError("; ".join(faults))


def _read(path: Path) -> Checkpoint:
    try:
        summary = _read_summary(path)
        for name, expected in summary["files"].items():
            if _file_hash(path / name) != expected:
                raise ValueError(f"{name} has another SHA-256 than when it was written")
        names, arrays = read_file(path / ARRAYS_FILE)
        state = unpack(*read_file(path / STATE_FILE))
        records = json.loads(state["records"].tobytes())
        state["records"] = [RoundRecord.from_dict(fields) for fields in records]
        record = ArrayRecord({name: arrays[name] for name in json.loads(names)})
        return Checkpoint(arrays=record, **state)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # damaged bytes can fail in any way
        raise _Damaged(f"{path} is damaged: {error}") from error


def _read_summary(path: Path) -> dict[str, Any]:
    """Read and check round.json. The text must be exactly the one that was written.

    Raises:
        CheckpointError: the checkpoint has another format.
        ValueError: the text was changed.
    """
    text = (path / SUMMARY_FILE).read_text(encoding="utf-8")
    summary = json.loads(text)
    if not isinstance(summary, dict):
        raise ValueError(f"{SUMMARY_FILE} holds {type(summary).__name__}, should hold an object")
    written = {name: value for name, value in summary.items() if name != "sha256"}
    if "sha256" not in summary and written.get("format") in range(1, FORMAT):
        raise CheckpointError(
            f"{path} has format {summary['format']!r}, should have format {FORMAT}: an older "
            "flower-adapter wrote it"
        )
    if text != _summary_text(written):
        raise ValueError(f"{SUMMARY_FILE} has another SHA-256 than when it was written")
    if summary.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {summary.get('format')!r}, should have format {FORMAT}"
        )
    return summary


def _summary_text(summary: dict[str, Any]) -> str:
    """Return the text of round.json. Its last field is the SHA-256 of the other fields."""
    text = json.dumps(summary, indent=2, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**summary, "sha256": digest}, indent=2, allow_nan=False) + "\n"


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that the run can write this round again."""
    place, number = path.with_name(f".damaged-{path.name}"), 1
    while place.exists():
        number += 1
        place = path.with_name(f".damaged-{path.name}-{number}")
    path.rename(place)
    sync(path.parent)
    logger.error("%s is now %s", path, place)


def find_checkpoint(path: str | Path) -> Path:
    """Return `path` if it is a checkpoint, else the newest checkpoint in the directory `path`.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    path = Path(path)
    if _NAME.fullmatch(path.name):
        if not path.is_dir():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}")
    found = list_checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint")
    return found[-1]


def random_states() -> dict[str, Any]:
    """Return the states of the global random generators of Python, numpy and torch."""
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if has_cuda else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set the states that `random_states` returned."""
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        if torch.cuda.is_available() and torch.cuda.device_count() == len(states["cuda"]):
            torch.cuda.set_rng_state_all(states["cuda"])
        else:
            count = len(states["cuda"])
            logger.warning(
                "the random states of %d GPUs are not loaded: the number of GPUs differs", count
            )


def _is_checkpoint_or_holds_one(path: Path) -> bool:
    return bool(_NAME.fullmatch(path.name)) or bool(list_checkpoints(path))


def _require_same_model(checkpoint: Checkpoint, initial_arrays: ArrayRecord) -> None:
    saved = checkpoint.model
    here = {name: describe(array) for name, array in initial_arrays.items()}
    faults = [
        f"{name} was {saved.get(name, 'not there')}, is {here.get(name, 'not there')}"
        for name in {**saved, **here}
        if saved.get(name) != here.get(name)
    ]
    if faults:
        raise CheckpointError(f"the run had another model: {'; '.join(faults)}")


def _remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint. It is first renamed, so that a half-removed one is not used."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _remove_leftovers(directory: Path) -> None:
    """Remove incomplete checkpoints that a killed process left in the directory."""
    for path in directory.glob(".round-*"):
        if path.suffix in (".partial", ".removed"):
            shutil.rmtree(path, ignore_errors=True)


def _summary(checkpoint: Checkpoint, files: dict[str, str]) -> dict[str, Any]:
    record = checkpoint.records[-1].to_dict()
    del record["arrays"]
    return {"format": FORMAT, "run": checkpoint.run, "files": files, **_printable(record)}


def _printable(value: Any) -> Any:
    """Return a value that JSON can hold. NaN and Inf become text."""
    if isinstance(value, dict):
        return {name: _printable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_printable(item) for item in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
