"""The whole app in one process, with its ServerApp and ClientApp but without Flower's runtime."""

import json
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from flower_adapter import RoundFailed
from flower_adapter.testing import LocalGrid
from nanogpt_flower.client_app import app as client_app
from nanogpt_flower.server_app import main
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CorpusUnavailable, DataError, load_corpus, partition

RunApp = Callable[..., Path]


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_two_runs_of_one_seed_have_equal_metrics_and_samples(
    run_app: RunApp, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny | {"dropout": 0.1, "optimizer": "muon", "fraction-train": 0.6}
    runs = [
        run_app(settings | {"output-dir": str(tmp_path / name)}, 4, run_id=run_id)
        for run_id, name in enumerate(("first", "second"), start=1)
    ]
    first, second = runs
    for name in ("metrics.jsonl", "sample.txt"):
        assert (first / name).read_text() == (second / name).read_text()
    rows = rows_of(first)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[2]["val_loss"] < rows[0]["val_loss"] - 0.5
    assert rows[2]["clients"] == 2


def test_another_seed_gives_other_metrics(
    run_app: RunApp, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny | {"num-server-rounds": 1, "max-steps": 2}
    losses = {
        rows_of(run_app(settings | {"output-dir": str(tmp_path / str(s)), "seed": s}))[1][
            "val_loss"
        ]
        for s in (1, 2)
    }
    assert len(losses) == 2


def test_a_bad_setting_ends_the_run_before_anything_is_written(
    run_app: RunApp, tiny: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for bad, text in (
        ({"n-head": 3}, "n-embd is 16; it must be divisible by n-head, which is 3"),
        ({"uplink": "3-bit"}, "uplink is '3-bit'"),
    ):
        with pytest.raises(SettingsError, match=text):
            run_app(tiny | bad | {"output-dir": str(output)})
    with pytest.raises(DataError, match="no such"):
        run_app(tiny | {"corpus": "no such corpus", "output-dir": str(output)})
    assert not output.exists()


def test_a_run_whose_clients_all_fail_fails_with_their_reason(
    run_app: RunApp, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = tiny | {"block-size": 500, "output-dir": str(tmp_path / "out")}
    with pytest.raises(RoundFailed) as caught:
        run_app(settings)
    # all rounds of the run have failed, though fewer in a row than max-failed-rounds
    assert "train round 2: 0 good of 2 replies" in str(caught.value)
    assert str(caught.value).count("data: this client cannot train on its text") == 2


def test_a_server_without_text_takes_its_clients_vocabulary(
    run_app: RunApp, tiny: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    parts = partition(load_corpus(str(text_file)), 2).write(tmp_path / "datasets")
    settings = tiny | {
        "corpus": "none",
        "num-server-rounds": 1,
        "output-dir": str(tmp_path / "out"),
    }
    directory = run_app(settings, data_paths=parts)
    rows = rows_of(directory)
    assert rows[1]["val_loss"] is None
    assert 0 < rows[1]["client_val_loss"] < 3
    tokenizer = json.loads((directory / "model" / "tokenizer.json").read_text())
    assert tokenizer["vocab"] == "".join(sorted(set(text_file.read_text())))
    assert json.loads((directory / "config.json").read_text())["corpus"] is None


def test_a_resumed_run_shows_the_rounds_before_and_trains_further(
    run_app: RunApp, tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def settings(name: str, rounds: int, **more: str) -> dict[str, Any]:
        places = {"output-dir": str(tmp_path / name), "client-state": str(tmp_path / f"{name}-c")}
        return tiny | {"max-steps": 3, "num-server-rounds": rounds} | places | more

    whole = run_app(settings("whole", 3))
    first = run_app(settings("cut", 2))
    capsys.readouterr()
    resumed = run_app(settings("cut", 3, **{"resume-from": str(first)}), run_id=2)
    assert resumed == first
    for name in ("metrics.jsonl", "sample.txt"):
        assert (resumed / name).read_text() == (whole / name).read_text()
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:5]]
    assert shown == ["0", "1", "2", "3"]


def test_a_corpus_that_does_not_exist_is_named(
    run_app: RunApp, tiny: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises((DataError, CorpusUnavailable), match="nowhere"):
        run_app(tiny | {"corpus": str(tmp_path / "nowhere"), "output-dir": str(tmp_path)})


class CountingGrid(LocalGrid):
    """A grid that counts the bytes of all arrays that pass through it, by client and direction."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.counted: Counter[tuple[int, str]] = Counter()

    def reply(self, message: Message) -> Message | None:
        client = self.partition(message.metadata.dst_node_id)
        self.counted[client, "down"] += array_bytes(message)
        reply = super().reply(message)
        if reply is not None:
            self.counted[client, "up"] += array_bytes(reply)
        return reply


def array_bytes(message: Message) -> int:
    records = message.content.array_records.values() if message.has_content() else ()
    return sum(len(array.data) for record in records for array in record.values())


class Figures(HTMLParser):
    """The values of all `<data>` elements in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.values: list[int] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "data":
            self.values.append(int(dict(attrs)["value"] or 0))


@pytest.mark.parametrize("codec", ["fp32", "2-bit"])
def test_the_bytes_in_the_report_are_those_that_a_grid_counts(
    codec: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = Settings.from_run_config(
        tiny
        | {"uplink": codec, "downlink": codec, "min-clients": 3, "run-name": "run"}
        | {"output-dir": str(tmp_path)}
    )
    grid = CountingGrid(client_app, 3, run_config=settings.to_run_config())
    main(grid, Context(1, 0, {}, RecordDict(), settings.to_run_config()))
    directory = tmp_path / "run"
    lines = [json.loads(line) for line in (directory / "clients.jsonl").read_text().splitlines()]
    for client in range(3):
        for way in ("down", "up"):
            label = f"partition {client:04d} of 3"
            told = [line[f"bytes_{way}"] for line in lines if line["client"] == label]
            assert sum(told) == grid.counted[client, way] > 0
    shown = Figures((directory / "report.html").read_text()).values
    down, up = (sum(grid.counted[client, way] for client in range(3)) for way in ("down", "up"))
    assert {down, up, down + up} <= set(shown)
    # Without a codec: two messages with the model and one reply with it, in each of two rounds.
    whole = sum(line["fp32_bytes_down"] + line["fp32_bytes_up"] for line in lines)
    assert whole in shown
    assert (whole == down + up) if codec == "fp32" else (whole > 4 * (down + up) / 3)
