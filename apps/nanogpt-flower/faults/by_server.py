"""Group A: what a server asks of a client with its own text.

In each fault three clients train in an honest run. After the first round a stranger, the server of
another run, sends messages to one of them. This client has the default policy, unless a fault says
otherwise. The honest run must then end with the weights of the undisturbed run.
"""

import hashlib
import json
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from faults import contract
from faults.matrix import Outcome, TookTooLong, Unexpected, expect, fault, time_limit
from faults.runs import (
    HONEST,
    SMALL,
    policy_file,
    run,
    same_result,
    settings,
    text_file,
    undisturbed,
)
from faults.wire import Client, WireGrid, ask
from flower_adapter import protocol, to_arrays
from gpt_core import GPT
from nanogpt_flower.client_app import app as client_app
from nanogpt_flower.composition import model_config
from nanogpt_flower.preset import preset_named
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, Part, read_part

VICTIM = HONEST[0]
STRANGERS_RUN = 666  # the run id of the stranger's run
MOST_MEMORY = 200 * 2**20  # bytes by which the memory of a client may grow
REFUSED = "the client refuses by its policy"
# A small model that trains as the preset quick does, so that the default policy has no objection.
QUICK = preset_named("quick").run_config | {"n-layer": 1, "n-head": 1, "n-embd": 16}


@dataclass
class Stranger:
    """The server of another run, which sends messages to a client of the honest run.

    Attributes:
        directory: an empty directory.
        part: the directory with the text of the client.
        state: the state directory of the client.
        grid: the grid of the honest run.
    """

    directory: Path
    part: Path
    state: Path
    grid: WireGrid

    def client(self, policy: Path | None = None, **node_config: Any) -> Client:
        """Return the client as its operator has started it. None is the default policy."""
        config = contract.deployed(self.part, self.state, policy)
        return Client(client_app, config | node_config)

    def ask(
        self,
        client: Client | None = None,
        message_type: str = MessageType.TRAIN,
        *,
        config: Mapping[str, Any] | None = None,
        arrays: ArrayRecord | None = None,
        records: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Message:
        """Send one message, and return the reply. The settings have "_" in place of "-"."""
        changed = {key.replace("_", "-"): value for key, value in changes.items()}
        is_query = message_type.startswith(MessageType.QUERY)
        sent = weights() if arrays is None and not is_query else arrays
        return ask(
            client or self.client(),
            message_type,
            RecordDict(
                {
                    **({} if sent is None else {"arrays": sent}),
                    "config": ConfigRecord({**config_for_clients(), **(config or {})}),
                    **(records or {}),
                }
            ),
            number=VICTIM,
            run_config={**settings(QUICK), **changed},
            run_id=STRANGERS_RUN,
        )


def tokenizer() -> CharTokenizer:
    """Return the vocabulary of the text."""
    return CharTokenizer.from_text(text_file().read_text(encoding="utf-8"))


def weights(**changes: Any) -> ArrayRecord:
    """Return weights for the model of the settings."""
    torch.manual_seed(0)
    config = model_config(Settings.from_run_config({**QUICK, **changes}), tokenizer().vocab_size)
    return to_arrays(GPT(config))


def config_for_clients() -> dict[str, Any]:
    """Return the config of an honest message to a client with its own text."""
    return {
        "tokenizer": tokenizer().to_json(),
        "corpus": "none",
        "corpus-sha256": "",
        protocol.SERVER_ROUND: 1,
        protocol.MIN_REPLIES: 3,
    }


def attacked(
    directory: Path, attack: Callable[[Stranger], str], *, after: int = 1, **changes: Any
) -> Outcome:
    """Run honestly, and let a stranger attack one client after its training of a round.

    The function `attack` returns what happened. Its errors are raised after the honest run has
    ended.

    Args:
        directory: an empty directory.
        attack: sends the messages.
        after: the round.
        changes: changed settings of the honest run.
    """
    happened: list[str | Exception] = []

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        is_train = message.metadata.message_type == MessageType.TRAIN
        server_round = protocol.config_of(message).get(protocol.SERVER_ROUND)
        if is_train and number == VICTIM and server_round == after and not happened:
            config = grid.clients[VICTIM].node_config
            room = directory / "stranger"
            room.mkdir()
            stranger = Stranger(room, Path(config["data-path"]), Path(config["state-path"]), grid)
            try:
                happened.append(attack(stranger))
            except Exception as error:
                happened.append(error)
        return reply

    finished = run(directory, answer=answer, **changes)
    outcome = same_result(str(happened[0]), finished, undisturbed(**changes))
    if isinstance(happened[0], Unexpected):
        raise Unexpected(str(happened[0]), outcome)
    if isinstance(happened[0], Exception):
        raise happened[0]
    return outcome


def refusal(reply: Message, code: str = "") -> str:
    """Expect a refusal with a code, and return its text."""
    expect(reply.has_error(), "the client did what it was asked")
    reason = reply.error.reason or ""
    expect(
        contract.REFUSAL.fullmatch(reason) and reason.startswith(code),
        f"the client failed, but not by its policy: {reason}",
    )
    return f"refused: {reason}"


def refused(**changes: Any) -> Callable[[Stranger], str]:
    """Return an attack with settings that the client must refuse."""

    def attack(stranger: Stranger) -> str:
        with bounded_memory():
            try:
                with time_limit(8):
                    reply = stranger.ask(**changes)
            except TookTooLong:
                raise Unexpected("the client still works after 8 s") from None
        return refusal(reply, "policy: ")

    return attack


# --- memory and files


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Expect that the memory of this process grows by less than `MOST_MEMORY`.

    The address space is bounded too, so that code that takes gigabytes fails soon.
    """
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        yield
        return

    def read(field: str) -> int:
        found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), flags=re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
    before = read("VmRSS")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (read("VmSize") + 1500 * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = read("VmHWM") - before
    expect(grown < MOST_MEMORY, f"the memory of the client grew by {grown / 2**20:,.0f} MiB")


def contents(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class Opened:
    """The files that Python code opens while the context lasts."""

    def __init__(self) -> None:
        self.paths: set[str] = set()

    def __enter__(self) -> "Opened":
        if not _hooked:
            sys.addaudithook(_note_opened)
            _hooked.append(True)
        _watching.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _watching.remove(self)


_hooked: list[bool] = []
_watching: list[Opened] = []


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching:
        for watching in _watching:
            watching.paths.add(str(arguments[0]))


# --- S1: files


@fault("A", "S1", "the client opens no file that a message names, and tells nothing of it")
def path_in_a_message(directory: Path) -> Outcome:
    """A message names a key file as the corpus of a client that has a partition id."""

    def attack(stranger: Stranger) -> str:
        key = stranger.directory / "id_ed25519"
        key.write_text("PRIVATE KEY of the operator, which nobody else may read\n" * 20)
        place = {"partition-id": 0, "num-partitions": 2, "state-path": str(stranger.state)}
        client = Client(client_app, place)
        digest = hashlib.sha256(key.read_bytes()).hexdigest()
        for given in ("0" * 64, digest):
            with Opened() as opened:
                reply = stranger.ask(client, config={"corpus": str(key), "corpus-sha256": given})
            expect(str(key) not in opened.paths, "the client opened the file")
            text = refusal(reply)
            expect(digest[:8] not in text, "the refusal has the file's SHA-256")
        return text

    return attacked(directory, attack)


@fault("A", "S1", "the client opens no file that a run config names")
def path_in_a_run_config(directory: Path) -> Outcome:
    """A run config names a directory of texts as the corpus of a client that has a partition id."""

    def attack(stranger: Stranger) -> str:
        letters = stranger.directory / "letters"
        letters.mkdir()
        (letters / "one.txt").write_text("Dear Sir, this is nobody's business.\n" * 50)
        client = Client(client_app, {"partition-id": 0, "num-partitions": 2})
        with Opened() as opened:
            reply = stranger.ask(client, config={"corpus": str(letters)}, corpus=str(letters))
        expect(str(letters / "one.txt") not in opened.paths, "the client opened the file")
        return refusal(reply)

    return attacked(directory, attack)


# --- S2: settings that let an update tell the text


@fault("A", "S2", REFUSED)
def one_window_in_one_step(directory: Path) -> Outcome:
    """A run config asks for one window in one step without dropout."""
    return attacked(directory, refused(batch_size=1, max_steps=1, dropout=0.0))


@fault("A", "S2", REFUSED)
def one_window_in_each_step(directory: Path) -> Outcome:
    """A run config asks for one window in a step."""
    return attacked(directory, refused(batch_size=1))


@fault("A", "S2", REFUSED)
def one_step(directory: Path) -> Outcome:
    """A run config asks for one step."""
    return attacked(directory, refused(max_steps=1))


@fault("A", "S2", REFUSED)
def average_of_one_client(directory: Path) -> Outcome:
    """A message says that the server takes the average of one client."""

    def attack(stranger: Stranger) -> str:
        return refusal(stranger.ask(config={protocol.MIN_REPLIES: 1}), "policy: ")

    return attacked(directory, attack)


@fault("A", "S2", "two clients with one text and one message train on different windows")
def windows_computed_from_the_seed(directory: Path) -> Outcome:
    """A server computes which windows a client draws, from the seed, the label and the round."""

    def attack(stranger: Stranger) -> str:
        replies = []
        for name in ("one", "one", "other"):
            state = stranger.directory / name
            client = Client(client_app, contract.deployed(stranger.part, state, policy_file()))
            replies.append(digest(stranger.ask(client)))
        expect(replies[0] == replies[1], "one client did not repeat its own draws")
        expect(replies[0] != replies[2], "the draws follow from the seed, the label and the round")
        return "the windows depend on a secret of the client"

    return attacked(directory, attack)


def digest(reply: Message) -> str:
    """Return the SHA-256 of the arrays in a reply."""
    expect(not reply.has_error(), f"an honest message failed: {reply}")
    [record] = reply.content.array_records.values()
    return hashlib.sha256(b"".join(array.data for array in record.values())).hexdigest()


# --- S3, S4: state on disk


def with_run(stranger: Stranger, run: Any, server_round: int = 2, **config: Any) -> dict[str, Any]:
    """Return the config of a message that claims to belong to a run."""
    return {protocol.RUN: run, protocol.SERVER_ROUND: server_round, **config}


@fault("A", "S3", "the client starts afresh and leaves the state of the honest run as it is")
def name_of_another_run(directory: Path) -> Outcome:
    """Messages name the honest run: by its id, by the token of another client, by a guess."""
    codec = {"uplink": "2-bit"}

    def attack(stranger: Stranger) -> str:
        token = next(
            protocol.config_of(message).get(protocol.RUN)
            for number, message in stranger.grid.messages("train")
            if number != VICTIM
        )
        before = states(stranger.state)
        for run_name in (str(stranger.grid.run_id), str(token), "0" * 64):
            for server_round in (1, 2, 3):
                twin = copied(stranger, "twin")  # without what the stranger's last round has kept
                own = as_in_the_honest_run(stranger, twin, run_name, server_round)
                fresh = as_in_the_honest_run(stranger, emptied(stranger), run_name, server_round)
                expect(digest(own) == digest(fresh), "the reply comes from another run's state")
                now = states(twin)
                changed = [name for name in before if now.get(name) != before[name]]
                expect(not changed, f"the state of the honest run was changed: {changed}")
        return "the client started afresh, the state of the honest run stayed"

    return attacked(directory, attack, after=2, **codec)


def as_in_the_honest_run(stranger: Stranger, state: Path, run: str, server_round: int) -> Message:
    """Send a message with the settings of the honest run, compressed, and return the reply."""
    codec = "2-bit"
    header = protocol.CompressionHeader("fp32", codec, "", "")
    honest = {key: value for key, value in SMALL.items() if key != "num-server-rounds"}
    return stranger.ask(
        Client(client_app, contract.deployed(stranger.part, state, policy_file())),
        config=with_run(stranger, run, server_round),
        arrays=weights(**{"block-size": SMALL["block-size"]}),
        records={protocol.COMPRESSION: header.to_record()},
        **{key.replace("-", "_"): value for key, value in {**honest, "uplink": codec}.items()},
    )


def copied(stranger: Stranger, name: str) -> Path:
    """Return a copy of the client's state directory."""
    twin = stranger.directory / name
    shutil.rmtree(twin, ignore_errors=True)
    shutil.copytree(stranger.state, twin)
    return twin


def emptied(stranger: Stranger) -> Path:
    """Return a copy of the client's state directory without the states of runs."""
    twin = copied(stranger, "emptied")
    for path in twin.rglob(contract.STATE_FILES):
        path.unlink()
    return twin


def states(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file with the state of a run."""
    found = contents(directory)
    return {name: sha for name, sha in found.items() if Path(name).match(contract.STATE_FILES)}


@fault("A", "S3", "the client deletes nothing of the honest run")
def end_of_another_run(directory: Path) -> Outcome:
    """A stranger tells the client that the honest run has ended."""

    def attack(stranger: Stranger) -> str:
        before = states(stranger.state)
        for run_name in (str(stranger.grid.run_id), "0" * 64, "", "..", "/"):
            config = ConfigRecord({protocol.RUN: run_name})
            ask(
                stranger.client(),
                protocol.END_QUERY,
                RecordDict({"config": config}),
                number=VICTIM,
                run_config=settings(QUICK),
                run_id=STRANGERS_RUN,
            )
        now = states(stranger.state)
        deleted = [name for name in before if name not in now]
        expect(not deleted, f"the client deleted {deleted}")
        return "nothing was deleted"

    return attacked(directory, attack)


@fault("A", "S4", "the client writes nothing there")
def state_directory_in_a_run_config(directory: Path) -> Outcome:
    """A run config names a directory for the client's state."""

    def attack(stranger: Stranger) -> str:
        elsewhere = stranger.directory / "elsewhere"
        without = Client(client_app, {"data-path": str(stranger.part)})
        for client in (stranger.client(), without):
            stranger.ask(client, client_state=str(elsewhere), config=with_run(stranger, "1" * 64))
        expect(not elsewhere.exists(), f"the client wrote {list(contents(elsewhere))} there")
        return "nothing was written there"

    return attacked(directory, attack)


@fault("A", "S4", "no file outside the client's state directory changes, and no state is lost")
def crafted_names_of_runs_and_attempts(directory: Path) -> Outcome:
    """The names of a run and of its attempts are paths, empty, very long or no texts."""

    def attack(stranger: Stranger) -> str:
        precious = stranger.directory / "model.safetensors"
        precious.write_bytes(b"precious")
        outside = {p.name: contents(p) for p in stranger.directory.parent.iterdir() if p.is_dir()}
        before = states(stranger.state)
        up = "../" * 12
        name = str(precious.with_suffix(""))
        names = [f"x/{up}{name}", f"{up}{name}", name, "..", ".", "", "x" * 5000, "a\x00b", "\n"]
        for server_round, crafted in enumerate(names, start=1):
            for config in (
                with_run(stranger, crafted, server_round),
                with_run(stranger, "2" * 64, server_round, **{protocol.ATTEMPTS: [f"0:{crafted}"]}),
                with_run(stranger, "3" * 64, server_round, **{protocol.ATTEMPTS: [crafted]}),
            ):
                stranger.ask(stranger.client(policy_file()), config=config, max_steps=2)
        stranger.ask(config=with_run(stranger, 7), max_steps=2)
        for place, files in outside.items():
            if place != stranger.state.name:
                now = contents(stranger.directory.parent / place)
                expect(now == files, f"files in {place} changed")
        now = states(stranger.state)
        changed = [name for name in before if now.get(name) != before[name]]
        expect(not changed, f"the state of the honest run was changed: {changed}")
        return f"{3 * len(names) + 1} messages, nothing outside changed"

    return attacked(directory, attack)


@fault("A", "S4", f"at most {contract.MOST_RUNS} runs have a state on the client's disk")
def runs_without_end(directory: Path) -> Outcome:
    """A stranger trains in a new run with each of 80 messages."""

    def attack(stranger: Stranger) -> str:
        for number in range(80):
            token = hashlib.sha256(str(number).encode()).hexdigest()
            small: dict[str, Any] = {"batch_size": 8, "block_size": 16, "max_steps": 1}
            stranger.ask(
                stranger.client(policy_file()),
                config=with_run(stranger, token, 1),
                arrays=weights(**{"block-size": 16}),
                **small,
            )
        kept = {path.parent for path in stranger.state.rglob(contract.STATE_FILES)}
        expect(len(kept) <= contract.MOST_RUNS, f"{len(kept)} runs have a state on the disk")
        return f"{len(kept)} runs have a state on the disk"

    return attacked(directory, attack)


# --- S5: memory and time

HUGE = (16_000, 16_000)  # 256 million values, 1 GiB in float32
BOUNDED = "the client refuses, and its memory grows by less than 200 MiB"


@fault("A", "S5", BOUNDED)
def declared_array_of_a_gibibyte(directory: Path) -> Outcome:
    """A message declares an array of 16,000 x 16,000 values over 132 bytes."""

    def attack(stranger: Stranger) -> str:
        arrays = weights()
        name = next(iter(arrays))
        small = Array(torch.zeros(1).numpy())
        arrays[name] = Array("float32", HUGE, "numpy.ndarray", small.data.ljust(132, b"\x00"))
        with bounded_memory():
            reply = stranger.ask(arrays=arrays)
        return refusal(reply)

    return attacked(directory, attack)


@fault("A", "S5", BOUNDED)
def top_k_of_1e_300(directory: Path) -> Outcome:
    """Two messages let the client decode one value of 256 million with the codec top-k:1e-300."""

    def attack(stranger: Stranger) -> str:
        client = stranger.client()
        codec = "top-k:1e-300"
        header = protocol.CompressionHeader(codec, codec, "", "v1")
        small = Array(torch.zeros(1).numpy()).data
        whole = ArrayRecord({"w": Array("float32", HUGE, "numpy.ndarray", small.ljust(132))})
        stype = protocol.compressed_stype(codec)
        delta = ArrayRecord({"w": Array("float32", HUGE, stype, bytes(8))})
        with bounded_memory():
            for arrays, head in ((whole, header), (delta, header._replace(base="v1", version=""))):
                reply = stranger.ask(
                    client,
                    MessageType.EVALUATE,
                    arrays=arrays,
                    records={protocol.COMPRESSION: head.to_record()},
                )
        return refusal(reply)

    return attacked(directory, attack)


@fault("A", "S5", BOUNDED)
def model_of_768_million_parameters(directory: Path) -> Outcome:
    """A run config asks for a model with n-embd 8,000."""
    return attacked(directory, refused(n_embd=8000))


@fault("A", "S5", REFUSED)
def billion_steps(directory: Path) -> Outcome:
    """A run config asks for a billion steps."""
    return attacked(directory, refused(max_steps=10**9, local_epochs=10**9))


@fault("A", "S5", BOUNDED)
def million_windows_in_a_batch(directory: Path) -> Outcome:
    """A run config asks for a million windows in a batch."""
    return attacked(directory, refused(batch_size=10**6))


@fault("A", "S5", BOUNDED)
def vocabulary_of_a_million_characters(directory: Path) -> Outcome:
    """A message holds a vocabulary of a million characters, so that the model becomes large."""

    def attack(stranger: Stranger) -> str:
        characters = "".join(map(chr, range(0x10000, 0x10000 + 1_000_000)))
        config = {"tokenizer": json.dumps({"type": "char", "vocab": characters})}
        with bounded_memory():
            reply = stranger.ask(config=config, n_embd=128)
        return refusal(reply)

    return attacked(directory, attack)


# --- P4: what a refusal tells


def leaks(reason: str, part: Part, place: Path) -> list[str]:
    """Return what an error reason tells of a client's text and files."""
    vocab = part.tokenizer.vocab
    sizes = {len(part.train), len(part.val), len(part.train) + len(part.val)}
    numbers = {int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", reason) if found}
    found = {
        "a path": str(place) in reason or re.search(r"(^|[\s'\"(])/[\w.-]+/", reason),
        "a digest": re.search(r"(?<![0-9a-f])[0-9a-f]{8,}(?![0-9a-f])", reason),
        "a size of the text": sizes & numbers,
        "characters of the text": any(vocab[i : i + 5] in reason for i in range(2, len(vocab) - 4)),
        "a traceback": "Traceback" in reason or 'File "' in reason,
        "more than a sentence": len(reason) > 300,
    }
    return [name for name, is_told in found.items() if is_told]


def damaged_parts(part: Path, directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield copies of a client's text, each damaged in another way."""
    for name in ("train.bin missing", "train.bin cut", "meta.json cut", "meta.json changed"):
        copy = directory / name.replace(" ", "-")
        shutil.copytree(part, copy)
        path = copy / name.split()[0]
        if name.endswith("missing"):
            path.unlink()
        elif name.endswith("cut"):
            path.write_bytes(path.read_bytes()[:101])
        else:
            path.write_text(path.read_text().replace("train_sha256", "sha256"))
        yield name, copy
    yield "no directory", directory / "nowhere"


@fault("A", "P4", "each reply is a code and a sentence without paths, digests, sizes or characters")
def errors_of_all_kinds(directory: Path) -> Outcome:
    """A server provokes errors: damaged texts, other vocabularies, bad settings, bad messages."""

    def attack(stranger: Stranger) -> str:
        part, told, count = read_part(stranger.part), [], 0

        def check(cause: str, reply: Message) -> None:
            nonlocal count
            count += 1
            if not reply.has_error():
                return
            reason = reply.error.reason or ""
            found = leaks(reason, part, stranger.part.parent)
            if not contract.REFUSAL.fullmatch(reason):
                found.append("no code")
            if found:
                told.append(f"{cause}: {', '.join(found)}")

        for cause, damaged in damaged_parts(stranger.part, stranger.directory):
            client = Client(client_app, contract.deployed(damaged, stranger.state, policy_file()))
            check(cause, stranger.ask(client))
            check(cause, stranger.ask(client, protocol.LABEL_QUERY))
        client = stranger.client(policy_file())
        check("other vocabulary", other_vocabulary(stranger, client))
        check("block-size too large", stranger.ask(client, block_size=1000, arrays=weights()))
        check("foreign setting", stranger.ask(client, nonsense=1))
        check("bad setting", stranger.ask(client, batch_size="many"))
        check("bad vocabulary", stranger.ask(client, config={"tokenizer": "{"}))
        check("vocabulary is a number", stranger.ask(client, config={"tokenizer": 7}))
        check("round is a text", stranger.ask(client, config={protocol.SERVER_ROUND: "first"}))
        check("unknown query", stranger.ask(client, "query.password"))
        check("unknown type", stranger.ask(client, "train.secretly"))
        check("no arrays", stranger.ask(client, arrays=ArrayRecord()))
        check("vocabulary query", stranger.ask(client, "query.vocabulary"))
        evaluated = stranger.ask(client, MessageType.EVALUATE, config={"tokenizer": "{"})
        check("bad vocabulary to evaluate", evaluated)
        expect(not told, f"{len(told)} of {count} replies tell too much: {'; '.join(told)}")
        return f"{count} replies tell nothing"

    return attacked(directory, attack)


def other_vocabulary(stranger: Stranger, client: Client) -> Message:
    """Ask a client to train with a vocabulary that is not that of its text."""
    other = CharTokenizer.from_text("abcdefghij")
    config = model_config(Settings.from_run_config(QUICK), other.vocab_size)
    return stranger.ask(
        client, config={"tokenizer": other.to_json()}, arrays=to_arrays(GPT(config))
    )


@fault("A", "P4", "the label follows from a secret of the client, and is the same in each message")
def label_that_is_a_digest_of_the_text(directory: Path) -> Outcome:
    """A server that guesses a client's text checks its guess with the label."""

    def attack(stranger: Stranger) -> str:
        labels = []
        for name in ("one", "one", "other"):
            config = contract.deployed(stranger.part, stranger.directory / name, policy_file())
            reply = stranger.ask(Client(client_app, config), protocol.LABEL_QUERY)
            labels.append(protocol.label_of(reply) or "")
        expect(labels[0] and labels[0] == labels[1], "the label changes from message to message")
        fingerprint = read_part(stranger.part).fingerprint
        expect(fingerprint[:8] not in labels[0], "the label is a digest of the text")
        expect(labels[0] != labels[2], "two clients with one text have one label")
        return "the label tells nothing of the text"

    return attacked(directory, attack)


@fault("A", "audit", "the client's audit log has a line for each, with the refusal's reason")
def audit_of_a_training_and_a_refusal(directory: Path) -> Outcome:
    """An operator looks up what a stranger asked: a training and a refused training."""

    def attack(stranger: Stranger) -> str:
        before = len(contract.audit_lines(stranger.state))
        trained = stranger.ask()
        expect(not trained.has_error(), f"an honest message was refused: {trained}")
        refusal(stranger.ask(batch_size=1))
        lines = contract.audit_lines(stranger.state)[before:]
        expect(len(lines) >= 2, f"the audit log has {len(lines)} new lines")
        expect("batch-size" in lines[-1], f"the last line does not name batch-size: {lines[-1]}")
        return f"{len(lines)} lines; the last one names batch-size"

    return attacked(directory, attack)
