"""A client's state on disk, read back by clients that have nothing in memory."""

import hashlib
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from flower_adapter import DiskState, restore_state, save_state
from flower_adapter.client.disk import run_directory
from flower_adapter.client.state import drop_state
from flower_adapter.protocol import ATTEMPTS, CLIENT, END_QUERY, KEEPS_STATE, RUN


def token(run: str) -> str:
    """Return the token of a run with this name."""
    return hashlib.sha256(run.encode()).hexdigest()


AA, BB, CC = "a" * 32, "b" * 32, "c" * 32  # ids of attempts


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def client(partition: int = 0) -> Context:
    """Return the context of a client that has just started."""
    return Context(1, 2, {"partition-id": partition}, RecordDict(), {})


def message(
    kind: str,
    server_round: int | None,
    run: str | None = "first",
    attempts: list[str] | None = None,
) -> Message:
    config: dict[str, Any] = {} if server_round is None else {"server-round": server_round}
    if attempts:
        config[ATTEMPTS] = attempts
    if run is not None:
        config[RUN] = token(run)
    return Message(RecordDict({"config": ConfigRecord(config)}), 9, kind)


def work(message: Message, context: Context) -> Message:
    """Add the round to the list of rounds in which this client has trained."""
    if message.metadata.message_type == "train":
        at = next(iter(message.content.config_records.values())).get("server-round", 0)
        save_state(context, rounds=[*trained(context), at], tensor=torch.full((3,), float(at)))
    return Message(RecordDict(), reply_to=message)


def trained(context: Context) -> list[int]:
    state = restore_state(context)
    return [] if state is None else list(state["rounds"])


def train(mod: DiskState, context: Context, *rounds: int, run: str = "first") -> Context:
    for server_round in rounds:
        assert not mod(message("train", server_round, run), context, work).has_error()
    return context


def seen(mod: DiskState, kind: str, server_round: int | None, context: Context, **run: Any) -> Any:
    """Return the rounds that the client finds in its context."""
    found: list[list[int]] = []

    def look(message: Message, context: Context) -> Message:
        found.append(trained(context))
        return work(message, context)

    reply = mod(message(kind, server_round, **run), context, look)
    assert not reply.has_error()
    return found[0]


def files(directory: Path, run: str = "first") -> list[str]:
    found = run_directory(directory, token(run)).glob("*.safetensors")
    return sorted(path.name for path in found)


def names_of(*rounds: int) -> list[str]:
    return [f"round-{at:06d}.safetensors" for at in rounds]


def test_a_restarted_client_gets_its_state_back(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    before = train(mod, client(), 1, 2)
    after = client()
    assert seen(mod, "train", 3, after) == [1, 2]
    assert trained(train(mod, before, 3)) == trained(after) == [1, 2, 3]


def test_the_whole_context_comes_back_bit_for_bit(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("nan"), float("-inf"), -0.0], dtype=torch.bfloat16)
    array = np.array([[1, 2], [3, 4]], np.int16)

    def keep(message: Message, context: Context) -> Message:
        save_state(context, name="optimizer", values=values, array=array, text="Ü", none=None)
        save_state(context, name="loader", position=7)
        context.state["mine"] = ConfigRecord({"bytes": b"\x00\xff", "list": [1.5, float("inf")]})
        return work(message, context)

    before, after = client(), client()
    DiskState(tmp_path)(message("train", 1), before, keep)
    DiskState(tmp_path)(message("evaluate", 1), after, work)
    assert list(after.state) == list(before.state)
    state = restore_state(after, name="optimizer")
    assert state is not None
    assert torch.equal(state["values"].view(torch.int16), values.view(torch.int16))
    assert state["array"].dtype == np.int16
    assert state["array"].tolist() == array.tolist()
    assert (state["text"], state["none"]) == ("Ü", None)
    assert restore_state(after, name="loader") == {"position": 7}
    assert after.state["mine"] == before.state["mine"]


def test_a_dropped_state_does_not_come_back(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)

    def drop(message: Message, context: Context) -> Message:
        drop_state(context)
        return Message(RecordDict(), reply_to=message)

    mod(message("train", 2), train(mod, client(), 1), drop)
    assert seen(mod, "train", 3, client()) == []


def test_the_last_rounds_are_kept(tmp_path: Path) -> None:
    train(DiskState(tmp_path), client(), *range(1, 8))
    assert files(tmp_path) == names_of(5, 6, 7)


def test_rounds_are_pruned_by_number_not_by_name(tmp_path: Path) -> None:
    train(DiskState(tmp_path, keep=2), client(), 999_999, 1_000_000, 1_000_001)
    assert files(tmp_path) == names_of(1_000_000, 1_000_001)


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_round_is_kept(keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep is {keep}, should be at least 1"):
        DiskState("state", keep=keep)


def test_an_earlier_round_restores_the_state_before_it_and_deletes_later_ones(
    tmp_path: Path,
) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1, 2, 3)
    resumed = client()
    assert seen(mod, "evaluate", 1, client()) == [1]
    assert files(tmp_path) == names_of(1, 2, 3)  # an evaluation writes nothing
    assert seen(mod, "train", 2, resumed) == [1]
    assert files(tmp_path) == names_of(1, 2)
    assert trained(resumed) == [1, 2]


def test_a_client_that_was_not_restarted_gets_the_earlier_state_too(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    living = train(mod, client(), 1, 2, 3)
    assert seen(mod, "train", 2, living) == [1]


def test_the_state_of_an_abandoned_attempt_is_never_used(tmp_path: Path) -> None:
    """The run is cut off in round 2, after this client has trained in it.

    The resumed run samples other clients for round 2.
    """
    mod = DiskState(tmp_path)
    train(mod, client(), 1, 2)
    second = client()
    seen(mod, "evaluate", 1, second, attempts=[f"1:{AA}"])
    assert seen(mod, "train", 3, second, attempts=[f"1:{AA}"]) == [1]
    assert files(tmp_path) == [*names_of(1), f"round-000003-{AA}.safetensors"]
    # The run resumes from the same checkpoint again, so the second attempt is abandoned too.
    assert seen(mod, "train", 4, client(), attempts=[f"1:{BB}"]) == [1]
    assert files(tmp_path) == [*names_of(1), f"round-000004-{BB}.safetensors"]
    # The run resumes from a checkpoint of the third attempt, which counts.
    assert seen(mod, "train", 5, client(), attempts=[f"1:{BB}", f"4:{CC}"]) == [1, 4]


def test_a_client_that_was_not_sampled_for_some_rounds_gets_its_last_state(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1, 4)
    assert seen(mod, "evaluate", 9, client()) == [1, 4]
    assert seen(mod, "train", 9, client()) == [1, 4]
    assert files(tmp_path) == names_of(1, 4, 9)


def test_a_living_context_of_the_same_round_is_left_alone(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    here = train(mod, client(), 1)
    save_state(here, name="of an evaluation", value=1)
    for path in run_directory(tmp_path, token("first")).glob("*.safetensors"):
        path.write_bytes(b"unread")
    assert seen(mod, "train", 2, here) == [1]
    assert restore_state(here, name="of an evaluation") == {"value": 1}


def test_evaluation_restores_and_does_not_write(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert seen(mod, "evaluate", 1, client()) == [1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before
    DiskState(tmp_path / "new")(message("evaluate", 1), client(), work)
    assert not (tmp_path / "new").exists()


def test_a_round_is_trained_again_from_the_state_before_it(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    first, again = train(mod, client(), 1, 2), client()
    train(mod, again, 2)
    assert trained(first) == trained(again) == [1, 2]
    assert again.state == first.state


def test_runs_do_not_see_each_other(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1, 2)
    assert seen(mod, "train", 3, client(), run="second") == []
    assert files(tmp_path) == names_of(1, 2)
    assert files(tmp_path, "second") == names_of(3)


@pytest.mark.parametrize("bad", [None, "first", "../../out", "A" * 64, "a" * 63, 7])
def test_a_message_without_a_token_reads_and_writes_nothing(bad: Any, tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1)
    before = sorted(tmp_path.rglob("*"))
    sent = message("train", 2, run=None)
    if bad is not None:
        sent.content["config"][RUN] = bad
    here = client()
    reply = mod(sent, here, work)
    assert trained(here) == [2]
    assert CLIENT not in reply.content
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "attempts", [["../../out"], ["1:aa"], ["x:" + AA], [f"1:{AA}/.."], [1, 2], [f"1:{AA}"] * 1001]
)
def test_a_crafted_attempt_name_is_refused(attempts: list[Any], tmp_path: Path) -> None:
    reply = DiskState(tmp_path)(message("train", 1, attempts=attempts), client(), work)
    assert (reply.error.reason or "").startswith("message: flower-adapter.attempts is not a list")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("server_round", [-1, 10**9, 2**62])
def test_a_round_that_a_file_name_cannot_hold_is_refused(server_round: int, tmp_path: Path) -> None:
    reply = DiskState(tmp_path)(message("train", server_round), client(), work)
    assert (reply.error.reason or "").startswith("message: server-round is not from 0")


def test_only_the_owner_can_enter_the_directories_and_read_the_files(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "state"
    train(DiskState(root), client(), 1)
    directories = [root.parent, root, root / "runs", run_directory(root, token("first"))]
    assert [path.stat().st_mode & 0o777 for path in directories] == [0o700] * 4
    assert {p.stat().st_mode & 0o777 for p in root.rglob("*.safetensors")} == {0o600}


def test_no_path_tells_the_token(tmp_path: Path) -> None:
    train(DiskState(tmp_path), client(), 1)
    assert not any(token("first") in str(path) for path in tmp_path.rglob("*"))


def test_the_reply_says_that_the_client_keeps_a_state(tmp_path: Path) -> None:
    reply = DiskState(tmp_path)(message("train", 1), client(), work)
    assert reply.content.config_records[CLIENT][KEEPS_STATE] is True


def end(mod: DiskState, run: str = "first") -> None:
    sent = Message(RecordDict({"config": ConfigRecord({RUN: token(run)})}), 9, END_QUERY)
    assert not mod(sent, client(), work).has_error()


def test_the_state_of_a_run_is_deleted_when_the_run_has_ended(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1, 2)
    train(mod, client(), 1, run="second")
    end(mod)
    assert not run_directory(tmp_path, token("first")).exists()
    assert files(tmp_path, "second") == names_of(1)


@pytest.mark.parametrize("keeps", [True, lambda _: True])
def test_the_state_of_a_run_that_has_ended_can_be_kept(keeps: Any, tmp_path: Path) -> None:
    mod = DiskState(tmp_path, keep_ended=keeps)
    train(mod, client(), 1, 2)
    end(mod)
    assert seen(mod, "train", 3, client()) == [1, 2]


def test_another_run_cannot_end_a_run(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1)
    end(mod, "second")
    assert files(tmp_path) == names_of(1)


def test_old_runs_are_deleted_and_too_many_runs_keep_no_state(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    mod = DiskState(tmp_path, max_runs=2, max_age=30)
    train(mod, client(), 1, run="old")
    train(mod, client(), 1, run="young")
    train(mod, client(), 1, run="third")
    assert not run_directory(tmp_path, token("third")).exists()
    assert "holds the states of 2 runs, so this run keeps no state" in flower_log.text
    for path in (run_directory(tmp_path, token("old")), *tmp_path.rglob("*")):
        if token("old") and run_directory(tmp_path, token("old")) in (path, path.parent):
            os.utime(path, (0, 0))
    train(mod, client(), 1, run="third")
    assert not run_directory(tmp_path, token("old")).exists()
    assert files(tmp_path, "young") == files(tmp_path, "third") == names_of(1)


def test_a_run_that_another_process_works_on_is_refused(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    inner: list[str | None] = []

    def meanwhile(message_: Message, context: Context) -> Message:
        reply = DiskState(tmp_path)(message("train", 1), client(), work)
        inner.append(reply.error.reason)
        return work(message_, context)

    assert not mod(message("train", 1), client(), meanwhile).has_error()
    assert (inner[0] or "").startswith("state: another process of this client is busy")


@pytest.mark.parametrize(
    "sent", [("train", None), ("evaluate", None), ("query.label", 1), ("query", 1)]
)
def test_a_message_without_a_round_passes_through(
    sent: tuple[str, int | None], tmp_path: Path
) -> None:
    reply = DiskState(tmp_path)(message(*sent), client(), work)
    assert not reply.has_error()
    assert list(tmp_path.iterdir()) == []


def test_a_message_without_a_config_passes_through(tmp_path: Path) -> None:
    reply = DiskState(tmp_path)(
        Message(RecordDict(), 9, "train"), client(), lambda m, _: Message(RecordDict(), reply_to=m)
    )
    assert not reply.has_error()
    assert list(tmp_path.iterdir()) == []


def test_train_messages_of_any_action_are_kept(tmp_path: Path) -> None:
    DiskState(tmp_path)(message("train.twice", 1), client(), work)
    assert files(tmp_path) == names_of(1)


@pytest.mark.parametrize("size", [0, 1, 8, 100, -1])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_damaged_file_is_refused_and_only_the_log_names_it(
    kind: str, size: int, tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1)
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:size])
    reply = mod(message(kind, 2), client(), lambda *_: pytest.fail("the client worked"))
    assert reply.has_error()
    assert reply.error.reason.startswith("state: the saved state of this client is damaged")
    assert str(tmp_path) not in reply.error.reason
    assert str(file) in flower_log.text


def test_a_full_disk_gives_an_error_reply_and_leaves_the_last_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mod = DiskState(tmp_path)
    here = train(mod, client(), 1)

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flower_adapter.client.disk.write_file", full)
        reply = mod(message("train", 2), here, work)
    assert reply.has_error()
    assert reply.error.reason.startswith("state: this client cannot read or write its state")
    assert trained(here) == []  # the next message restores the last round from the disk
    assert seen(mod, "train", 2, here) == [1]
    assert seen(mod, "train", 2, client()) == [1]


def test_a_directory_can_be_a_function_of_the_context(tmp_path: Path) -> None:
    def directory(context: Context) -> Path | None:
        partition = int(context.node_config["partition-id"])
        return tmp_path / "zero" if partition == 0 else None

    mod = DiskState(directory)
    train(mod, client(0), 1)
    here = train(mod, client(1), 1)
    assert files(tmp_path / "zero") == names_of(1)
    assert [path.name for path in tmp_path.iterdir()] == ["zero"]
    without_mod = client(1)
    work(message("train", 1), without_mod)
    assert here.state == without_mod.state


def test_without_a_directory_the_context_is_left_alone() -> None:
    here = train(DiskState(lambda context: None), client(), 1, 2)
    assert trained(here) == [1, 2]


def test_a_client_with_only_later_rounds_warns_and_starts_without_state(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    mod = DiskState(tmp_path, keep=2)
    living = train(mod, client(), *range(1, 6))
    assert seen(mod, "train", 3, living) == []
    [warning] = [r.getMessage() for r in flower_log.records if r.levelno == logging.WARNING]
    assert "has no state up to round 2, only of rounds 4, 5: starting without a state" in warning


def test_a_home_directory_can_be_abbreviated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train(DiskState("~/state"), client(), 1)
    assert files(tmp_path / "state") == names_of(1)


def test_a_half_written_file_is_not_read(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1)
    directory = run_directory(tmp_path, token("first"))
    (directory / ".round-000002.safetensors").write_bytes(b"half")
    assert seen(mod, "train", 2, client()) == [1]
    assert files(tmp_path) == names_of(1, 2)


@pytest.mark.parametrize("raises", [True, False])
def test_a_failed_message_leaves_no_changes_in_the_context(raises: bool, tmp_path: Path) -> None:
    """A client that failed then has the same state as a client that restarted."""
    mod = DiskState(tmp_path)
    here = train(mod, client(), 1)

    def fail(message: Message, context: Context) -> Message:
        save_state(context, rounds=[1, 2], tensor=torch.zeros(3))
        if raises:
            raise ArithmeticError
        return Message(Error(1, "ill"), reply_to=message)

    with pytest.raises(ArithmeticError) if raises else nullcontext():
        mod(message("train", 2), here, fail)
    assert files(tmp_path) == names_of(1)
    assert seen(mod, "train", 3, client()) == [1]
    assert seen(mod, "train", 3, here) == [1]
