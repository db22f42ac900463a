"""A client's state on disk, read back by clients that have nothing in memory."""

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
from flower_adapter.client.state import drop_state
from flower_adapter.protocol import ATTEMPTS, RUN


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
        config[RUN] = run
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


def files(directory: Path, run: str = "first", label: str = "partition 0000") -> list[str]:
    return sorted(path.name for path in (directory / label / run).iterdir())


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
    seen(mod, "evaluate", 1, second, attempts=["1:aa"])
    assert seen(mod, "train", 3, second, attempts=["1:aa"]) == [1]
    assert files(tmp_path) == [*names_of(1), "round-000003-aa.safetensors"]
    # The run resumes from the same checkpoint again, so the second attempt is abandoned too.
    assert seen(mod, "train", 4, client(), attempts=["1:bb"]) == [1]
    assert files(tmp_path) == [*names_of(1), "round-000004-bb.safetensors"]
    # The run resumes from a checkpoint of the third attempt, which counts.
    assert seen(mod, "train", 5, client(), attempts=["1:bb", "4:cc"]) == [1, 4]


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
    for path in (tmp_path / "partition 0000" / "first").iterdir():
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


def test_without_checkpoints_the_run_id_of_flower_is_used(tmp_path: Path) -> None:
    sent = message("train", 1, run=None)
    DiskState(tmp_path)(sent, client(), work)
    assert files(tmp_path, str(sent.metadata.run_id)) == names_of(1)


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


def test_two_clients_share_a_directory(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(0), 1)
    train(mod, client(1), 2)
    assert seen(mod, "train", 3, client(0)) == [1]
    assert seen(mod, "train", 3, client(1)) == [2]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"partition 0000", "partition 0001"}


ODD = [
    "..",
    ".",
    "",
    "a/b",
    "../../out",
    "a\\b",
    "C:",
    "ä 語",
    "new\nline",
    "%2F",
    "NUL\0",
]


@pytest.mark.parametrize("label", ODD, ids=ascii)
def test_a_label_with_odd_characters_gets_one_directory(label: str, tmp_path: Path) -> None:
    root = tmp_path / "deep" / "state"
    mod = DiskState(root, label=lambda context: label)
    train(mod, client(), 1)
    [file] = tmp_path.rglob("*.safetensors")
    assert file.relative_to(root).parts[1:] == ("first", *names_of(1))
    assert seen(mod, "train", 2, client()) == [1]


def test_odd_labels_do_not_share_a_directory(tmp_path: Path) -> None:
    labels = ["a/b", "a%2Fb", "a b", "a+b", "a%20b", "A/B"]
    for label in labels:
        mod = DiskState(tmp_path, label=lambda context, label=label: label)  # type: ignore[misc]
        train(mod, client(), 1)
    assert len(list(tmp_path.iterdir())) == len(labels)


@pytest.mark.parametrize("run", ["..", "a/b"])
def test_a_run_id_with_odd_characters_gets_one_directory(run: str, tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1, run=run)
    [file] = tmp_path.rglob("*.safetensors")
    assert len(file.resolve().relative_to(tmp_path / "partition 0000").parts) == 2


@pytest.mark.parametrize("size", [0, 1, 8, 100, -1])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_the_error_reply_for_a_damaged_file_names_it(kind: str, size: int, tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1)
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:size])
    reply = mod(message(kind, 2), client(), lambda *_: pytest.fail("the client worked"))
    assert reply.has_error()
    assert str(file) in reply.error.reason
    assert reply.error.reason.startswith("StateFormatError: ")


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
    assert "No space left on device" in reply.error.reason
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
    assert (
        "run first has no state up to round 2, only of rounds 4, 5: starting without a state"
        in warning
    )


def test_a_home_directory_can_be_abbreviated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train(DiskState("~/state"), client(), 1)
    assert files(tmp_path / "state") == names_of(1)


def test_a_half_written_file_is_not_read(tmp_path: Path) -> None:
    mod = DiskState(tmp_path)
    train(mod, client(), 1)
    directory = tmp_path / "partition 0000" / "first"
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
