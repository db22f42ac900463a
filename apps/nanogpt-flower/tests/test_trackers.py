"""The trackers. The test of a tracker is skipped where its package is not installed."""

import json
import logging
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nanogpt_flower import trackers
from nanogpt_flower.settings import SettingsError
from nanogpt_flower.trackers import Trackers, check_trackers, tracker_names, values_of

RunApp = Callable[..., Path]


def client(label: str, **values: Any) -> dict[str, Any]:
    return {"round": 1, "client": label, "bytes_down": 10, "bytes_up": 5, "left_out": []} | values


class Fake:
    """A tracker that keeps what it gets, and fails in the rounds of `failing`."""

    failing: tuple[int, ...] = ()

    def __init__(self, start: Any) -> None:
        self.start = start
        self.steps: list[int] = []
        self.closed: list[bool] = []

    def log(self, step: int, values: Mapping[str, float], sample: str | None) -> None:
        if step in self.failing:
            raise OSError("no network")
        self.steps.append(step)

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    made: list[Fake] = []

    def make(start: Any) -> Fake:
        made.append(Fake(start))
        return made[-1]

    monkeypatch.setitem(trackers._KINDS, "wandb", make)
    return made


def test_the_names_are_read_from_the_setting() -> None:
    assert tracker_names("") == []
    assert tracker_names("wandb") == ["wandb"]
    assert tracker_names("tensorboard, trackio") == ["tensorboard", "trackio"]


@pytest.mark.parametrize("bad", ["mlflow", "wandb,wandb", "wandb,", "wandb;trackio"])
def test_an_unknown_tracker_is_refused_with_the_known_ones(bad: str) -> None:
    with pytest.raises(SettingsError) as caught:
        tracker_names(bad)
    assert str(caught.value) == (
        f"report-to is {bad!r}; it must be empty or name each of tensorboard, wandb, trackio at "
        "most once, separated by commas"
    )


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SettingsError) as caught:
        check_trackers("trackio")
    assert str(caught.value) == (
        "report-to is 'trackio', but the package trackio is not installed; install it with: "
        'pip install "nanogpt-flower[trackio]"'
    )


def test_every_number_of_a_round_gets_a_name() -> None:
    row = {"round": 1, "train_loss": 2.5, "val_loss": None, "clients": 2}
    lines = [client("a", train_loss=2.0, tokens=None), client("b", train_loss=3.0, tokens=7)]
    assert values_of(row, lines, {"train": 1.5}) == {
        "train_loss": 2.5,
        "clients": 2.0,
        "bytes_down": 20.0,
        "bytes_up": 10.0,
        "seconds/train": 1.5,
        "clients/a/train_loss": 2.0,
        "clients/a/bytes_down": 10.0,
        "clients/a/bytes_up": 5.0,
        "clients/b/train_loss": 3.0,
        "clients/b/tokens": 7.0,
        "clients/b/bytes_down": 10.0,
        "clients/b/bytes_up": 5.0,
    }


def test_labels_become_different_names_without_special_characters() -> None:
    labels = ["a/b", "a\x1bb", "a_b", ""]
    names = values_of({}, [client(label) for label in labels], {})
    found = [name.split("/")[1] for name in names if name.endswith("/bytes_up")]
    assert found == ["a_b", "a_b_2", "a_b_3", "_"]


def test_a_resumed_run_goes_on_in_the_same_tracker_run_and_sends_no_round_twice(
    fakes: list[Fake], tmp_path: Path
) -> None:
    for last in (2, 4):
        with Trackers("wandb", tmp_path, "run", {"corpus": "/home/me/text.txt", "seed": 1}) as both:
            for server_round in range(last + 1):  # a resumed run shows the earlier rounds again
                both.log(server_round, {"val_loss": 1.0})
    first, second = fakes
    assert (first.steps, second.steps) == ([0, 1, 2], [3, 4])
    assert first.start.id == second.start.id
    assert first.start.config == {"corpus": "text.txt", "seed": 1}
    assert (first.start.first_round, second.start.first_round) == (0, 3)
    assert (first.closed, second.closed) == ([False], [False])


def test_a_tracker_that_fails_does_not_end_the_run_and_gets_the_missing_rounds_later(
    fakes: list[Fake],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Fake, "failing", (1,))
    with caplog.at_level(logging.WARNING), Trackers("wandb", tmp_path, "run", {}) as some:
        for server_round in range(3):
            some.log(server_round, {})
    assert caplog.messages == ["wandb failed, so it gets no more values of this run: no network"]
    monkeypatch.setattr(Fake, "failing", ())
    with Trackers("wandb", tmp_path, "run", {}) as some:
        for server_round in range(3):
            some.log(server_round, {})
    assert [fake.steps for fake in fakes] == [[0], [1, 2]]


def test_a_run_that_fails_is_closed_as_failed(fakes: list[Fake], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), Trackers("wandb", tmp_path, "run", {}):
        raise ValueError("stop")
    assert fakes[0].closed == [True]


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text("[")
    with pytest.raises(SettingsError, match=r"trackers\.json is damaged"):
        Trackers("wandb", tmp_path, "run", {})


def expected_values(directory: Path) -> dict[tuple[str, int], float]:
    """Return the values of each client and round, read from the files of the run."""
    values: dict[tuple[str, int], float] = {}
    for name, prefix in (("metrics", ""), ("clients", "clients/")):
        for text in (directory / f"{name}.jsonl").read_text().splitlines():
            line = json.loads(text)
            where = f"{prefix}{line['client']}/" if prefix else ""
            for key, value in line.items():
                if key != "round" and isinstance(value, int | float):
                    values[f"{where}{key}", line["round"]] = value
    return values


def run_and_resume(run_app: RunApp, settings: dict[str, Any]) -> Path:
    directory = run_app(settings | {"num-server-rounds": 1})
    more = {"num-server-rounds": 2, "resume-from": str(directory)}
    return run_app(settings | more, run_id=2)


def test_tensorboard_has_every_value_of_each_client_and_round_once(
    run_app: RunApp, tiny: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = tiny | {"output-dir": str(tmp_path), "report-to": "tensorboard"}
    directory = run_and_resume(run_app, settings)
    events = EventAccumulator(str(directory / "tensorboard"), {"scalars": 0})
    events.Reload()
    expected = expected_values(directory)
    assert len({key for key, _ in expected if key.startswith("clients/")}) >= 2 * 8
    found = {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    steps = [event.step for event in events.Scalars("val_loss")]
    assert steps == [0, 1, 2]


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, after the 7 bytes of W&B's header.

    A block has 32 KiB. A chunk in it has a checksum (4 bytes), a length (2 bytes), a type (1 byte:
    whole, first, middle or last), and data.
    """
    position, record = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # the padding at the end of a block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        if kind == 0:
            return
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole or last
            yield record
            record = b""


def test_wandb_writes_every_value_offline(
    run_app: RunApp, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = tiny | {"output-dir": str(tmp_path), "report-to": "wandb"}
    directory = run_and_resume(run_app, settings)
    found: dict[tuple[str, int], float] = {}
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found |= {(key, items["_step"]): value for key, value in items.items()}
    for key, value in expected_values(directory).items():
        assert found[key] == pytest.approx(value), key
    ids = {path.name.rpartition("-")[2] for path in directory.glob("wandb/offline-run-*")}
    assert len(ids) == 1


def test_trackio_has_every_value(
    run_app: RunApp, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    settings = tiny | {"output-dir": str(tmp_path), "report-to": "trackio"}
    project = f"test-{uuid.uuid4().hex}"  # Trackio's database outlives the test
    monkeypatch.setenv("TRACKIO_PROJECT", project)
    directory = run_and_resume(run_app, settings)
    (run,) = SQLiteStorage.get_runs(project)
    found: dict[tuple[str, int], float] = {}
    for line in SQLiteStorage.get_logs(project, run):
        found |= {(key, line["step"]): value for key, value in line.items()}
    for key, value in expected_values(directory).items():
        assert found[key] == pytest.approx(value), key
