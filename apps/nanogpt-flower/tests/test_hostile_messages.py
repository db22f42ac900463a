"""Send malformed messages to a client of a deployment, through Flower's own serialisation.

Whatever a message holds, the client answers it, with a reply or with an error reply that tells
nothing of its text. It writes in its state path alone, takes little memory, and still answers a
good message afterwards.
"""

import os
import random
import re
import resource
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import metadata_from_proto, metadata_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flower_adapter import to_arrays
from flower_adapter.protocol import ATTEMPTS, COMPRESSION, END_QUERY, MIN_REPLIES, RUN
from flower_adapter.testing import LocalGrid
from nanogpt_flower.client_app import app, build_model
from shakespeare_data import Part, load_corpus, partition

pytestmark = pytest.mark.deployed

TOKEN = "0" * 64
POLICY = """
queries = ["label", "vocabulary", "end_of_run"]
min-replies = 2
max-rounds = 1_000_000
max-rounds-per-day = 1_000_000
max-rounds-in-all = 1_000_000
[run-config]
batch-size = { min = 1 }
block-size = { min = 1 }
learning-rate = { min = 0 }
[limits]
characters = { min = 0 }
windows = { min = 0 }
learning-rate-sum = { min = 0 }
steps = { max = 5 }
tokens = { max = 20_000 }
parameters = { max = 100_000 }
vocabulary = { max = 1_000 }
seconds = { max = 20 }
"""
MOST_MEMORY = 512 * 2**20  # bytes, on top of what the process had before
LONGEST_REASON = 300  # characters
WRITES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
REMOVALS = {"os.remove", "os.rmdir"}


def travelled(message: Message) -> Message:
    """Return the message as it comes out of Flower's serialisation on the other side."""
    objects = get_all_nested_objects(message.content)
    contents = {object_id: item.deflate() for object_id, item in objects.items()}
    content = inflate_object_from_contents(message.content.object_id, contents)
    metadata = metadata_from_proto(metadata_to_proto(message.metadata))
    arrived = Message(RecordDict(), metadata.dst_node_id, "train")
    arrived.content = content
    arrived.__dict__["_metadata"] = metadata
    return arrived


class Watch:
    """Records the paths that this process writes to, while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self.paths: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):  # not a file that is open
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.paths.append(os.fsdecode(arguments[0]))
        elif event in REMOVALS and arguments[1] != -1:
            pass  # a name in an open directory; "shutil.rmtree" has told the path
        elif event in WRITES | REMOVALS:
            self.paths += [os.fsdecode(item) for item in arguments if isinstance(item, str | Path)]


class Victim:
    """A client with a private text, and a state path that all messages share."""

    def __init__(self, room: Path, watch: Watch, run_config: dict[str, Any]) -> None:
        chance = random.Random(7)
        characters = string.ascii_letters + string.digits + " .,\n"
        private = room / "private"
        private.mkdir()
        text = private / "text.txt"
        text.write_text("".join(chance.choices(characters, k=7919)), encoding="utf-8")
        parts = partition(load_corpus(str(text)), 2)
        self.directory = parts.write(private / "parts")[0]
        self.part: Part = parts[0]
        self.state = room / "state"
        self.policy = room / "policy.toml"
        self.policy.write_text(POLICY, encoding="utf-8")
        self.run_config = run_config
        self.watch = watch
        self.config = {
            "tokenizer": self.part.tokenizer.to_json(),
            "corpus": "none",
            "corpus-sha256": "0" * 64,
            "server-round": 1,
            MIN_REPLIES: 2,
            RUN: TOKEN,
        }
        torch.manual_seed(0)
        self.arrays = to_arrays(build_model(ConfigRecord(dict(self.config)), self.context({})))

    def context(self, changed: dict[str, Any]) -> Context:
        node = {
            "data-path": str(self.directory),
            "state-path": str(self.state),
            "policy": str(self.policy),
        }
        return Context(1, 2, dict(node), RecordDict(), {**self.run_config, **changed})

    def good(self) -> RecordDict:
        arrays = ArrayRecord(dict(self.arrays))
        return RecordDict({"arrays": arrays, "config": ConfigRecord(dict(self.config))})

    def secrets(self) -> list[str]:
        """Return texts that no error may hold."""
        meta = self.part.meta
        text = self.part.tokenizer.decode(self.part.train)
        digests = [value[:8] for value in meta.values() if is_digest(value)]
        sizes = [str(len(self.part.train)), str(len(self.part.val)), "7919"]
        pieces = [text[start : start + 6] for start in range(0, len(text), 97)]
        return [str(self.directory.parents[2]), "private", "Traceback", *digests, *sizes, *pieces]

    def answer(self, message: Message, context: Context) -> Message:
        """Return the client's reply, and check everything that holds for all replies."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.watch.paths.clear()
        self.watch.is_on = True
        try:
            reply = app(message, context)
        finally:
            self.watch.is_on = False
        outside = [path for path in self.watch.paths if not is_inside(path, self.state)]
        assert not outside
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
        assert grown * 1024 < MOST_MEMORY
        if reply.has_error():
            reason = reply.error.reason or ""
            assert re.match(r"[a-z]+: \S", reason), reason
            assert reason.isprintable(), reason
            assert len(reason) <= LONGEST_REASON
            assert not [secret for secret in self.secrets() if secret in reason], reason
        else:
            travelled(reply)
        return reply


def is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value) is not None


def is_inside(path: str, directory: Path) -> bool:
    resolved = Path(path).resolve()
    return resolved == directory or directory in resolved.parents or path == os.devnull


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()  # an audit hook cannot be removed


@pytest.fixture
def victim(
    tmp_path: Path, watch: Watch, default_run_config: dict[str, Any], tiny: dict[str, Any]
) -> Victim:
    LocalGrid(app, 0)  # lets this process make messages, as a ServerApp does
    run_config = {**default_run_config, **tiny, "corpus": "none", "max-steps": 2}
    found = Victim(tmp_path, watch, run_config)
    app(Message(found.good(), 2, "train"), found.context({}))  # torch makes its own directories
    return found


# Hostile values.

PATHS = ["../../out", "/etc/passwd", "/tmp/x", "..", "a/../../b", "\0", "%2e%2e/", "~/.ssh", ""]
NAMES = st.sampled_from([*PATHS, "arrays", "config", "transformer.wte.weight"]) | st.text(
    max_size=20
)
NUMBERS = st.sampled_from([0, -1, 1, 2, 10**6, 10**9, 10**18, 2**62, -(2**63)]) | st.integers(
    -(2**63), 2**63 - 1
)
FLOATS = st.floats() | st.sampled_from([1e300, -1e300, 5e-324])
TEXTS = st.sampled_from([*PATHS, "x" * 100_000, "[" * 20_000, '{"a":' * 5_000]) | st.text(
    max_size=40
)
LISTS = (
    st.lists(NUMBERS, max_size=3)
    | st.lists(FLOATS, min_size=1, max_size=3)
    | st.lists(TEXTS, min_size=1, max_size=3)
    | st.lists(st.binary(max_size=9), min_size=1, max_size=3)
)
VALUES = NUMBERS | FLOATS | TEXTS | LISTS | st.binary(max_size=30) | st.booleans()

TOKENIZERS = st.sampled_from(
    [
        "{}",
        "null",
        "[]",
        '{"type": "char"}',
        '{"type": "char", "vocab": []}',
        '{"type": "char", "vocab": "aa"}',
        '{"type": "char", "vocab": "abc", "version": 1e999}',
        '{"type": "char", "vocab": ' + '"' + "".join(map(chr, range(200, 55_000))) + '"}',
        "[" * 100_000,
        "1" * 10_000,
    ]
)
TOKENS = st.sampled_from([TOKEN.upper(), "f" * 64, "0" * 63, "0" * 65, "../" * 21 + "0"]) | VALUES
ATTEMPT = st.sampled_from(
    ["1:" + "f" * 32, "1:../../x", ":", "a", "9" * 30 + ":" + "f" * 32, "-1:" + "0" * 32, "1:"]
)
ATTEMPT_LISTS = (
    st.lists(ATTEMPT | st.text(max_size=9), max_size=4)
    | st.just(["1:" + "f" * 32] * 2_000)
    | VALUES
)
SPECIAL = {"tokenizer": TOKENIZERS, RUN: TOKENS, ATTEMPTS: ATTEMPT_LISTS}
KEYS = ["tokenizer", "corpus", "corpus-sha256", "server-round", MIN_REPLIES, RUN, ATTEMPTS]

Change = Callable[[RecordDict], None]


@st.composite
def config_changes(draw: st.DrawFn) -> Change:
    key = draw(st.sampled_from(KEYS) | NAMES)
    is_missing = draw(st.booleans()) and draw(st.booleans())
    value = draw(SPECIAL.get(key, VALUES) | VALUES)

    def change(content: RecordDict) -> None:
        if is_missing:
            content["config"].pop(key, None)
        else:
            content["config"][key] = value

    return change


HEADERS = st.sampled_from(
    [
        b"((((",
        b"{[]: 1}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (16000, 16000), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,), }",
        b"-" * 200 + b"1",
        b"\xff" * 60,
    ]
) | st.binary(max_size=80)
STYPES = st.sampled_from(
    [
        "numpy.ndarray",
        "pickle",
        "",
        "flower-adapter/fp32/2",
        "flower-adapter/2-bit/2",
        "flower-adapter/int4/2",
        "flower-adapter/top-k:1e-300/2",
        "flower-adapter/top-k:nan/2",
        "flower-adapter/none/2",
        "flower-adapter/2-bit/9",
        "flower-adapter/" + "x" * 5_000,
    ]
)
SHAPES = st.sampled_from(
    [(), (0,), (1,), (16_000, 16_000), (2**40,), (2**62, 2), (1,) * 70, (16, 16)]
)
DTYPES = st.sampled_from(["float32", "float64", "int64", "object", "bool", "", "x" * 1_000, "<V9"])


def with_header(data: bytes, header: bytes) -> bytes:
    size = len(header) + 1
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + header + b"\n" + data[128:]


@st.composite
def array_changes(draw: st.DrawFn) -> Change:
    kind = draw(st.sampled_from(["header", "bytes", "declared", "value", "missing", "extra"]))
    place, name = draw(st.integers(0, 99)), draw(NAMES)
    header, data = draw(HEADERS), draw(st.binary(max_size=300))
    stype, shape, dtype = draw(STYPES), draw(SHAPES), draw(DTYPES)
    value = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))

    def change(content: RecordDict) -> None:
        arrays = content["arrays"]
        if not arrays:
            return
        which = sorted(arrays)[place % len(arrays)]
        old = arrays[which]
        if kind == "missing":
            del arrays[which]
        elif kind == "extra":
            arrays[name] = old
        elif kind == "value":
            arrays[which] = Array(np.full(old.shape, value, np.float32))
        elif kind == "header":
            new = with_header(old.data, header)
            arrays[which] = Array(old.dtype, old.shape, old.stype, new)
        elif kind == "bytes":
            arrays[which] = Array(old.dtype, old.shape, stype, data)
        else:
            arrays[which] = Array(dtype, shape, stype, old.data)

    return change


CODECS = st.sampled_from(["fp32", "2-bit", "top-k:1e-300", "top-k:nan", "x" * 10_000]) | TEXTS


@st.composite
def record_changes(draw: st.DrawFn) -> Change:
    kind = draw(st.sampled_from(["no config", "no arrays", "metrics", "two arrays", "compression"]))
    codec = st.sampled_from([1, 2, "1"]) if draw(st.booleans()) else VALUES
    header = {
        "format": draw(codec),
        "downlink": draw(CODECS | VALUES),
        "uplink": draw(CODECS | VALUES),
        "base": draw(TEXTS | VALUES),
        "version": draw(TEXTS | VALUES),
    }
    left = draw(st.sets(st.sampled_from(sorted(header))))
    name = draw(NAMES)

    def change(content: RecordDict) -> None:
        if kind == "no config":
            content["config"] = ConfigRecord()
        elif kind == "no arrays":
            content["arrays"] = ArrayRecord()
        elif kind == "metrics":
            content[name] = MetricRecord({"num-examples": 1})
        elif kind == "two arrays":
            content["more"] = ArrayRecord(dict(content["arrays"]))
        else:
            kept = {key: value for key, value in header.items() if key in left}
            content[COMPRESSION] = ConfigRecord(kept)

    return change


MESSAGES = st.sampled_from(
    [
        *["train"] * 6,
        *["evaluate"] * 2,
        *("query.label", "query.vocabulary", END_QUERY),
        *("query", "query.x", "query.../../x", "train.x", "evaluate.train"),
    ]
)
RUN_CONFIG_KEYS = [
    *("n-embd", "n-head", "n-layer", "block-size", "batch-size", "max-steps", "local-epochs"),
    *("learning-rate", "warmup-steps", "dropout", "optimizer", "device", "precision", "seed"),
    *("compile", "uplink", "client-state", "output-dir", "no-such-key"),
]
RUN_CONFIGS = st.dictionaries(
    st.sampled_from(RUN_CONFIG_KEYS), NUMBERS | FLOATS | TEXTS | st.booleans(), max_size=2
)
CHANGES = st.lists(config_changes() | array_changes() | record_changes(), max_size=3)
ALWAYS = settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.large_base_example,
        HealthCheck.data_too_large,
    ],
)


def hostile(victim: Victim, kind: str, changes: list[Change]) -> Message:
    """Return a changed message after its way through Flower. Flower may not let it through."""
    content = victim.good()
    try:
        for change in changes:
            change(content)
        return travelled(Message(content, 2, kind))
    except Exception:  # the message does not reach the client
        assume(False)
        raise


@ALWAYS
@given(kind=MESSAGES, changes=CHANGES, run_config=st.just({}) | RUN_CONFIGS)
def test_every_message_is_answered_and_no_answer_tells_of_the_text(
    victim: Victim, kind: str, changes: list[Change], run_config: dict[str, Any]
) -> None:
    context = victim.context(run_config)
    victim.answer(hostile(victim, kind, changes), context)
    afterwards = victim.answer(travelled(Message(victim.good(), 2, "train")), victim.context({}))
    assert not afterwards.has_error(), afterwards.error


def test_a_good_message_survives_the_way_through_flower(victim: Victim) -> None:
    arrived = travelled(Message(victim.good(), 2, "train"))
    assert arrived.metadata.message_type == "train"
    assert arrived.content["arrays"] == victim.arrays
    reply = victim.answer(arrived, victim.context({}))
    assert reply.content["metrics"]["num-examples"] == len(victim.part.train)
    written = {path.name for path in victim.state.iterdir()}
    assert {"runs", "rounds.json", "audit.jsonl", "secret"} <= written
