"""A Flower mod that saves a client's context on disk, so that the context survives a restart."""

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from flower_adapter import protocol
from flower_adapter._flwr import ClientAppCallable
from flower_adapter.client.refusals import Refusal, refusal_from, refuse
from flower_adapter.client.secret import make_private_directory
from flower_adapter.client.state import StateFormatError
from flower_adapter.packing import pack, read_file, sync, unpack, write_file

RUNS = "runs"  # the directory of all runs, in the client's directory
_NAME = re.compile(r"round-(\d{6,9})(?:-([0-9a-f]{32}))?\.safetensors")
_ATTEMPT = re.compile(r"(\d{1,9}):([0-9a-f]{32})")
_MOST_ATTEMPTS = 1_000
_LAST_ROUND = 999_999_999  # the names of files have this many digits
_DAY = 86_400.0  # seconds

_logger = logging.getLogger("flwr")


class DiskState:
    """A Flower mod that keeps `context.state` on disk.

    Use it as in `ClientApp(mods=[DiskState("/data/state")])`.

    After each train message the mod writes the whole `context.state` atomically to
    `<directory>/runs/<run>/round-<n>.safetensors`. The state includes, for example, the optimizer
    and the error feedback. Before a train message of round n the mod restores the state from the
    client's last training before round n. Before an evaluate message of round n it restores the
    state from the client's last training up to round n. If a run resumes after round 7, each client
    therefore gets back the state that it had after round 7. The states that it had saved in later
    rounds are deleted. If a train message fails, its changes to the context are undone.

    The state tells much of the text on which the client has trained. Only the server that began the
    run can make the client use it: `<run>` is a digest of the token that a server with
    `Checkpoints` puts into its messages. The token stays the same after a resume. A message without
    a token reads and writes nothing on disk. Only the owner can enter the directories. When the run
    has ended, the server says so, and the mod deletes the run's directory.

    Put this mod before other mods that keep state, such as `compression_mod`. If a file is damaged,
    cannot be read or written, or is in use by another process, the server gets an error reply. The
    client's log names the file.

    Args:
        directory: an absolute path, or a function that returns an absolute path for a context. If
            the function returns None, nothing is kept.
        keep: how many rounds to keep, at least 1.
        keep_ended: True, or a function that returns True for a context, keeps the states of runs
            that have ended. Such a run can be prolonged later.
        max_runs: how many runs can keep a state at the same time. A further run trains without a
            state on disk.
        max_age: days after which the state of a run is deleted if the run did not use it.
    """

    def __init__(
        self,
        directory: str | Path | Callable[[Context], str | Path | None],
        *,
        keep: int = 3,
        keep_ended: bool | Callable[[Context], bool] = False,
        max_runs: int = 20,
        max_age: float = 30.0,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, should be at least 1")
        self.directory = directory
        self.keep = keep
        self.keep_ended = keep_ended
        self.max_runs = max_runs
        self.max_age = max_age

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kind = message.metadata.message_type.partition(".")[0]
        config = protocol.config_of(message)
        token = protocol.token_of(config)
        root = self.directory(context) if callable(self.directory) else self.directory
        is_end = message.metadata.message_type == protocol.END_QUERY
        if is_end and token is not None and root is not None:
            self._end(Path(root), token, context)
        if is_end:
            return Message(RecordDict(), reply_to=message)
        server_round = config.get(protocol.SERVER_ROUND)
        has_round = kind in (MessageType.TRAIN, MessageType.EVALUATE)
        if not has_round or not isinstance(server_round, int) or token is None or root is None:
            return call_next(message, context)
        try:
            if not 0 <= server_round <= _LAST_ROUND:
                raise Refusal("message", f"{protocol.SERVER_ROUND} is not from 0 to {_LAST_ROUND}")
            attempts = _attempts(config.get(protocol.ATTEMPTS, []))
            files = _RunFiles(run_directory(Path(root), token), attempts)
            is_new = not files.directory.is_dir()
            if is_new and (kind == MessageType.EVALUATE or not self._has_room(files.directory)):
                return call_next(message, context)
            make_private_directory(files.directory)
            with _locked(files.directory):
                if kind == MessageType.TRAIN:
                    return self._train(files, server_round, message, context, call_next)
                _restore(files, context, server_round)
        except StateFormatError as error:
            return refuse(
                message, refusal_from("state", "the saved state of this client is damaged", error)
            )
        except OSError as error:
            return refuse(
                message, refusal_from("state", "this client cannot read or write its state", error)
            )
        except Refusal as error:
            return refuse(message, error)
        return call_next(message, context)

    def _train(
        self,
        files: "_RunFiles",
        server_round: int,
        message: Message,
        context: Context,
        call_next: ClientAppCallable,
    ) -> Message:
        _restore(files, context, server_round - 1)
        reply = _undoing_failures(message, context, call_next)
        if reply.has_error():
            return reply
        try:
            self._write(files, context.state, server_round)
        except OSError:
            context.state.clear()  # the server does not get this training
            raise
        client = reply.content.get(protocol.CLIENT)
        if not isinstance(client, ConfigRecord):
            client = reply.content[protocol.CLIENT] = ConfigRecord()
        client[protocol.KEEPS_STATE] = True
        return reply

    def _write(self, files: "_RunFiles", state: RecordDict, server_round: int) -> None:
        path = files.path(server_round)
        state[protocol.DISK_STATE] = files.mark(path)
        structure, arrays = pack(state, "context.state")
        later = [old for at, old in files.rounds() if at > server_round]
        for old in (*later, *files.abandoned(), *files.directory.glob(".round-*")):
            old.unlink()
        partial = path.with_name(f".{path.name}")
        write_file(partial, structure, arrays)
        partial.chmod(0o600)
        partial.replace(path)
        sync(files.directory)
        for _, old in files.rounds()[: -self.keep]:
            old.unlink()
        _logger.debug("context written to %s", path)

    def _has_room(self, directory: Path) -> bool:
        """Delete the states of old runs, and tell whether this run can keep a state."""
        runs = [path for path in _children(directory.parent) if path.is_dir()]
        now = time.time()
        for run in runs:
            newest = max(path.stat().st_mtime for path in (run, *_children(run)))
            if now - newest > self.max_age * _DAY:
                _logger.info("the state of a run in %s is older than %g days", run, self.max_age)
                shutil.rmtree(run)
        left = sum(run.is_dir() for run in runs)
        if left < self.max_runs:
            return True
        _logger.warning(
            "%s holds the states of %d runs, so this run keeps no state; delete the directories of "
            "runs that have ended",
            directory.parent,
            left,
        )
        return False

    def _end(self, root: Path, token: str, context: Context) -> None:
        """Delete the state of a run that has ended."""
        keeps = self.keep_ended(context) if callable(self.keep_ended) else self.keep_ended
        directory = run_directory(root, token)
        if not keeps and directory.is_dir():
            with _locked(directory):
                shutil.rmtree(directory)
            _logger.info("the run has ended, so its state in %s is deleted", directory)
        context.state.pop(protocol.DISK_STATE, None)


def run_directory(root: Path, token: str) -> Path:
    """Return the directory with the state of a run. Its name does not tell the token."""
    return root.expanduser() / RUNS / protocol.digest(token)


def _children(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes from the state of a run."""
    lock = FileLock(directory / ".lock", blocking=False)  # a killed process loses its lock
    try:
        lock.acquire()
    except Timeout as error:
        raise Refusal("state", "another process of this client is busy with this run") from error
    try:
        yield
    finally:
        lock.release()


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

    def mark(self, path: Path) -> ConfigRecord:
        """Return the record that tells that a context holds the state in `path`."""
        return ConfigRecord({"run": self.directory.name, "file": path.name})

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
        matches = ((_NAME.fullmatch(path.name), path) for path in _children(self.directory))
        return [(int(match[1]), match[2] or "", path) for match, path in matches if match]


def _restore(files: _RunFiles, context: Context, latest: int) -> None:
    """Load the newest state that was saved up to round `latest` into `context.state`."""
    rounds = files.rounds()
    before = [path for at, path in rounds if at <= latest]
    if not before:
        later = sorted(at for at, _, _ in files.all())
        if later:
            _logger.warning(
                "%s has no state up to round %d, only of rounds %s: starting without a state",
                files.directory,
                latest,
                ", ".join(map(str, later)),
            )
            context.state.clear()
        return
    path = before[-1]
    mark = context.state.get(protocol.DISK_STATE)
    if isinstance(mark, ConfigRecord) and dict(mark) == dict(files.mark(path)):
        return
    try:
        state = unpack(*read_file(path))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StateFormatError(f"{path} is damaged: {error}") from error
    _logger.info("state of the run taken from %s", path)
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
    """Read the attempts in a message. Their ids become parts of file names.

    Raises:
        Refusal: the value is not a list of texts like "4:1f0c…".
    """
    items = value if isinstance(value, list) and len(value) <= _MOST_ATTEMPTS else [None]
    matches = [isinstance(item, str) and _ATTEMPT.fullmatch(item) for item in items]
    if not all(matches):
        raise Refusal("message", f"{protocol.ATTEMPTS} is not a list of a run's attempts")
    return [(int(match[1]), match[2]) for match in matches if match]
