"""A Flower mod that saves a client's context on disk, so that the context survives a restart."""

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from flower_adapter import protocol
from flower_adapter._flwr import ClientAppCallable
from flower_adapter.client.replies import refuse
from flower_adapter.client.state import StateFormatError
from flower_adapter.packing import pack, read_file, sync, unpack, write_file

_NAME = re.compile(r"round-(\d{6,})(?:-([0-9a-f]+))?\.safetensors")
_LONGEST_NAME = 120  # characters; file systems allow 255 bytes

_logger = logging.getLogger("flwr")


class DiskState:
    """A Flower mod that keeps `context.state` on disk.

    Use it as in `ClientApp(mods=[DiskState("/data/state")])`.

    After each train message the mod writes the whole `context.state` atomically to
    `<directory>/<label>/<run>/round-<n>.safetensors`. The state includes, for example, the
    optimizer and the error feedback. Before a train message of round n the mod restores the state
    from the client's last training before round n. Before an evaluate message of round n it
    restores the state from the client's last training up to round n. If a run resumes after round
    7, each client therefore gets back the state that it had after round 7. The states that it had
    saved in later rounds are deleted. If a train message fails, its changes to the context are
    undone.

    `<run>` is the run id that `Checkpoints` puts into the server's messages. This id stays the same
    after a resume, so a resumed run finds the saved state. Without checkpoints, `<run>` is Flower's
    run id. Put this mod before other mods that keep state, such as `compression_mod`. The user has
    to delete the directories of old runs.

    If a file is damaged, or cannot be read or written, the server gets an error reply that names
    the file.

    Args:
        directory: an absolute path, or a function that returns an absolute path for a context. If
            the function returns None, nothing is kept.
        keep: how many rounds to keep, at least 1.
        label: returns the name of the client, which should be the same in every run. The default
            is "partition 0007" for partition-id 7. Without a partition-id it is the node id.
    """

    def __init__(
        self,
        directory: str | Path | Callable[[Context], str | Path | None],
        *,
        keep: int = 3,
        label: Callable[[Context], str] = protocol.default_label,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, should be at least 1")
        self.directory = directory
        self.keep = keep
        self.label = label

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kind = message.metadata.message_type.partition(".")[0]
        config = protocol.config_of(message)
        server_round = config.get(protocol.SERVER_ROUND)
        has_round = kind in (MessageType.TRAIN, MessageType.EVALUATE)
        if not has_round or not isinstance(server_round, int):
            return call_next(message, context)
        root = self.directory(context) if callable(self.directory) else self.directory
        if root is None:
            return call_next(message, context)
        is_train = kind == MessageType.TRAIN
        run = str(config.get(protocol.RUN, message.metadata.run_id))
        directory = Path(root).expanduser() / _file_name(self.label(context)) / _file_name(run)
        files = _RunFiles(directory, _attempts(config.get(protocol.ATTEMPTS)))
        try:
            _restore(files, context, run, server_round - 1 if is_train else server_round)
        except (StateFormatError, OSError) as error:
            return refuse(message, error)
        if not is_train:
            return call_next(message, context)
        reply = _undoing_failures(message, context, call_next)
        if reply.has_error():
            return reply
        try:
            self._write(files, context.state, run, server_round)
        except OSError as error:
            context.state.clear()  # the server does not get this training
            return refuse(message, error)
        return reply

    def _write(self, files: "_RunFiles", state: RecordDict, run: str, server_round: int) -> None:
        path = files.path(server_round)
        state[protocol.DISK_STATE] = ConfigRecord({"run": run, "file": path.name})
        structure, arrays = pack(state, "context.state")
        files.directory.mkdir(parents=True, exist_ok=True)
        later = [old for at, old in files.rounds() if at > server_round]
        for old in (*later, *files.abandoned(), *files.directory.glob(".round-*")):
            old.unlink()
        partial = path.with_name(f".{path.name}")
        write_file(partial, structure, arrays)
        partial.replace(path)
        sync(files.directory)
        for _, old in files.rounds()[: -self.keep]:
            old.unlink()
        _logger.debug("context written to %s", path)


class _RunFiles(NamedTuple):
    """The files of one client in one run.

    A run resumes from a checkpoint, and each resume starts a new attempt. The new attempt uses the
    files that earlier attempts wrote up to the round of the checkpoint. The files that they wrote
    in later rounds are abandoned.
    """

    directory: Path
    attempts: list[tuple[int, str]]  # for each resume: the round before the resume, attempt id

    def path(self, server_round: int) -> Path:
        """Return the path at which the current attempt saves the state of a round."""
        suffix = f"-{self.attempts[-1][1]}" if self.attempts else ""
        return self.directory / f"round-{server_round:06d}{suffix}.safetensors"

    def rounds(self) -> list[tuple[int, Path]]:
        """Return (round, path) of each file that the current attempt can use, oldest first."""
        newest: dict[int, tuple[int, Path]] = {}
        for at, attempt, path in self.all():
            if self._is_ours(at, attempt):
                newest[at] = max(newest.get(at, (-1, path)), (self._number(attempt), path))
        return [(at, path) for at, (_, path) in sorted(newest.items())]

    def abandoned(self) -> list[Path]:
        """Return the paths of the files that the current attempt cannot use (see `_RunFiles`)."""
        return [path for at, attempt, path in self.all() if not self._is_ours(at, attempt)]

    def _number(self, attempt: str) -> int:
        return ["", *(name for _, name in self.attempts)].index(attempt)

    def _is_ours(self, at: int, attempt: str) -> bool:
        is_known = not attempt or any(attempt == name for _, name in self.attempts)
        return is_known and all(at <= end for end, _ in self.attempts[self._number(attempt) :])

    def all(self) -> list[tuple[int, str, Path]]:
        """Return the round, the attempt id and the path of every file."""
        if not self.directory.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        return [(int(match[1]), match[2] or "", path) for match, path in matches if match]


def _restore(files: _RunFiles, context: Context, run: str, latest: int) -> None:
    """Load the newest state that was saved up to round `latest` into `context.state`."""
    rounds = files.rounds()
    before = [path for at, path in rounds if at <= latest]
    if not before:
        later = sorted(at for at, _, _ in files.all())
        if later:
            _logger.warning(
                "run %s has no state up to round %d, only of rounds %s: starting without a state",
                run,
                latest,
                ", ".join(map(str, later)),
            )
            context.state.clear()
        return
    path = before[-1]
    mark = context.state.get(protocol.DISK_STATE)
    if isinstance(mark, ConfigRecord) and dict(mark) == {"run": run, "file": path.name}:
        return
    try:
        state = unpack(*read_file(path))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StateFormatError(f"{path} is damaged: {error}") from error
    _logger.info("state of run %s taken from %s", run, path)
    context.state.clear()
    context.state.update(state)


def _undoing_failures(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Return the reply to a train message. If the training fails, clear `context.state`.

    This undoes the changes of the failed training: when the next train or evaluate message arrives,
    `_restore` loads the last saved state.
    """
    context.state.pop(protocol.DISK_STATE, None)
    failed = True
    try:
        reply = call_next(message, context)
        failed = reply.has_error()
    finally:
        if failed:
            context.state.clear()
    return reply


def _attempts(value: object) -> list[tuple[int, str]]:
    parts = [str(item).partition(":") for item in value] if isinstance(value, list) else []
    return [(int(end), attempt) for end, _, attempt in parts]


def _file_name(text: str) -> str:
    """Turn a text into a directory name. Different texts get different names."""
    name = quote(text, safe=" ")
    if name.strip(".") == "":
        name = name.replace(".", "%2E") or "%"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:40]}%{hashlib.sha256(text.encode()).hexdigest()}"
    return name
