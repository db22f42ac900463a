import json
import math
from pathlib import Path

import pytest

from flower_adapter import RoundRecord
from flower_adapter.server.record import ClientRecord, LeftOut
from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.history import History


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(str(tmp_path / "runs"), "42")


def record(
    server_round: int,
    train_loss: float | None = None,
    val_loss: float | None = None,
    client_val_loss: float | None = None,
    clients: int = 0,
) -> RoundRecord:
    def metrics(name: str, value: float | None) -> dict[str, float] | None:
        return None if value is None else {name: value}

    return RoundRecord(
        server_round,
        train_metrics=metrics("train-loss", train_loss),
        server_metrics=metrics("val-loss", val_loss),
        evaluate_metrics=metrics("val-loss", client_val_loss),
        train_clients=[ClientRecord(n, f"c{n}", {}, 1.0, 0, 0, 0.1) for n in range(clients)],
    )


def rows_of(directory: RunDirectory) -> list[dict[str, float | None]]:
    lines = (directory.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rounds_are_printed_written_and_drawn(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History(directory, note="figures are of another corpus")
    history.add(record(0, val_loss=4.0))
    history.add(record(1, 1.5, 2.0, 2.5, 3))
    printed = capsys.readouterr().out.splitlines()
    assert printed == history.table().splitlines()[:-1]
    assert printed[2].split() == ["1", "1.5000", "2.0000", "7.39"]
    assert history.table().endswith("note: figures are of another corpus")
    before, after = rows_of(directory)
    assert (before["round"], before["val_loss"], before["train_loss"]) == (0, 4.0, None)
    assert after.pop("perplexity") == pytest.approx(math.exp(2.0))
    assert after == {
        "round": 1,
        "train_loss": 1.5,
        "val_loss": 2.0,
        "client_val_loss": 2.5,
        "clients": 3,
    }
    assert (directory.path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_servers_text_the_clients_loss_is_shown(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History(directory)
    history.add(record(0))
    history.add(record(1, client_val_loss=2.0, clients=2))
    _, before, after = capsys.readouterr().out.splitlines()
    assert before.split() == ["0", "-", "-", "-"]
    assert after.split() == ["1", "-", "2.0000", "7.39"]


def test_a_loss_gone_wild_still_has_a_perplexity(directory: RunDirectory) -> None:
    history = History(directory)
    history.add(record(0, val_loss=1e6))
    assert rows_of(directory)[0]["perplexity"] == math.exp(700.0)


def test_clients_that_were_left_out_are_listed_by_phase_and_reason(
    directory: RunDirectory,
) -> None:
    history = History(directory)
    first, second = record(1), record(2)
    first.left_out = [
        LeftOut("train", 7, "left", "other text"),
        LeftOut("evaluate", 7, "left", "other text"),
    ]
    second.left_out = [
        LeftOut("train", 7, "left", "other text"),
        LeftOut("train", 8, None, "w holds NaN"),
    ]
    history.add(first)
    history.add(second)
    assert history.table().splitlines()[3:] == [
        "note: LEFT OUT of train in round 1, 2: node 7: other text",
        "note: LEFT OUT of evaluate in round 1: node 7: other text",
        "note: LEFT OUT of train in round 2: node 8: w holds NaN",
    ]
