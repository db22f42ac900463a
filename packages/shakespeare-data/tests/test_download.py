import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NoReturn

import pytest

from shakespeare_data import CorpusUnavailable, DataError, sources
from shakespeare_data.sources import TinyShakespeare

TEXT = b"Some Citizen:\nwords\n\n" * 5000
DIGEST = sha256(TEXT).hexdigest()


def tiny(directory: Path, *urls: str, seconds: float = 13.0) -> TinyShakespeare:
    return TinyShakespeare(directory, urls, DIGEST, seconds)


# A process imports the package once and forks ten children. They wait until all of them exist.
TEN_READERS = f"""
import os, sys
from pathlib import Path
from shakespeare_data import DataError
from shakespeare_data.sources import TinyShakespeare

directory, url = sys.argv[1:]
gate, holder = os.pipe()
children = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        os.close(holder)
        os.read(gate, 1)
        try:
            outcome = TinyShakespeare(Path(directory), (url,), "{DIGEST}").read()[1]
        except DataError as error:
            outcome = f"{{type(error).__name__}} {{error}}"
        os.write(1, f"{{outcome}}\\n".encode())
        os._exit(0)
    children.append(child)
os.close(holder)
for child in children:
    os.waitpid(child, 0)
"""


def read_in_ten_processes(directory: Path, url: str) -> list[str]:
    """Return where each of ten processes got the text, or its error. All read at the same time."""
    command = [sys.executable, "-c", TEN_READERS, str(directory), url]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def files(directory: Path) -> set[str]:
    """Return the names in `directory` without the lock, which filelock may leave or remove."""
    return {file.name for file in directory.iterdir()} - {"input.txt.lock"}


def test_a_good_download_is_kept_and_read_from_the_cache_afterwards(
    mirror: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mirror.serve(TEXT)
    cache = tmp_path / "deep" / "cache"
    assert tiny(cache, mirror.url).read() == (TEXT, f"downloaded from {mirror.url}")
    assert tiny(cache, mirror.url).read() == (TEXT, f"cache: {cache / 'input.txt'}")
    assert mirror.requests == 1
    assert files(cache) == {"input.txt"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_other_users_can_read_the_cached_file(mirror: Any, tmp_path: Path) -> None:
    mirror.serve(TEXT)
    tiny(tmp_path, mirror.url).read()
    assert (tmp_path / "input.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_ten_processes_at_once_download_once(mirror: Any, tmp_path: Path) -> None:
    mirror.serve(TEXT)
    found = read_in_ten_processes(tmp_path, mirror.url)
    assert mirror.requests == 1
    assert found.count(f"downloaded from {mirror.url}") == 1
    assert found.count(f"cache: {tmp_path / 'input.txt'}") == 9


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_one_of_ten_processes_finds_the_failure_and_all_report_it(
    mirror: Any, tmp_path: Path
) -> None:
    mirror.refuse(404)
    found = read_in_ten_processes(tmp_path, mirror.url)
    assert mirror.requests == 2  # the two rounds of one process
    assert len(found) == 10
    for outcome in found:
        assert outcome.startswith(
            f"CorpusUnavailable Tiny Shakespeare is not at {tmp_path / 'input.txt'}"
        )
        assert "404 Client Error" in outcome
    assert sum("s ago, and the next try is 60 s after" in outcome for outcome in found) == 9


def hang(mirror: Any) -> None:
    mirror.answer = lambda _: mirror.released.wait(30)


@pytest.mark.parametrize(
    ("misbehave", "words"),
    [
        pytest.param(hang, "no complete answer within 1.0 s", id="hangs"),
        pytest.param(
            lambda mirror: mirror.serve(TEXT[:-7], promised=len(TEXT)),
            "7 more expected",
            id="cut off",
        ),
        pytest.param(
            lambda mirror: mirror.serve(TEXT[:-7]), "does not match the known hash", id="truncated"
        ),
        pytest.param(
            lambda mirror: mirror.serve(TEXT.replace(b"words", b"sword")),
            f"{DIGEST} but got {sha256(TEXT.replace(b'words', b'sword')).hexdigest()}",
            id="altered",
        ),
        pytest.param(lambda mirror: mirror.refuse(403), "403 Client Error", id="forbidden"),
        pytest.param(lambda mirror: mirror.refuse(500), "500 Server Error", id="broken"),
    ],
)
def test_a_mirror_that_does_not_deliver_the_file_is_named_with_the_reason(
    mirror: Any, tmp_path: Path, misbehave: Callable[[Any], None], words: str
) -> None:
    misbehave(mirror)
    with pytest.raises(CorpusUnavailable) as raised:
        tiny(tmp_path, mirror.url, seconds=1.0).read()
    mirror.released.set()
    assert f"({mirror.url}: " in str(raised.value)
    assert words in str(raised.value)
    assert "put the file there, or set SHAKESPEARE_DATA_DIR" in str(raised.value)
    assert mirror.requests <= 2
    assert files(tmp_path) == {"input.txt.unreachable"}


def test_an_endless_answer_is_cut_off(
    mirror: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.serve(TEXT)
    monkeypatch.setattr(sources, "_MAX_BYTES", 10_000)
    with pytest.raises(CorpusUnavailable, match="the answer is longer than 10,000 bytes"):
        tiny(tmp_path, mirror.url).read()


def test_mirrors_are_tried_in_order(
    mirror: Any, tmp_path: Path, closed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.serve(TEXT)
    monkeypatch.setenv("SHAKESPEARE_DATA_URL", f"{closed_url}  {mirror.url}")
    found = TinyShakespeare(tmp_path, sha256=DIGEST)
    assert found.urls == (closed_url, mirror.url)
    assert found.read() == (TEXT, f"downloaded from {mirror.url}")


def test_the_error_has_a_reason_for_each_mirror(
    mirror: Any, tmp_path: Path, closed_url: str
) -> None:
    mirror.serve(TEXT[:-1])
    with pytest.raises(CorpusUnavailable) as raised:
        tiny(tmp_path, closed_url, mirror.url).read()
    refused, mismatched = str(raised.value).split("; ")[:2]
    assert f"{closed_url}: " in refused
    assert "Connection refused" in refused
    assert mismatched.startswith(f"{mirror.url}: SHA256 hash of downloaded file")


def test_a_mirror_that_fails_at_first_is_tried_once_more(mirror: Any, tmp_path: Path) -> None:
    def fail_once(handler: BaseHTTPRequestHandler) -> None:
        if mirror.requests == 1:
            handler.send_error(503)
        else:
            mirror.serve(TEXT)
            mirror.answer(handler)

    mirror.answer = fail_once
    assert tiny(tmp_path, mirror.url).read()[0] == TEXT
    assert mirror.requests == 2


def test_the_lack_of_a_network_is_known_within_15_seconds() -> None:
    # A reader waits for the lock, which another one holds during its whole download.
    assert TinyShakespeare().seconds + sources._LOCK_SECONDS < 15


def test_mirrors_that_hang_share_one_limit(mirror: Any, tmp_path: Path) -> None:
    hang(mirror)
    urls = [f"{mirror.url}?{i}" for i in range(5)]
    with pytest.raises(CorpusUnavailable) as raised:
        tiny(tmp_path, *urls, seconds=0.5).read()
    mirror.released.set()
    assert str(raised.value).count("no complete answer within 0.1 s") == 5
    assert mirror.requests <= 5  # there is no time for a second round


def test_a_mirror_that_hangs_leaves_time_for_the_next_one(
    mirror: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    resolve = socket.getaddrinfo

    def hang_for_one_name(host: Any, *arguments: Any, **options: Any) -> Any:
        if "hangs" in str(host):
            released.wait(30)
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang_for_one_name)
    mirror.serve(TEXT)
    found = tiny(tmp_path, "http://hangs.invalid/", mirror.url, seconds=2.0).read()
    released.set()
    assert found == (TEXT, f"downloaded from {mirror.url}")


def test_a_name_that_never_resolves_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    released = threading.Event()

    def never_resolve(*_: object, **__: object) -> NoReturn:
        released.wait(30)
        raise socket.gaierror("at last")

    monkeypatch.setattr(socket, "getaddrinfo", never_resolve)
    with pytest.raises(CorpusUnavailable, match=r"no complete answer within 0\.3 s"):
        tiny(tmp_path, "http://a-name.invalid/", seconds=0.3).read()
    released.set()


def test_a_failed_download_is_remembered_for_its_mirrors_only(
    mirror: Any, tmp_path: Path, closed_url: str
) -> None:
    with pytest.raises(CorpusUnavailable, match="Connection refused"):
        tiny(tmp_path, closed_url).read()
    with pytest.raises(CorpusUnavailable, match=r"Connection refused.*failed 0 s ago"):
        tiny(tmp_path, closed_url).read()
    mirror.serve(TEXT)
    assert tiny(tmp_path, mirror.url).read()[0] == TEXT
    assert files(tmp_path) == {"input.txt"}


@pytest.mark.parametrize("shift", [-61, 61], ids=["an old failure", "a clock that was set back"])
def test_a_failed_download_is_forgotten_after_a_minute(
    mirror: Any, tmp_path: Path, shift: int
) -> None:
    mirror.refuse(404)
    with pytest.raises(CorpusUnavailable):
        tiny(tmp_path, mirror.url).read()
    failure = tmp_path / "input.txt.unreachable"
    written = failure.stat().st_mtime
    os.utime(failure, (written + shift, written + shift))
    mirror.serve(TEXT)
    assert tiny(tmp_path, mirror.url).read()[0] == TEXT


@pytest.mark.parametrize("content", ["http://old\nreason\n", "[]", "{}", '{"urls": 3}'])
def test_a_failure_file_of_another_form_is_ignored(
    mirror: Any, tmp_path: Path, content: str
) -> None:
    mirror.serve(TEXT)
    (tmp_path / "input.txt.unreachable").write_text(content)
    assert tiny(tmp_path, mirror.url).read()[0] == TEXT


def test_a_file_put_into_the_cache_needs_neither_a_network_nor_a_lock(
    tmp_path: Path, closed_url: str
) -> None:
    (tmp_path / "input.txt").write_bytes(TEXT)
    assert tiny(tmp_path, closed_url).read() == (TEXT, f"cache: {tmp_path / 'input.txt'}")
    assert [file.name for file in tmp_path.iterdir()] == ["input.txt"]


def test_a_cache_that_cannot_be_written_is_named(mirror: Any, tmp_path: Path) -> None:
    mirror.serve(TEXT)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to the cache directory .*/file/cache"):
        tiny(tmp_path / "file" / "cache", mirror.url).read()
    assert mirror.requests == 0


def test_a_directory_in_the_place_of_the_file_is_named(tmp_path: Path, closed_url: str) -> None:
    (tmp_path / "input.txt").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*input\.txt"):
        tiny(tmp_path, closed_url).read()


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/x", "input.txt"])
def test_an_address_that_is_not_http_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match=r"begin with https:// or http://, it has '"):
        tiny(tmp_path, url).read()


def test_an_address_that_cannot_be_parsed_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusUnavailable, match="not a valid host or port"):
        tiny(tmp_path, "http://host:port/").read()
