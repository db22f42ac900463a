"""Fixtures: corpora, a local mirror, and an empty cache. No test reaches the internet."""

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from shakespeare_data import Corpus, sources

# A slow test on a busy machine is not a failure.
settings.register_profile("any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any pace")


def pytest_configure(config: pytest.Config) -> None:
    """Ignore one warning: pooch does not close the socket of an answer with an error status."""
    config.addinivalue_line("filterwarnings", "ignore:unclosed:ResourceWarning")


VERSES = "".join(f"Speaker {i % 7}:\nline {i} of a play that nobody wrote\n\n" for i in range(400))

# Three plays of unequal length. Each role speaks in letters of its own.
FOLIO_SPEECHES = {
    "Long": [("ANN", "aaaa bc"), ("BOB", "bbbb ca"), ("CAT", "cccc")] * 60,
    "Middle": [("ANN", "dddd"), ("DAN", "eeee ab")] * 40,
    "Short": [("EVE", "ffff"), ("FAY", "gggg")] * 20,
}


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., Corpus]:
    """A function that makes a corpus of any text."""

    def make(text: str = VERSES) -> Corpus:
        digest = sha256(text.encode()).hexdigest()
        return Corpus("verses", text, "made by the tests", digest, "none")

    return make


@pytest.fixture(scope="session")
def verses(make_corpus: Callable[..., Corpus]) -> Corpus:
    """A corpus without plays: 400 paragraphs of seven speakers."""
    return make_corpus()


@pytest.fixture(scope="session")
def folio(make_corpus: Callable[..., Corpus]) -> Corpus:
    """A corpus of three plays with seven roles and 300 speeches."""
    texts = {
        title: "".join(f"{speaker}:\n{line} {i}\n\n" for i, (speaker, line) in enumerate(speeches))
        for title, speeches in FOLIO_SPEECHES.items()
    }
    starts = accumulate((len(text) for text in texts.values()), initial=0)
    corpus = make_corpus("".join(texts.values()))
    return replace(corpus, name="folio", titles=tuple(zip(starts, texts, strict=False)))


class Mirror:
    """An HTTP server on loopback. `answer` writes each response, and `requests` counts them."""

    def __init__(self) -> None:
        self.requests = 0
        self.released = threading.Event()  # lets the requests that hang come to an end
        self.answer: Callable[[BaseHTTPRequestHandler], object] = lambda _: None
        self._count = threading.Lock()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with mirror._count:
                    mirror.requests += 1
                mirror.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/input.txt"

    def serve(self, content: bytes, *, promised: int | None = None) -> None:
        """Answer with `content`, and announce `promised` bytes."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Length", str(promised or len(content)))
            handler.end_headers()
            handler.wfile.write(content)

        self.answer = answer

    def refuse(self, status: int) -> None:
        """Answer with an HTTP error."""
        self.answer = lambda handler: handler.send_error(status)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    """A running mirror."""
    mirror = Mirror()
    thread = threading.Thread(target=mirror.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()
    thread.join()


@pytest.fixture
def closed_url() -> str:
    """An address on loopback where no server listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    return f"http://127.0.0.1:{port}/input.txt"


@pytest.fixture(autouse=True)
def _isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed_url: str) -> None:
    """Give each test an empty cache, a mirror that refuses, and no pause before the second try."""
    monkeypatch.setattr(sources, "_PAUSES", (0.0, 0.0))
    monkeypatch.setenv("SHAKESPEARE_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SHAKESPEARE_DATA_URL", closed_url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
