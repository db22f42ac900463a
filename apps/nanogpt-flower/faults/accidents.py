"""Group C: damaged files, power cuts, full disks, and two programs at once."""

import errno
import os
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import ArrayRecord, Message

from faults import contract
from faults.matrix import Outcome, Skipped, Unexpected, expect, fault
from faults.runs import (
    HONEST,
    ROUNDS,
    Finished,
    PowerCut,
    captured,
    compared,
    completed,
    describe,
    new_clients,
    run,
    same_result,
    settings,
    undisturbed,
)
from faults.wire import Answer, Client, WireGrid, honest, packed
from flower_adapter import (
    CheckpointError,
    Checkpoints,
    Guard,
    RoundRecord,
    StreamingFedAvg,
    protocol,
    run_rounds,
)
from flower_adapter.packing import pack
from flower_adapter.server.checkpoints import Checkpoint, read_checkpoint
from nanogpt_flower import client_app

RESUMED = "the newest sound checkpoint is taken, the log says so, and nothing is lost"
DAMAGED = "round-000002"  # the newest checkpoint when the run is resumed


# --- D1: damaged checkpoints


def flip(path: Path, *, at: float = 0.75) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def truncate(path: Path, *, to: float = 0.5) -> None:
    """Cut off the end of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])


def cut(error: BaseException, *, server_round: int) -> Answer:
    """Return an answer that ends the run when the last client has trained in a round."""

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        at = protocol.config_of(message).get(protocol.SERVER_ROUND)
        is_train = message.metadata.message_type == "train"
        if is_train and at == server_round and number == HONEST[-1]:
            raise error
        return reply

    return answer


def cut_off(directory: Path) -> Finished:
    """Cut a run off in its third round, so that the clients still have their states."""
    first = run(directory, answer=cut(PowerCut(), server_round=3))
    expect(isinstance(first.error, PowerCut), f"the run did not end: {first.error!r}")
    return first


def resumed_after(directory: Path, damage: Callable[[Path], None]) -> Outcome:
    """Cut a run off, damage the newest checkpoint, resume, and expect the undisturbed result."""
    newest = cut_off(directory).directory / "checkpoints" / DAMAGED
    expect(newest.is_dir(), f"there is no checkpoint {newest.name}")
    damage(newest)
    resumed = run(directory, resume=True)
    outcome = same_result("resumed from round 1", resumed, undisturbed())
    warned = [
        line
        for line in resumed.log.splitlines()
        if DAMAGED in line and re.search("WARN|ERROR", line)
    ]
    expect(warned, "the log does not warn of the damaged checkpoint", outcome)
    return outcome


@fault("C", "D1", RESUMED)
def flipped_bit_in_the_arrays(directory: Path) -> Outcome:
    """One bit of the newest checkpoint's arrays.safetensors has flipped."""
    return resumed_after(directory, lambda newest: flip(newest / "arrays.safetensors"))


@fault("C", "D1", RESUMED)
def flipped_bit_in_the_state(directory: Path) -> Outcome:
    """One bit of the newest checkpoint's state.safetensors has flipped."""
    return resumed_after(directory, lambda newest: flip(newest / "state.safetensors"))


@fault("C", "D1", RESUMED)
def flipped_bit_in_the_header_of_the_state(directory: Path) -> Outcome:
    """One bit in the first bytes of the newest checkpoint's state.safetensors has flipped."""
    return resumed_after(directory, lambda newest: flip(newest / "state.safetensors", at=0.02))


@fault("C", "D1", RESUMED)
def truncated_state(directory: Path) -> Outcome:
    """The newest checkpoint's state.safetensors has half its bytes."""
    return resumed_after(directory, lambda newest: truncate(newest / "state.safetensors"))


@fault("C", "D1", RESUMED)
def empty_round_file(directory: Path) -> Outcome:
    """The newest checkpoint's round.json is empty."""
    return resumed_after(directory, lambda newest: truncate(newest / "round.json", to=0.0))


@fault("C", "D1", RESUMED)
def missing_arrays(directory: Path) -> Outcome:
    """The newest checkpoint has no arrays.safetensors."""
    return resumed_after(directory, lambda newest: (newest / "arrays.safetensors").unlink())


@fault("C", "D1", "the run is refused by a sentence that names the checkpoint")
def no_sound_checkpoint(directory: Path) -> Outcome:
    """All checkpoints of a run are damaged."""
    for checkpoint in (cut_off(directory).directory / "checkpoints").glob("round-*"):
        flip(checkpoint / "arrays.safetensors")
    resumed = run(directory, resume=True)
    expect(resumed.error is not None, "a damaged checkpoint was resumed silently")
    text = describe(resumed.error) if resumed.error else ""
    is_clear = isinstance(resumed.error, CheckpointError) and "round-00000" in text
    expect(is_clear, f"the error is no sentence about a checkpoint: {text}")
    return Outcome("refused, it names the checkpoint", lost="2 rounds")


@fault("C", "D1", "none is taken with other contents than it was written with")
def two_hundred_damaged_checkpoints(directory: Path) -> Outcome:
    """200 copies of a run have a flipped bit or a cut file in the newest of two checkpoints."""
    first = cut_off(directory)
    checkpoints, chance = first.directory / "checkpoints", random.Random(1)
    initial = first.grid.messages("train")[0][1].content.array_records["arrays"]
    sound = written(read_checkpoint(checkpoints))
    taken, others, older = [], [], 0
    for _ in range(200):
        copy = directory / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoints, copy)
        path = chance.choice(sorted((copy / DAMAGED).iterdir()))
        at = chance.random()
        chance.choice((lambda: flip(path, at=at), lambda: truncate(path, to=at)))()  # noqa: B023
        try:
            with captured():
                found = Checkpoints(copy, resume=True).find(initial)
            if found is None or (found.server_round == 2 and written(found) != sound):
                taken.append(path.name)
            older += found is not None and found.server_round < 2
        except CheckpointError:
            pass
        except Exception as error:
            others.append(describe(error))
    expect(not taken, f"{len(taken)} of 200 were taken, such as {sorted(set(taken))}")
    expect(not others, f"{len(others)} of 200 ended otherwise, such as {sorted(set(others))[:2]}")
    return Outcome(f"none of 200 was taken, {older} times the older one was", lost="nothing")


def written(checkpoint: Checkpoint) -> tuple[str, dict[str, bytes]]:
    """Return the contents of a checkpoint, without the attempts to resume it."""
    fields = {**vars(checkpoint), "attempts": []}
    fields["records"] = [record.to_dict() for record in checkpoint.records]
    structure, arrays = pack(fields, "checkpoint")
    return structure, {name: array.data for name, array in arrays.items()}


# --- D2, D3, D4: other files


@fault("C", "D2", "the run is resumed from its checkpoint, and the file is written again")
def empty_config_file(directory: Path) -> Outcome:
    """The config.json of a run is empty."""
    config = cut_off(directory).directory / "config.json"
    config.write_bytes(b"")
    resumed = run(directory, resume=True)
    outcome = same_result("resumed", resumed, undisturbed())
    expect(config.stat().st_size, "config.json is still empty", outcome)
    return outcome


@fault("C", "D3", "the two never train at once on one state; the run goes on")
def two_processes_on_one_state(directory: Path) -> Outcome:
    """Two SuperNodes with one text and one state-path get the same message at the same time."""
    at_once, most, lock = 0, 0, threading.Lock()
    meeting = threading.Event()
    train_steps = vars(client_app)["train_steps"]
    replies: list[Message] = []

    def watched(*arguments: Any, **keywords: Any) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        if at_once > 1:
            meeting.set()
        meeting.wait(2.0)
        try:
            return train_steps(*arguments, **keywords)
        finally:
            with lock:
                at_once -= 1

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        config = protocol.config_of(message)
        is_train = message.metadata.message_type == "train"
        if number != HONEST[0] or not is_train or config[protocol.SERVER_ROUND] != 2:
            return reply
        node_config = grid.clients[number].node_config

        def handle() -> None:
            twin = Client(client_app.app, dict(node_config))
            replies.append(twin.handle(packed(message), grid.run_id, grid.run_config))

        threads = [threading.Thread(target=handle) for _ in range(2)]
        with mock.patch.object(client_app, "train_steps", watched):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return reply

    finished = run(directory, answer=answer)
    refused = [reply.error.reason for reply in replies if reply.has_error()]
    happened = (
        f"the second one was refused: {refused[0]}" if refused else "one waited for the other"
    )
    outcome = same_result(happened, finished, undisturbed())
    expect(most == 1, "both trained at once on one state", outcome)
    return outcome


@fault("C", "D3", "the second one is refused by a sentence, and the first one is not disturbed")
def two_servers_on_one_run(directory: Path) -> Outcome:
    """A second ServerApp resumes a run while the first one still runs."""
    second: list[Finished] = []

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        config = protocol.config_of(message)
        if not second and config.get(protocol.SERVER_ROUND) == 2:
            second.append(Finished(directory, grid, ""))
            second.append(run(directory, resume=True))
        return reply

    finished = run(directory, answer=answer)
    error = second[1].error
    outcome = same_result(f"refused: {describe(error)}" if error else "", finished, undisturbed())
    expect(isinstance(error, ValueError), f"the second one was not refused: {error!r}", outcome)
    return outcome


@fault("C", "D4", "all files of the user stay as they are")
def files_of_the_user(directory: Path) -> Outcome:
    """The output and state directories hold the user's files, with names like the app's own."""
    names = [".writable", ".round-notes", "round-000001.safetensors", "model.safetensors"]
    names += ["notes.txt", "policy.toml", ".lock", "audit.txt"]
    new_clients(directory)
    places = [directory, directory / f"state-{HONEST[0]}"]
    for place in places:
        for name in names:
            if not (place / name).exists():
                (place / name).write_text(f"the user's {name}")
    finished = run(directory)
    outcome = same_result("all files are there", finished, undisturbed())
    changed = [
        name
        for place in places
        for name in names
        if not (place / name).exists() or "the user's" not in (place / name).read_text()
    ]
    expect(not changed, f"changed or deleted: {', '.join(changed)}", outcome)
    return outcome


# --- P3: the state of clients


@fault("C", "P3", "every directory of a client has mode 0700")
def modes_of_the_state(directory: Path) -> Outcome:
    """Another user of a client's machine looks for its state while the run goes on."""
    readable: set[str] = set()

    def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
        state = Path(grid.clients[number].node_config["state-path"])
        for path in [state, *state.rglob("*")]:
            mode = path.stat().st_mode & 0o777
            if path.is_dir() and mode != 0o700:
                readable.add(f"{path.relative_to(state.parent)} ({mode:o})")
        return reply

    clients = new_clients(directory)
    for client in clients.values():
        shutil.rmtree(client.node_config["state-path"])  # the client makes it
    before = os.umask(0o022)
    try:
        finished = run(directory, answer=answer, clients=clients)
    finally:
        os.umask(before)
    completed(finished, undisturbed())
    outcome = Outcome("all have mode 0700", finished.loss)
    expect(not readable, f"{len(readable)} have not, such as {sorted(readable)[:2]}", outcome)
    return outcome


@fault("C", "P3", "no client keeps a state of the run on its disk")
def state_after_the_end_of_a_run(directory: Path) -> Outcome:
    """A run has ended, and a client's disk is looked through for what it has kept of its text."""
    finished = run(directory)
    outcome = same_result("every state was deleted", finished, undisturbed())
    kept = [p.name for n in HONEST for p in state_of(directory, n).rglob(contract.STATE_FILES)]
    expect(not kept, f"{len(kept)} files are left, such as {kept[:1]}", outcome)
    return outcome


@fault("C", "P3", "the clients still have their state, and nothing is lost")
def run_that_ended_with_an_error(directory: Path) -> Outcome:
    """A run ends with an error in its third round, and is resumed."""
    cut_off(directory)
    resumed = run(directory, resume=True)
    return same_result("resumed after round 2", resumed, undisturbed())


def state_of(directory: Path, number: int) -> Path:
    """Return the state directory of a client."""
    return directory / f"state-{number}"


AFRESH = "the client is left out or starts afresh, the log says so, and the run goes on"


@fault("C", "P3", AFRESH)
def flipped_bit_in_the_state_of_a_client(directory: Path) -> Outcome:
    """After a restart, one bit of each state of a client has flipped."""
    return damaged_state(directory, flip)


@fault("C", "P3", AFRESH)
def truncated_state_of_a_client(directory: Path) -> Outcome:
    """After a restart, each state of a client has half its bytes."""
    return damaged_state(directory, truncate)


def damaged_state(directory: Path, damage: Callable[[Path], None]) -> Outcome:
    """Cut a run off in its third round, damage the states of one client, and resume the run."""
    cut_off(directory)
    files = sorted(state_of(directory, HONEST[0]).rglob(contract.STATE_FILES))
    expect(files, "the client has kept no state")
    for path in files:
        damage(path)
    resumed = run(directory, resume=True)
    reference = undisturbed()
    completed(resumed, reference)
    reasons = resumed.reasons()
    happened = f"left out: {reasons[0]}" if reasons else "it started afresh"
    outcome = compared(happened, resumed, reference)
    said = reasons or [line for line in resumed.log.splitlines() if "damaged" in line]
    expect(said, "the damaged state was used, or nothing says that it was not", outcome)
    return outcome


# --- power cuts


class Power:
    """Cuts the power at a certain sync or rename, and then takes away what was not synced.

    A file of which the content is not synced keeps half its bytes. A rename whose directory is not
    synced may or may not have happened. Here it has happened, which is what usual file systems do.
    """

    def __init__(self, directory: Path, cut_at: int) -> None:
        self.directory = directory
        self.cut_at = cut_at
        self.count = 0
        self.synced: dict[int, tuple[int, int]] = {}  # by inode: size and time of change

    def _step(self) -> None:
        self.count += 1
        if self.count == self.cut_at:
            raise PowerCut(f"at step {self.count}")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count the syncs and renames, and cut the power at the chosen one."""
        fsync, replace, rename = os.fsync, os.replace, os.rename
        for path in self.directory.rglob("*"):  # what was there before is on the disk
            found = path.stat()
            self.synced[found.st_ino] = (found.st_size, found.st_mtime_ns)

        def synced(descriptor: int) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self._step()
            fsync(number)
            found = Path(f"/proc/self/fd/{number}").stat()
            self.synced[found.st_ino] = (found.st_size, found.st_mtime_ns)

        def moved(move: Callable[..., None]) -> Callable[..., None]:
            def step(*arguments: Any, **keywords: Any) -> None:
                self._step()
                move(*arguments, **keywords)

            return step

        with (
            mock.patch("os.fsync", synced),
            mock.patch("os.replace", moved(replace)),
            mock.patch("os.rename", moved(rename)),
        ):
            yield

    def lose(self) -> int:
        """Take away what was not synced, and return how many files have lost bytes."""
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        unsynced = []
        for path in files:
            found = path.stat()
            if found.st_size and self.synced.get(found.st_ino) != (
                found.st_size,
                found.st_mtime_ns,
            ):
                unsynced.append(path)
        for path in unsynced:
            truncate(path)
        return len(unsynced)


def power_cuts(directory: Path, place: str, steps: int) -> Outcome:
    """Cut the power at several steps of a run. Expect that each run can be resumed.

    Args:
        directory: an empty directory.
        place: "run" for the directory of the run, or "state-0" for that of a client's state.
        steps: number of cuts, over all syncs and renames of a run.
    """
    whole = directory / "whole"
    whole.mkdir()
    new_clients(whole)
    power = Power(whole, cut_at=0)
    with power.watched():
        completed(run(whole), undisturbed())
    expect(power.count > steps, f"a run has only {power.count} syncs and renames")
    for number in range(steps):
        room = directory / f"cut-{number}"
        room.mkdir()
        new_clients(room)
        at = 1 + (2 * number + 1) * power.count // (2 * steps)
        outage = Power(room / place, cut_at=at)
        with outage.watched():
            first = run(room)
        if not isinstance(first.error, PowerCut):
            raise Unexpected(f"the cut at step {at} was caught: {first.error!r}")
        outage.lose()
        has_checkpoint = any((room / "run" / "checkpoints").glob("round-*"))
        if not has_checkpoint:
            shutil.rmtree(room / "run", ignore_errors=True)
        resumed = run(room, resume=has_checkpoint)
        try:
            outcome = same_result("", resumed, undisturbed())
        except Unexpected as error:
            error.outcome.happened = f"cut at step {at} of {power.count}: {error}"
            raise
    outcome.happened = f"{steps} cuts among {power.count} syncs and renames, each was resumed"
    return outcome


@fault("C", "power", "each run is resumed, and nothing but the round in progress is lost")
def power_cuts_on_the_server(directory: Path) -> Outcome:
    """The power is cut at six steps of a run, and the server loses what it has not synced."""
    return power_cuts(directory, "run", steps=6)


@fault("C", "power", "each run is resumed, and nothing but the round in progress is lost")
def power_cuts_on_a_client(directory: Path) -> Outcome:
    """The power is cut at six steps of a run, and a client loses what it has not synced."""
    return power_cuts(directory, f"state-{HONEST[0]}", steps=6)


@fault("C", "power", "a file is synced before its rename, and its directory afterwards")
def order_of_syncs_and_renames(directory: Path) -> Outcome:
    """All renames of a run are watched: each could be the last before a power cut."""
    events: list[tuple[str, str, str]] = []  # "sync" or "move", path, new path
    new_clients(directory)
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        fsync(number)
        events.append(("sync", str(Path(f"/proc/self/fd/{number}").readlink()), ""))

    def moved(move: Callable[..., None]) -> Callable[..., None]:
        def note(source: Any, target: Any, **keywords: Any) -> None:
            inside = [str(p) for p in Path(source).rglob("*")] or [str(Path(source).absolute())]
            events.append(("move", "\n".join(inside), str(Path(target).absolute())))
            move(source, target, **keywords)

        return note

    if not Path("/proc/self/fd").exists():
        raise Skipped("this machine has no /proc")
    with (
        mock.patch("os.fsync", synced),
        mock.patch("os.replace", moved(replace)),
        mock.patch("os.rename", moved(rename)),
    ):
        finished = run(directory)
    outcome = same_result("", finished, undisturbed())
    faults, moves = [], 0
    for index, (kind, sources, target) in enumerate(events):
        if kind != "move" or not must_survive(directory, target):
            continue
        moves += 1
        before = {path for name, path, _ in events[:index] if name == "sync"}
        after = {path for name, path, _ in events[index:] if name == "sync"}
        name = Path(target).relative_to(directory)
        if not before.issuperset(sources.splitlines()):
            faults.append(f"{name} was moved before it was synced")
        if str(Path(target).parent) not in after:
            faults.append(f"the directory of {name} was not synced after it was moved")
    expect(moves, "nothing was moved", outcome)
    expect(not faults, f"{len(faults)} of {moves} moves: {faults[0] if faults else ''}", outcome)
    outcome.happened = f"{moves} moves, all in order"
    return outcome


def must_survive(directory: Path, target: str) -> bool:
    """Tell whether a moved file or directory is part of a checkpoint, a state or the config."""
    path = Path(target)
    if not path.is_relative_to(directory) or path.name.endswith(".removed"):
        return False
    parts = path.relative_to(directory).parts
    return parts[0].startswith("state-") or "checkpoints" in parts or path.name == "config.json"


# --- full disks


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Path]:
    """Mount a small file system at `directory`.

    Raises:
        Skipped: this user may not mount.
    """
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise Skipped("only root can mount a small disk")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=False)


def fill(disk: Path) -> Path:
    """Fill a disk, and return the file that does it."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return ballast


@fault("C", "disk", "the run goes on, or ends and is resumed when there is space; nothing is lost")
def full_disk_of_the_server(directory: Path) -> Outcome:
    """The server's disk is full when the second checkpoint is written."""
    with small_disk(directory / "disk", 8 * 2**20) as disk:
        full: list[Path] = []

        def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
            at = protocol.config_of(message).get(protocol.SERVER_ROUND)
            if at == 2 and message.metadata.message_type == "evaluate" and not full:
                full.append(fill(disk))
            return reply

        new_clients(directory)
        for number in HONEST:  # the clients' states are on another disk
            state = directory / f"state-{number}"
            (disk / f"state-{number}").symlink_to(state, target_is_directory=True)
        finished = run(disk, answer=answer)
        expect(full, "the disk was not filled")
        happened = "the run went on"
        if finished.error is not None:
            text = describe(finished.error)
            happened = f"the run ended ({text}) and was resumed"
            expect("No space left" in str(finished.error), f"the error is not clear: {text}")
        full[0].unlink()
        if finished.error is not None:
            finished = run(disk, resume=True)
        return same_result(happened, finished, undisturbed())


@fault("C", "disk", "the client is left out or keeps no state, the log says so, the run goes on")
def full_disk_of_a_client(directory: Path) -> Outcome:
    """A client's disk is full in the second round."""
    new_clients(directory)
    state = state_of(directory, HONEST[0])
    held = directory / "held"
    shutil.move(state, held)
    with small_disk(state, 4 * 2**20):
        shutil.copytree(held, state, dirs_exist_ok=True)
        full: list[Path] = []

        def answer(grid: WireGrid, number: int, message: Message, reply: Message) -> Message:
            at = protocol.config_of(message).get(protocol.SERVER_ROUND)
            if number == HONEST[0] and message.metadata.message_type == "train":
                if at == 1:
                    full.append(fill(state))
                if at == 2:
                    full[0].unlink()
            return reply

        finished = run(directory, answer=answer)
        reference = undisturbed()
        completed(finished, reference)
        reasons = finished.reasons()
        happened = f"left out: {reasons[0]}" if reasons else "it trained without keeping its state"
        outcome = compared(happened, finished, reference)
        said = reasons or [line for line in finished.log.splitlines() if "No space" in line]
        expect(said, "nothing says that the disk was full", outcome)
        expect(finished.rounds == ROUNDS, f"{finished.rounds} rounds counted", outcome)
        last = finished.averaged().get(ROUNDS, set())
        expect(HONEST[0] in last, "it does not take part when it has space again", outcome)
        return outcome


@fault("C", "disk", "the run ends by no error; replies that do not fit are left out")
def full_disk_for_waiting_replies(directory: Path) -> Outcome:
    """Replies wait in a temporary file until the last one is there, and its disk is full."""
    with small_disk(directory / "disk", 64 * 1024) as disk:
        fill(disk)
        clients, config = new_clients(directory), settings({})
        config_for_clients, arrays = first_message()
        records: list[RoundRecord] = []
        error: BaseException | None = None
        with captured(), mock.patch("tempfile.tempdir", str(disk)):
            try:
                run_rounds(
                    WireGrid(clients, config, answer=honest),
                    StreamingFedAvg(fraction_evaluate=0.0),
                    arrays,
                    num_rounds=ROUNDS,
                    train_config=config_for_clients,
                    on_round=records.append,
                    guard=Guard(min_replies=2),
                    reply_memory=int(2.5 * sum(len(a.data) for a in arrays.values())),
                )
            except Exception as caught:
                error = caught
    expect(error is None, f"the run ended: {error}")
    left_out = [client.reason for record in records for client in record.left_out]
    failures = [reason for record in records for reason in record.failures]
    expect(left_out or failures, "nothing says that replies were left out")
    replies = sum(len(record.train_clients) for record in records)
    lost = f"{len(left_out)} of {ROUNDS * len(HONEST)} replies"
    return Outcome(f"{replies} replies counted; {(left_out or failures)[0]}", lost=lost)


def first_message() -> tuple[Any, ArrayRecord]:
    """Return the config and the arrays of the first train message of an undisturbed run."""
    message = undisturbed().grid.messages("train")[0][1]
    config = protocol.config_of(message)
    for key in (protocol.RUN, protocol.ATTEMPTS, protocol.SERVER_ROUND, protocol.MIN_REPLIES):
        config.pop(key, None)
    [arrays] = message.content.array_records.values()
    return config, arrays
