"""A client's context in a directory of its own, so that it outlives a restart."""

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from flower_adapter.checks import require_count
from flower_adapter.label import default_label
from flower_adapter.messages import config_of, refusal
from flower_adapter.packing import pack, read_file, sync, unpack, write_file
from flower_adapter.state import StateFormatError

RUN = "flower-adapter.run"  # in the server's config: the run that a resumed one goes on with
RESUMED = "flower-adapter.resumed"  # "4:1f0c…", round and attempt, for each time it was resumed
_MARK = "flower-adapter.durable"  # in the context: what file it is equal to
_NAME = re.compile(r"round-(\d{6,})(?:-([0-9a-f]+))?\.safetensors")
_LONGEST_NAME = 120  # characters; file systems allow 255 bytes, and a round's file needs less

_logger = logging.getLogger("flwr")


class Durable:
    """A Flower mod that keeps `context.state` on disk: `ClientApp(mods=[Durable("state")])`.

    After each train message the whole of `context.state` (optimizer, error feedback, whatever is
    there) is written to `<directory>/<label>/<run>/round-<n>.safetensors`, atomically; the last
    `keep` rounds stay. Before a message of round n the context is made what it was after this
    client's last training before n, if it is not that already: a run that `Checkpointed` resumes
    at an earlier round finds each client as it was then, and what a cut-off attempt left of later
    rounds is not used and is removed. What a message that raised had changed is undone.

    The run is the one that `Checkpointed` names in its messages, so that a resumed run goes on with
    the old one's, else Flower's. Before other mods that keep state, such as `wire_mod`, it keeps
    theirs too. `label(context)` must be the client's in every run: "partition 0007" by default,
    else the node id. `directory` can be a function of the context; where it gives None nothing is
    kept. Directories of old runs are the user's to remove.

    A file that is damaged or cannot be read or written is answered with an error that names it.
    """

    def __init__(
        self,
        directory: str | Path | Callable[[Context], str | Path | None],
        *,
        keep: int = 3,
        label: Callable[[Context], str] = default_label,
    ) -> None:
        require_count("keep", keep)
        self.directory = directory
        self.keep = keep
        self.label = label

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        kind = message.metadata.message_type.partition(".")[0]
        config = config_of(message)
        server_round = config.get("server-round")
        worked_on = kind in (MessageType.TRAIN, MessageType.EVALUATE)
        if not worked_on or not isinstance(server_round, int):
            return call_next(message, context)
        root = self.directory(context) if callable(self.directory) else self.directory
        if root is None:
            return call_next(message, context)
        is_train = kind == MessageType.TRAIN
        run = str(config.get(RUN, message.metadata.run_id))
        place = Path(root).expanduser() / _name(self.label(context)) / _name(run)
        kept = _Kept(place, _lineage(config.get(RESUMED)))
        try:
            _restore(kept, context, run, server_round - 1 if is_train else server_round)
        except (StateFormatError, OSError) as error:
            return refusal(message, error)
        if not is_train:
            return call_next(message, context)
        reply = _undoing_failures(message, context, call_next)
        if reply.has_error():
            return reply
        try:
            self._write(kept, context.state, run, server_round)
        except OSError as error:
            return refusal(message, error)
        return reply

    def _write(self, kept: "_Kept", state: RecordDict, run: str, server_round: int) -> None:
        path = kept.path(server_round)
        state[_MARK] = ConfigRecord({"run": run, "file": path.name})
        structure, arrays = pack(state, "context.state")
        kept.place.mkdir(parents=True, exist_ok=True)
        later = [old for at, old in kept.rounds() if at > server_round]
        for old in (*later, *kept.abandoned(), *kept.place.glob(".round-*")):
            old.unlink()
        beside = path.with_name(f".{path.name}")
        write_file(beside, structure, arrays)
        beside.replace(path)
        sync(kept.place)
        for _, old in kept.rounds()[: -self.keep]:
            old.unlink()
        _logger.debug("context kept in %s", path)


class _Kept(NamedTuple):
    """The files of one client and run."""

    place: Path
    lineage: list[tuple[int, str]]  # the rounds after which the run was resumed, and the attempts

    def path(self, server_round: int) -> Path:
        """Where this attempt keeps a round."""
        suffix = f"-{self.lineage[-1][1]}" if self.lineage else ""
        return self.place / f"round-{server_round:06d}{suffix}.safetensors"

    def rounds(self) -> list[tuple[int, Path]]:
        """The rounds that this attempt goes on from, oldest first, each as last written."""
        newest: dict[int, tuple[int, Path]] = {}
        for at, attempt, path in self.all():
            if self._is_ours(at, attempt):
                newest[at] = max(newest.get(at, (-1, path)), (self._number(attempt), path))
        return [(at, path) for at, (_, path) in sorted(newest.items())]

    def abandoned(self) -> list[Path]:
        """What cut-off attempts left of rounds that were gone back before."""
        return [path for at, attempt, path in self.all() if not self._is_ours(at, attempt)]

    def _number(self, attempt: str) -> int:
        return ["", *(name for _, name in self.lineage)].index(attempt)

    def _is_ours(self, at: int, attempt: str) -> bool:
        known = not attempt or any(attempt == name for _, name in self.lineage)
        return known and all(at <= after for after, _ in self.lineage[self._number(attempt) :])

    def all(self) -> list[tuple[int, str, Path]]:
        """Round, attempt and path of every file."""
        if not self.place.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self.place.iterdir())
        return [(int(match[1]), match[2] or "", path) for match, path in matches if match]


def _restore(kept: _Kept, context: Context, run: str, latest: int) -> None:
    """Make `context.state` what it was after the last training up to round `latest`."""
    rounds = kept.rounds()
    before = [path for at, path in rounds if at <= latest]
    mark = context.state.get(_MARK)
    if not before:
        later = sorted(at for at, _, _ in kept.all())
        if later:
            _logger.warning(
                "no state is kept of run %s up to round %d, only of rounds %s: starting without",
                run,
                latest,
                ", ".join(map(str, later)),
            )
            context.state.clear()
        return
    path = before[-1]
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
    """The reply; after a failure the context is empty, and the next message takes the disk's."""
    context.state.pop(_MARK, None)
    failed = True
    try:
        reply = call_next(message, context)
        failed = reply.has_error()
    finally:
        if failed:
            context.state.clear()
    return reply


def _lineage(value: object) -> list[tuple[int, str]]:
    parts = [str(item).partition(":") for item in value] if isinstance(value, list) else []
    return [(int(after), attempt) for after, _, attempt in parts]


def _name(text: str) -> str:
    """`text` as the name of one directory, another for each."""
    name = quote(text, safe=" ")
    if name.strip(".") == "":
        name = name.replace(".", "%2E") or "%"
    if len(name) > _LONGEST_NAME:
        name = f"{name[:40]}%{hashlib.sha256(text.encode()).hexdigest()}"
    return name
