import io
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NoReturn

import pytest

from shakespeare_data import CorpusUnavailable, DataError
from shakespeare_data.sources import TinyShakespeare

TEXT = b"Some Citizen:\nwords\n\n" * 5000
DIGEST = sha256(TEXT).hexdigest()


def tiny(directory: Path, url: str, **seconds: float) -> TinyShakespeare:
    return TinyShakespeare(directory, (url,), DIGEST, **seconds)


READ = f"""
import sys
from pathlib import Path
from shakespeare_data import CorpusUnavailable, DataError
from shakespeare_data.sources import TinyShakespeare

directory, url = sys.argv[1:]
tiny = TinyShakespeare(Path(directory), (url,), "{DIGEST}", answer_seconds=1.0, socket_seconds=0.5)
print("ready", flush=True)
sys.stdin.readline()
try:
    print(tiny.read()[1])
except DataError as error:
    print(type(error).__name__, error)
"""


def read_in_twenty_processes(directory: Path, url: str) -> list[str]:
    """Where each of twenty processes, let loose together, got the text, or why it did not."""
    command = [sys.executable, "-c", READ, str(directory), url]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(20)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [process.communicate()[0].strip() for process in processes]


def files(directory: Path) -> set[str]:
    """What lies there beside the lock, which filelock may leave or remove."""
    return {file.name for file in directory.iterdir()} - {"input.txt.lock"}


def test_a_good_download_is_kept_and_read_from_the_cache_afterwards(
    mirror: Any, tmp_path: Path
) -> None:
    mirror.serve(TEXT)
    cache = tmp_path / "deep" / "cache"
    assert tiny(cache, mirror.url).read() == (TEXT, f"downloaded from {mirror.url}")
    assert tiny(cache, mirror.url).read() == (TEXT, f"cache: {cache / 'input.txt'}")
    assert mirror.requests == 1
    assert files(cache) == {"input.txt"}


def test_twenty_processes_at_once_download_once(mirror: Any, tmp_path: Path) -> None:
    mirror.serve(TEXT)
    sources = read_in_twenty_processes(tmp_path, mirror.url)
    assert mirror.requests == 1
    assert sources.count(f"downloaded from {mirror.url}") == 1
    assert sources.count(f"cache: {tmp_path / 'input.txt'}") == 19


def hang(mirror: Any) -> None:
    mirror.answer = lambda _: mirror.released.wait(30)


def die_in_the_middle(mirror: Any) -> None:
    mirror.serve(TEXT[: len(TEXT) // 2], promised=len(TEXT))


@pytest.mark.parametrize(
    ("misbehave", "requests", "kind", "words"),
    [
        pytest.param(hang, 3, "CorpusUnavailable", ": ", id="hangs"),
        pytest.param(die_in_the_middle, 3, "CorpusUnavailable", "52500 more expected", id="dies"),
        pytest.param(
            lambda mirror: mirror.serve(b"<html>sign in</html>"),
            3,
            "DataError",
            "20 bytes with SHA-256",
            id="another file",
        ),
        pytest.param(
            lambda mirror: mirror.refuse(404), 1, "CorpusUnavailable", "HTTP Error 404", id="404"
        ),
        pytest.param(
            lambda mirror: mirror.refuse(500), 3, "CorpusUnavailable", "HTTP Error 500", id="500"
        ),
    ],
)
def test_of_twenty_processes_one_finds_what_is_wrong_and_all_say_it(
    mirror: Any,
    tmp_path: Path,
    misbehave: Callable[[Any], None],
    requests: int,
    kind: str,
    words: str,
) -> None:
    misbehave(mirror)
    outcomes = read_in_twenty_processes(tmp_path, mirror.url)
    mirror.released.set()
    assert len(outcomes) == 20
    assert all(outcome.startswith(f"{kind} Tiny Shakespeare is not at") for outcome in outcomes)
    assert all(words in outcome for outcome in outcomes)
    assert all(str(tmp_path / "input.txt") in outcome for outcome in outcomes)
    assert sum("found" in outcome and "s ago" in outcome for outcome in outcomes) == 19
    assert 1 <= mirror.requests <= requests  # the tries of one process
    assert files(tmp_path) == {"input.txt.unreachable"}


@pytest.mark.parametrize(
    ("content", "promised"),
    [
        pytest.param(TEXT[:-7], None, id="truncated"),
        pytest.param(TEXT.replace(b"words", b"sword"), None, id="altered"),
    ],
)
def test_a_download_with_another_hash_is_not_kept(
    mirror: Any, tmp_path: Path, content: bytes, promised: int | None
) -> None:
    mirror.serve(content, promised=promised)
    with pytest.raises(DataError, match="truncated or altered") as raised:
        tiny(tmp_path, mirror.url).read()
    assert not isinstance(raised.value, CorpusUnavailable)
    assert DIGEST in str(raised.value)
    assert sha256(content).hexdigest() in str(raised.value)
    assert files(tmp_path) == {"input.txt.unreachable"}


def test_mirrors_are_tried_in_order(
    mirror: Any, tmp_path: Path, closed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.serve(TEXT)
    monkeypatch.setenv("SHAKESPEARE_DATA_URL", f"{closed_url}  {mirror.url}")
    found = TinyShakespeare(tmp_path, sha256=DIGEST)
    assert found.urls == (closed_url, mirror.url)
    assert found.read() == (TEXT, f"downloaded from {mirror.url}")


def test_what_each_mirror_said_is_told(mirror: Any, tmp_path: Path, closed_url: str) -> None:
    mirror.serve(TEXT[:-1])
    with pytest.raises(DataError) as raised:
        TinyShakespeare(tmp_path, (closed_url, mirror.url), DIGEST).read()
    assert f"{closed_url}: urlopen error" in str(raised.value)
    assert f"the download from {mirror.url} was truncated or altered" in str(raised.value)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_is_shown_on_a_terminal_only(
    mirror: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]
) -> None:
    mirror.serve(TEXT)
    monkeypatch.setattr(sys, "stderr", stream())
    tiny(tmp_path, mirror.url).read()
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert shown == ("\rTiny Shakespeare: 0.1 of 1.1 MB\n" if stream is Terminal else "")


def test_a_verdict_of_another_form_is_no_verdict(mirror: Any, tmp_path: Path) -> None:
    mirror.serve(TEXT)
    for i, content in enumerate(["http://old\nreason\n", "[]", "{}", '{"urls": 3}']):
        directory = tmp_path / str(i)
        directory.mkdir()
        (directory / "input.txt.unreachable").write_text(content)
        assert tiny(directory, mirror.url).read()[0] == TEXT


def test_a_download_that_fails_at_first_is_tried_again(mirror: Any, tmp_path: Path) -> None:
    def second_time_lucky(handler: BaseHTTPRequestHandler) -> None:
        if mirror.requests == 1:
            handler.send_error(503)
        else:
            mirror.serve(TEXT)
            mirror.answer(handler)

    mirror.answer = second_time_lucky
    assert tiny(tmp_path, mirror.url).read()[0] == TEXT
    assert mirror.requests == 2


def test_an_answer_that_was_cut_off_is_tried_again_and_no_altered_file(
    mirror: Any, tmp_path: Path
) -> None:
    mirror.serve(TEXT[:-7], promised=len(TEXT))
    with pytest.raises(CorpusUnavailable, match=r"IncompleteRead.*7 more expected"):
        tiny(tmp_path, mirror.url).read()
    assert mirror.requests == 3


@pytest.mark.parametrize(("status", "requests"), [(429, 3), (408, 3), (503, 3), (403, 1), (410, 1)])
def test_only_what_may_pass_is_tried_again(
    mirror: Any, tmp_path: Path, status: int, requests: int
) -> None:
    mirror.refuse(status)
    with pytest.raises(CorpusUnavailable, match=f"HTTP Error {status}"):
        tiny(tmp_path, mirror.url).read()
    assert mirror.requests == requests


def test_a_missing_file_is_reported_without_further_tries(mirror: Any, tmp_path: Path) -> None:
    mirror.refuse(404)
    with pytest.raises(CorpusUnavailable, match="HTTP Error 404") as raised:
        tiny(tmp_path, mirror.url).read()
    assert mirror.requests == 1
    assert str(tmp_path / "input.txt") in str(raised.value)


def test_a_mirror_that_never_answers_is_given_up(mirror: Any, tmp_path: Path) -> None:
    released = threading.Event()
    mirror.answer = lambda _: released.wait(30)
    with pytest.raises(CorpusUnavailable, match="timed out"):
        tiny(tmp_path, mirror.url, answer_seconds=1.0, socket_seconds=0.2).read()
    released.set()


def test_a_name_that_never_resolves_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    released = threading.Event()

    def hang(*_: object, **__: object) -> NoReturn:
        released.wait(30)
        raise socket.gaierror("at last")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(CorpusUnavailable, match="no answer in time"):
        tiny(tmp_path, "http://a-name.invalid/", answer_seconds=0.3).read()
    released.set()


def test_a_closed_network_is_remembered_for_its_address_only(
    mirror: Any, tmp_path: Path, closed_url: str
) -> None:
    with pytest.raises(CorpusUnavailable, match="Connection refused"):
        tiny(tmp_path, closed_url).read()
    with pytest.raises(CorpusUnavailable, match=r"Connection refused.*found 0 s ago"):
        tiny(tmp_path, closed_url).read()
    mirror.serve(TEXT)
    assert tiny(tmp_path, mirror.url).read()[0] == TEXT
    assert files(tmp_path) == {"input.txt"}


def test_a_file_put_into_the_cache_needs_no_network_nor_lock(
    tmp_path: Path, closed_url: str
) -> None:
    (tmp_path / "input.txt").write_bytes(TEXT)
    assert tiny(tmp_path, closed_url).read() == (TEXT, f"cache: {tmp_path / 'input.txt'}")
    assert files(tmp_path) == {"input.txt"}


def test_a_cache_that_cannot_be_written_is_named(mirror: Any, tmp_path: Path) -> None:
    mirror.serve(TEXT)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to the cache directory .*/file/cache"):
        tiny(tmp_path / "file" / "cache", mirror.url).read()
    assert mirror.requests == 0


def test_a_directory_in_the_files_place_is_named(tmp_path: Path, closed_url: str) -> None:
    (tmp_path / "input.txt").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*input\.txt"):
        tiny(tmp_path, closed_url).read()


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/x", "input.txt"])
def test_only_http_addresses_are_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match=r"begin with https:// or http://, it has '"):
        tiny(tmp_path, url).read()


def test_an_address_that_makes_no_sense_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(CorpusUnavailable, match="nonnumeric port"):
        tiny(tmp_path, "http://host:port/").read()
