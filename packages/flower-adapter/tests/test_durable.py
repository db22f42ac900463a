"""A client's state on disk, read back by clients that have nothing in memory."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from flower_adapter import Durable, drop_state, restore_state, save_state
from flower_adapter.durable import RESUMED, RUN

MARK = "flower-adapter.durable"


@pytest.fixture(autouse=True)
def nothing_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def client(partition: int = 0) -> Context:
    """A client that has just been started."""
    return Context(1, 2, {"partition-id": partition}, RecordDict(), {})


def message(
    kind: str,
    server_round: int | None,
    run: str | None = "first",
    resumed: list[str] | None = None,
) -> Message:
    config: dict[str, Any] = {} if server_round is None else {"server-round": server_round}
    if resumed:
        config[RESUMED] = resumed
    if run is not None:
        config[RUN] = run
    return Message(RecordDict({"config": ConfigRecord(config)}), 9, kind)


def work(message: Message, context: Context) -> Message:
    """Adds its round to the list of those that this client has trained in."""
    if message.metadata.message_type == "train":
        at = next(iter(message.content.config_records.values())).get("server-round", 0)
        save_state(context, rounds=[*trained(context), at], tensor=torch.full((3,), float(at)))
    return Message(RecordDict(), reply_to=message)


def trained(context: Context) -> list[int]:
    state = restore_state(context)
    return [] if state is None else list(state["rounds"])


def train(mod: Durable, context: Context, *rounds: int, run: str = "first") -> Context:
    for server_round in rounds:
        assert not mod(message("train", server_round, run), context, work).has_error()
    return context


def seen(mod: Durable, kind: str, server_round: int | None, context: Context, **run: Any) -> Any:
    """What the client's work finds in its context."""
    found: list[list[int]] = []

    def look(message: Message, context: Context) -> Message:
        found.append(trained(context))
        return work(message, context)

    reply = mod(message(kind, server_round, **run), context, look)
    assert not reply.has_error()
    return found[0]


def kept(directory: Path, run: str = "first", label: str = "partition 0000") -> list[str]:
    return sorted(path.name for path in (directory / label / run).iterdir())


def of_rounds(*rounds: int) -> list[str]:
    return [f"round-{at:06d}.safetensors" for at in rounds]


def test_a_restarted_client_goes_on_with_its_state(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
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
    Durable(tmp_path)(message("train", 1), before, keep)
    Durable(tmp_path)(message("evaluate", 1), after, work)
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
    mod = Durable(tmp_path)

    def drop(message: Message, context: Context) -> Message:
        drop_state(context)
        return Message(RecordDict(), reply_to=message)

    mod(message("train", 2), train(mod, client(), 1), drop)
    assert seen(mod, "train", 3, client()) == []


def test_the_last_rounds_are_kept(tmp_path: Path) -> None:
    train(Durable(tmp_path), client(), *range(1, 8))
    assert kept(tmp_path) == of_rounds(5, 6, 7)


def test_rounds_are_pruned_by_number_not_by_name(tmp_path: Path) -> None:
    train(Durable(tmp_path, keep=2), client(), 999_999, 1_000_000, 1_000_001)
    assert kept(tmp_path) == of_rounds(1_000_000, 1_000_001)


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_round_is_kept(keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep is {keep}, should be a whole number of at least 1"):
        Durable("state", keep=keep)


def test_an_earlier_round_takes_the_state_before_it_and_removes_later_ones(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
    train(mod, client(), 1, 2, 3)
    resumed = client()
    assert seen(mod, "evaluate", 1, client()) == [1]
    assert kept(tmp_path) == of_rounds(1, 2, 3)  # an evaluation writes nothing
    assert seen(mod, "train", 2, resumed) == [1]
    assert kept(tmp_path) == of_rounds(1, 2)
    assert trained(resumed) == [1, 2]


def test_a_client_that_was_not_restarted_is_taken_back_too(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
    living = train(mod, client(), 1, 2, 3)
    assert seen(mod, "train", 2, living) == [1]


def test_a_round_that_was_cut_off_does_not_come_back_when_the_client_sits_it_out(
    tmp_path: Path,
) -> None:
    """Cut off in round 2, after this client trained; in the resumed one others are sampled."""
    mod = Durable(tmp_path)
    train(mod, client(), 1, 2)
    second = client()
    seen(mod, "evaluate", 1, second, resumed=["1:aa"])
    assert seen(mod, "train", 3, second, resumed=["1:aa"]) == [1]
    assert kept(tmp_path) == [*of_rounds(1), "round-000003-aa.safetensors"]
    # and once more, from the same checkpoint: nothing of the second attempt was ever one
    assert seen(mod, "train", 4, client(), resumed=["1:bb"]) == [1]
    assert kept(tmp_path) == [*of_rounds(1), "round-000004-bb.safetensors"]
    # and after a checkpoint of the third
    assert seen(mod, "train", 5, client(), resumed=["1:bb", "4:cc"]) == [1, 4]


def test_a_client_that_sat_rounds_out_takes_its_last_state(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
    train(mod, client(), 1, 4)
    assert seen(mod, "evaluate", 9, client()) == [1, 4]
    assert seen(mod, "train", 9, client()) == [1, 4]
    assert kept(tmp_path) == of_rounds(1, 4, 9)


def test_a_living_context_of_the_same_round_is_left_alone(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
    here = train(mod, client(), 1)
    save_state(here, name="of an evaluation", value=1)
    for path in (tmp_path / "partition 0000" / "first").iterdir():
        path.write_bytes(b"unread")
    assert seen(mod, "train", 2, here) == [1]
    assert restore_state(here, name="of an evaluation") == {"value": 1}


def test_evaluation_restores_and_does_not_write(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
    train(mod, client(), 1)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert seen(mod, "evaluate", 1, client()) == [1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == files
    Durable(tmp_path / "new")(message("evaluate", 1), client(), work)
    assert not (tmp_path / "new").exists()


def test_a_round_is_trained_again_from_the_state_before_it(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
    first, again = train(mod, client(), 1, 2), client()
    train(mod, again, 2)
    assert trained(first) == trained(again) == [1, 2]
    assert again.state == first.state


def test_runs_do_not_see_each_other(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
    train(mod, client(), 1, 2)
    assert seen(mod, "train", 3, client(), run="second") == []
    assert kept(tmp_path) == of_rounds(1, 2)
    assert kept(tmp_path, "second") == of_rounds(3)


def test_without_checkpoints_the_run_is_flowers(tmp_path: Path) -> None:
    sent = message("train", 1, run=None)
    Durable(tmp_path)(sent, client(), work)
    assert kept(tmp_path, str(sent.metadata.run_id)) == of_rounds(1)


@pytest.mark.parametrize(
    "sent", [("train", None), ("evaluate", None), ("query.label", 1), ("query", 1)]
)
def test_a_message_of_no_round_passes_through(sent: tuple[str, int | None], tmp_path: Path) -> None:
    reply = Durable(tmp_path)(message(*sent), client(), work)
    assert not reply.has_error()
    assert list(tmp_path.iterdir()) == []


def test_a_message_without_a_config_passes_through(tmp_path: Path) -> None:
    reply = Durable(tmp_path)(
        Message(RecordDict(), 9, "train"), client(), lambda m, _: Message(RecordDict(), reply_to=m)
    )
    assert not reply.has_error()
    assert list(tmp_path.iterdir()) == []


def test_train_messages_of_any_action_are_kept(tmp_path: Path) -> None:
    Durable(tmp_path)(message("train.twice", 1), client(), work)
    assert kept(tmp_path) == of_rounds(1)


def test_two_clients_share_a_directory(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
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
def test_a_label_of_odd_characters_is_a_directory_of_its_own(label: str, tmp_path: Path) -> None:
    root = tmp_path / "deep" / "state"
    mod = Durable(root, label=lambda context: label)
    train(mod, client(), 1)
    [file] = tmp_path.rglob("*.safetensors")
    assert file.relative_to(root).parts[1:] == ("first", *of_rounds(1))
    assert seen(mod, "train", 2, client()) == [1]


def test_odd_labels_do_not_share_a_directory(tmp_path: Path) -> None:
    labels = ["a/b", "a%2Fb", "a b", "a+b", "a%20b", "A/B"]
    for label in labels:
        mod = Durable(tmp_path, label=lambda context, label=label: label)  # type: ignore[misc]
        train(mod, client(), 1)
    assert len(list(tmp_path.iterdir())) == len(labels)


@pytest.mark.parametrize("run", ["..", "a/b"])
def test_a_run_of_odd_characters_is_a_directory_of_its_own(run: str, tmp_path: Path) -> None:
    mod = Durable(tmp_path)
    train(mod, client(), 1, run=run)
    [file] = tmp_path.rglob("*.safetensors")
    assert len(file.resolve().relative_to(tmp_path / "partition 0000").parts) == 2


@pytest.mark.parametrize("size", [0, 1, 8, 100, -1])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_damaged_file_is_answered_with_an_error_that_names_it(
    kind: str, size: int, tmp_path: Path
) -> None:
    mod = Durable(tmp_path)
    train(mod, client(), 1)
    [file] = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:size])
    reply = mod(message(kind, 2), client(), lambda *_: pytest.fail("the client worked"))
    assert reply.has_error()
    assert str(file) in reply.error.reason
    assert reply.error.reason.startswith("StateFormatError: ")


def test_a_disk_that_is_full_is_answered_with_an_error_and_keeps_the_last_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mod = Durable(tmp_path)
    here = train(mod, client(), 1)

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flower_adapter.durable.write_file", full)
        reply = mod(message("train", 2), here, work)
    assert reply.has_error()
    assert "No space left on device" in reply.error.reason
    assert seen(mod, "train", 2, client()) == [1]


def test_a_directory_can_be_a_function_of_the_context(tmp_path: Path) -> None:
    def directory(context: Context) -> Path | None:
        partition = int(context.node_config["partition-id"])
        return tmp_path / "zero" if partition == 0 else None

    mod = Durable(directory)
    train(mod, client(0), 1)
    here = train(mod, client(1), 1)
    assert kept(tmp_path / "zero") == of_rounds(1)
    assert [path.name for path in tmp_path.iterdir()] == ["zero"]
    assert MARK not in here.state


def test_where_nothing_is_kept_the_context_is_left_alone() -> None:
    here = train(Durable(lambda context: None), client(), 1, 2)
    assert trained(here) == [1, 2]


def test_only_later_rounds_are_a_warning_and_a_start_without_state(
    tmp_path: Path, flower_log: pytest.LogCaptureFixture
) -> None:
    mod = Durable(tmp_path, keep=2)
    living = train(mod, client(), *range(1, 6))
    assert seen(mod, "train", 3, living) == []
    [warning] = [r.getMessage() for r in flower_log.records if r.levelno == logging.WARNING]
    assert "no state is kept of run first up to round 2, only of rounds 4, 5" in warning


def test_a_home_directory_can_be_abbreviated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train(Durable("~/state"), client(), 1)
    assert kept(tmp_path / "state") == of_rounds(1)


def test_what_a_killed_client_half_wrote_is_not_read(tmp_path: Path) -> None:
    mod = Durable(tmp_path)
    train(mod, client(), 1)
    place = tmp_path / "partition 0000" / "first"
    (place / ".round-000002.safetensors").write_bytes(b"half")
    assert seen(mod, "train", 2, client()) == [1]
    assert kept(tmp_path) == of_rounds(1, 2)


def test_what_a_failed_round_left_in_a_living_context_is_not_gone_on_from(tmp_path: Path) -> None:
    """A context that a raising client has changed must be what a restarted client would have."""
    mod = Durable(tmp_path)
    here = train(mod, client(), 1)

    def fail(message: Message, context: Context) -> Message:
        save_state(context, rounds=[1, 2], tensor=torch.zeros(3))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        mod(message("train", 2), here, fail)
    assert seen(mod, "train", 3, client()) == [1]
    assert seen(mod, "train", 3, here) == [1]
