"""The report of a run, read back from its HTML."""
# ruff: noqa: RUF001 (the page has dashes and multiplication signs)

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nanogpt_flower.report import ReportError, write_report
from nanogpt_flower.report.charts import axis
from nanogpt_flower.report.data import Timing, read_run
from nanogpt_flower.report.reference import original_loss
from nanogpt_flower.report.text import clean, count, duration, ranges, sentence

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"
VOID = {"meta", "br", "img", "link", "input", "hr"}
LOADING = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background"}


class Page(HTMLParser):
    """The tags, attributes and words of a page. Each tag must be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    @property
    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())


def client_row(server_round: int, label: str, **values: Any) -> dict[str, Any]:
    row = {"round": server_round, "client": label, "train_loss": 2.0, "val_loss": 2.0}
    row |= {"train_characters": 900, "val_characters": 100, "tokens": 512, "update_norm": 1.0}
    traffic = {"bytes_down": 10, "bytes_up": 20, "fp32_bytes_down": 100, "fp32_bytes_up": 200}
    return row | traffic | {"left_out": []} | values


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(directory: Path, num_rounds: int = 2, labels: tuple[str, ...] = ("a", "b")) -> Path:
    """Write the files of a run: `num_rounds` rounds after round 0."""
    directory.mkdir()
    rounds = range(num_rounds + 1)
    loss = {r: 1.5 + 2.7 / (r + 1) for r in rounds}
    write_lines(
        directory / "metrics.jsonl",
        [
            {
                "round": r,
                "train_loss": loss[r] if r else None,
                "val_loss": loss[r],
                "client_val_loss": loss[r],
                "clients": len(labels) if r else 0,
            }
            for r in rounds
        ],
    )
    write_lines(
        directory / "clients.jsonl",
        [client_row(r, label, val_loss=loss[r]) for r in rounds if r for label in labels],
    )
    seconds = {"train": 8.0, "evaluate": 2.0, "aggregate": 0.5, "encode": 0.25}
    write_lines(
        directory / "timings.jsonl",
        [
            {
                "round": r,
                "seconds": seconds,
                "clients": {label: {"train": 7.0, "reply": 7.5} for label in labels},
            }
            for r in rounds
            if r
        ],
    )
    write_lines(
        directory / "samples.jsonl", [{"round": r, "text": f"verse {r}\n" * 20} for r in rounds]
    )
    settings = {"num-server-rounds": num_rounds, "seed": 1337, "uplink": "2-bit"}
    corpus = {"name": "/home/someone/secret/text.txt", "sha256": "ab" * 32, "characters": 2000}
    config = {"settings": settings, "parameters": 1000, "corpus": corpus, "server": {}}
    config |= {"machine": {"cores": 2}, "versions": {"torch": "2.13.0"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "launch.json").write_text(json.dumps({"preset": "quick", "clients": len(labels)}))
    return directory


def test_nothing_that_a_client_sends_becomes_markup(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "hostile", labels=(HOSTILE, "b"))
    left_out = [{"phase": HOSTILE, "reason": HOSTILE}]
    rows = [client_row(r, label, left_out=left_out) for r in (1, 2) for label in (HOSTILE, "b")]
    write_lines(directory / "clients.jsonl", rows)
    write_lines(directory / "samples.jsonl", [{"round": r, "text": HOSTILE} for r in range(3)])
    (directory / "sample.txt").write_text(HOSTILE)
    part = {"label": HOSTILE, "train": 1, "val": 1, "speakers": 1, "plays": 1, "divergence": 0.1}
    part["holds"] = [HOSTILE]
    parts = {"scheme": HOSTILE, "options": {HOSTILE: HOSTILE}, "clients": [part], "left_out": 3}
    (directory / "parts.json").write_text(json.dumps(parts))
    config = json.loads((directory / "config.json").read_text())
    config["settings"] |= {"run-name": HOSTILE, HOSTILE: HOSTILE}
    config |= {"machine": {HOSTILE: HOSTILE}, "versions": {"nanogpt-flower": HOSTILE}}
    (directory / "config.json").write_text(json.dumps(config))
    state = {"state": "failed", "message": HOSTILE}
    (directory / "state.json").write_text(json.dumps(state))
    launch = {"preset": HOSTILE, "clients": 2, "runtime": HOSTILE, "started": HOSTILE}
    (directory / "launch.json").write_text(json.dumps(launch))
    hostile = Page(write_report(directory))
    assert not {"script", "img"} & set(hostile.tags)
    assert hostile.tags.count("style") == 1
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert "\x1b" not in hostile.html
    assert "\u202e" not in hostile.html
    assert "<script>alert" in hostile.text  # it is shown as text


@pytest.mark.parametrize("refresh", [False, True])
def test_the_page_has_no_external_address(refresh: bool, tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run"), refresh=refresh))
    assert [v for name, v in page.attributes if name in LOADING and not v.startswith("#")] == []
    assert not re.search(r"https?://|url\(|@import", page.html)
    assert "script" not in page.tags


def test_only_the_page_of_a_running_run_reloads_itself(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    running, finished = Page(write_report(directory, refresh=True)), Page(write_report(directory))
    assert "running, round 2 of 2" in running.words
    assert ("http-equiv", "refresh") in running.attributes
    assert ("http-equiv", "refresh") not in finished.attributes


def test_the_totals_are_the_sums_of_the_clients(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    page = Page(write_report(directory))
    rows = [json.loads(line) for line in (directory / "clients.jsonl").read_text().splitlines()]
    bytes_shown = {int(value) for name, value in page.attributes if name == "value"}
    for key in ("bytes_down", "bytes_up"):
        assert sum(row[key] for row in rows) in bytes_shown
    assert sum(row["fp32_bytes_down"] + row["fp32_bytes_up"] for row in rows) in bytes_shown
    assert f"{sum(row['tokens'] for row in rows):,}" in page.words
    assert "10.0× less than fp32" in page.words
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert f"{last:.4f}" in page.words
    assert f"{math.exp(last):.2f}" in page.words


def test_each_client_and_each_sample_is_shown(tmp_path: Path) -> None:
    labels = tuple(f"client {i}" for i in range(10))
    page = Page(write_report(make_run(tmp_path / "run", 3, labels)))
    for label in labels:
        assert label in page.text
    for server_round in range(4):
        assert f"verse {server_round}" in page.text
    lines = [v for name, v in page.attributes if name == "class" and v == "line client faint"]
    assert len(lines) >= 2 * len(labels)  # by round and by tokens


def test_the_shares_of_the_time_add_up(tmp_path: Path) -> None:
    (timing, *_) = read_run(make_run(tmp_path / "run")).timings or ()
    # 7 of the 8 seconds are training, a quarter is encoding, and the rest is waiting.
    assert timing.shares() == (7.0, 0.75, 0.25, 0.5, 2.0, 0.0)
    assert sum(timing.shares()) == timing.total == 10.5
    without = Timing(1, timing.seconds, {})
    assert without.shares() == (7.75, 0.0, 0.25, 0.5, 2.0, 0.0)


def test_directories_of_the_machine_are_not_shown(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    config = json.loads((directory / "config.json").read_text())
    places = {"corpus": "/home/someone/secret/text.txt", "output-dir": "/home/someone/secret"}
    config["settings"] |= places | {"client-state": r"C:\Users\someone\secret\state"}
    (directory / "config.json").write_text(json.dumps(config))
    left_out = [{"phase": "train", "reason": "no file '/home/someone/my secret/a.txt'"}]
    write_lines(directory / "clients.jsonl", [client_row(1, "a", left_out=left_out)])
    page = Page(write_report(directory))
    assert "someone" not in page.html
    assert "text.txt" in page.text


def test_missing_files_are_named_in_place_of_their_content(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    for path in directory.iterdir():
        if path.name != "metrics.jsonl":
            path.unlink()
    page = Page(write_report(directory))
    for name in ("parts.json", "clients.jsonl", "timings.jsonl", "config.json"):
        assert name in page.text
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(ReportError, match=r"metrics\.jsonl"):
        write_report(directory)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("metrics.jsonl", '{"round": 1}\n{"round": 1}\n', "round 1 comes after round 1"),
        ("metrics.jsonl", '{"round": "one"}\n', "line 1 is damaged: round is 'one'"),
        ("metrics.jsonl", '{"round": 0, "val_loss": NaN}\n', "NaN"),
        ("clients.jsonl", '{"round": 1}\n', "client is None; it must be a text"),
        ("clients.jsonl", '{"round": 1, "client": "a", "tokens": -1}\n', "tokens is -1"),
        ("clients.jsonl", "[" * 100_000, "damaged"),
        ("timings.jsonl", '{"round": 1, "seconds": {"train": "1"}}\n', "train is '1'"),
        ("samples.jsonl", '{"round": 1, "text": 3}\n', "text is 3"),
        ("config.json", "[]", "must be a JSON object"),
        ("parts.json", '{"scheme": "iid", "clients": 3}', "clients is 3; it must be a list"),
        ("parts.json", '{"scheme": "iid", "clients": [{"label": "a", "holds": 1}]}', "holds is 1"),
        ("state.json", "{", "damaged"),
    ],
)
def test_a_damaged_file_is_named(name: str, text: str, problem: str, tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    (directory / name).write_text(text)
    with pytest.raises(ReportError, match=re.escape(name)) as caught:
        write_report(directory)
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_unreadable_run_keeps_its_last_report(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    before = write_report(directory).read_bytes()
    (directory / "clients.jsonl").write_text("{")
    with pytest.raises(ReportError):
        write_report(directory)
    assert (directory / "report.html").read_bytes() == before


def test_the_report_of_many_clients_and_rounds_stays_small(tmp_path: Path) -> None:
    labels = tuple(f"partition {i:04d} of 100" for i in range(100))
    path = write_report(make_run(tmp_path / "run", 50, labels))
    assert path.stat().st_size < 1_000_000


def test_a_run_of_the_app_has_a_report(
    tiny: dict[str, Any], run_app: Callable[..., Path], tmp_path: Path
) -> None:
    directory = run_app(tiny | {"output-dir": str(tmp_path)})
    page = Page(directory / "report.html")
    assert "partition 0001 of 2" in page.text
    assert "No client was left out." in page.text
    assert ("http-equiv", "refresh") not in page.attributes


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 10.0, (0, 2, 4, 6, 8, 10)),
        (1.84, 4.19, (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)),
        (0.0, 0.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (3e6, 7e6, (3e6, 4e6, 5e6, 6e6, 7e6)),
    ],
)
def test_an_axis_has_round_ticks_around_its_values(
    low: float, high: float, ticks: tuple[float, ...]
) -> None:
    found = axis(low, high, tight=False)
    assert found.ticks == pytest.approx(ticks)
    assert found.low <= low <= high <= found.high
    assert found.position(found.high) == 1.0


@pytest.mark.parametrize(
    ("tokens", "loss"),
    [
        (0, 4.23),
        (1_638_400, 2.97),
        (1_638_400 / 2, (4.23 + 2.97) / 2),
        (1_638_400 * 1.25, 2.97 - 0.25 * 0.33),
        (1e12, 2.52),
    ],
)
def test_the_original_example_is_interpolated(tokens: float, loss: float) -> None:
    assert original_loss(tokens) == pytest.approx(loss)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no file '/home/me/my texts/a.txt' there", "no file 'a.txt' there"),
        ("no file /home/me/a.txt, sorry", "no file a.txt, sorry"),
        (r"no file C:\Users\me\a.txt", "no file a.txt"),
        ("see https://me:word@example.org/path", "see example.org/path"),
        ("24/7 and 1/2 stay, and so does and/or", "24/7 and 1/2 stay, and so does and/or"),
        ("2.5 MB/s", "2.5 MB/s"),
        ("x" * 1000, "x" * 299 + "…"),
    ],
)
def test_a_sentence_shows_no_directory(text: str, shown: str) -> None:
    assert sentence(text) == shown


def test_hostile_text_does_not_make_a_sentence_slow() -> None:
    for unit in ("/", "\\a", "a:/", "'/", "~/" * 3, "://"):
        assert len(sentence(unit * 1_000_000)) <= 300


def test_invisible_characters_are_shown() -> None:
    assert clean("a\x00\x1b\x7f\u202e\ud800b", 60) == "a␀␛␡\ufffd\ufffdb"
    assert clean("a\r\nb\tc", 60, lines=True) == "a\nb\tc"
    assert clean("a\nb", 60) == "a␊b"
    assert clean("نمی\u200cخواهم", 60) == "نمی\u200cخواهم"


def test_numbers_have_units() -> None:
    assert [count(n) for n in (0, 9_999, 10_000, 1_228_800, 2e12)] == [
        "0",
        "9,999",
        "10.0k",
        "1.23M",
        "2.00T",
    ]
    seconds = (0.04, 9.94, 59.4, 59.6, 260, 7500)
    assert [duration(s) for s in seconds] == [
        "0.0 s",
        "9.9 s",
        "59 s",
        "1 min 00 s",
        "4 min 20 s",
        "2 h 05 min",
    ]
    assert ranges([1, 2, 3, 7, 9, 10]) == "1–3, 7, 9–10"
