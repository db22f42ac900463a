"""The comparison of training alone, together and in one place."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nanogpt_flower import compare
from nanogpt_flower.compare import Arm, divided, losses, table, train_arm
from nanogpt_flower.report import ReportError, write_comparison
from nanogpt_flower.settings import Settings
from nanogpt_flower.trained import load_model


@pytest.fixture
def run_config(tiny: dict[str, Any]) -> dict[str, Any]:
    return tiny | {"max-steps": 10, "precision": "fp32"}


def client(label: str, alone: float, federated: float, one_place: float) -> dict[str, Any]:
    found = {"alone": alone, "federated": federated, "one_place": one_place}
    part = {"label": label, "holds": ["Cymbeline", "$x"] if label == "two" else []}
    return part | {"train": 1000, "val": 100, "own": found, "everybody": found}


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "preset": "quick",
        "partition": "by-play",
        "corpus": "/home/someone/secret/text.txt",
        "corpus_sha256": "ab" * 32,
        "settings": {"corpus": "/home/someone/secret/text.txt", "seed": 1},
        "machine": {"processor": "one", "cores": 2},
        "tokens_per_client": 1000,
        "bytes": 2_000_000,
        "seconds": {"federated": 60.0, "alone": 50.0, "one_place": 40.0},
        "clients": [client("<script>alert(1)</script>", 2.5, 2.0, 1.9), client("two", 2.0, 2.2, 2)],
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_federation_of_one_client_equals_one_place_to_rounding(
    optimizer: str,
    run_config: dict[str, Any],
    run_app: Callable[..., Path],
    tmp_path: Path,
) -> None:
    config = run_config | {"dropout": 0.1, "num-server-rounds": 3, "optimizer": optimizer}
    directory = run_app(config | {"output-dir": str(tmp_path)}, 1)
    federated, _ = load_model(directory)
    model, _ = train_arm(Arm(config, 1, None))
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(federated.state_dict()[name], weights, rtol=1e-4, atol=1e-6)
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    found = losses(model, Settings.from_run_config(config), divided(config, 1))
    assert found.everybody == pytest.approx(last["val_loss"], rel=1e-5)
    assert found.own == [pytest.approx(last["client_val_loss"], rel=1e-5)]


def test_one_place_sees_as_many_tokens_as_all_clients_together(
    run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[float] = []

    def train_part(*arguments: Any, **keywords: Any) -> dict[str, float]:
        metrics = train(*arguments, **keywords)
        tokens.append(metrics["tokens"])
        return metrics

    train = compare.train_part
    monkeypatch.setattr(compare, "train_part", train_part)
    train_arm(Arm(run_config, 3, 1))
    alone = sum(tokens)
    tokens.clear()
    train_arm(Arm(run_config, 3, None))
    assert sum(tokens) == 3 * alone


def test_arms_in_processes_give_the_losses_of_this_process(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    arms = [Arm(run_config, 2, 1), Arm(run_config, 2, None)]
    found = compare._run_arms(arms, tmp_path / "events", Console(file=(tmp_path / "out").open("w")))
    settings = Settings.from_run_config(run_config)
    for arm, (result, seconds) in zip(arms, found, strict=True):
        here = losses(train_arm(arm)[0], settings, divided(run_config, 2))
        assert result.own == pytest.approx(here.own, rel=1e-5)
        assert result.everybody == pytest.approx(here.everybody, rel=1e-5)
        assert seconds > 0
    assert "step 10/10" in (tmp_path / "run.log").read_text()
    assert not (tmp_path / "events").exists()


def test_the_table_has_the_gain_of_each_client_and_the_answer(result: dict[str, Any]) -> None:
    lines = table(result).splitlines()
    own, everybody = ["2.5000", "2.0000", "+0.5000", "1.9000"], ["2.5000", "2.0000", "1.9000"]
    assert lines[2].split()[-7:] == own + everybody
    assert lines[4].split()[:5] == ["mean", "2.2500", "2.1000", "+0.1500", "1.9500"]
    assert lines[5] == "client 1: Cymbeline, $x"
    assert " ".join(lines[6:]) == (
        "Taking part gave 1 of 2 clients a lower loss on their own text. On average the loss fell "
        "by 0.1500. On everybody's text, the federated loss is 0.1500 above that of all text in "
        "one place."
    )
    assert max(map(len, lines)) < 80


def test_the_picture_is_a_png(result: dict[str, Any]) -> None:
    assert compare.picture(result).startswith(b"\x89PNG")


class Text(HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_escapes_labels_and_shows_no_directories(
    result: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(result))
    page = write_comparison(tmp_path).read_text()
    found = Text(page)
    assert "script" not in found.tags
    assert "<script>alert(1)</script>" in found.texts
    assert "+0.5000" in found.texts
    assert found.texts.count("Cymbeline, $x") == 3  # in the table and in two charts
    assert "secret" not in page
    assert "http:" not in page
    assert "https:" not in page


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(ReportError, match=r"comparison\.json is missing or damaged"):
        write_comparison(tmp_path)
