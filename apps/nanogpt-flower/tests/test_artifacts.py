import json
import math
from pathlib import Path

import pytest
import torch
from flwr.app import MetricRecord, RecordDict

from gpt_core import GPT, GPTConfig, Runtime
from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.cli import main
from nanogpt_flower.history import History
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, load_corpus


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(str(tmp_path / "runs"), 42)


@pytest.fixture
def saved(directory: RunDirectory) -> RunDirectory:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=4, block_size=8, n_layer=1, n_head=1, n_embd=8))
    directory.save_model(model, CharTokenizer("abcd"))
    return directory


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"output-dir is '.*/file'; it must be a directory"):
        RunDirectory.create(str(tmp_path / "file"), 1)


def test_rounds_are_averaged_printed_written_and_drawn(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History(directory, note="figures are of another corpus")
    history.finish_round(0, 4.0)
    replies = [
        RecordDict({"metrics": MetricRecord({"train-loss": loss, "num-examples": weight})})
        for loss, weight in ((3.0, 1), (1.0, 3))
    ]
    history.aggregate("train-loss")(replies, "num-examples")
    history.finish_round(1, 2.0)
    printed = capsys.readouterr().out.splitlines()
    assert printed == history.table().splitlines()[:-1]
    assert printed[2].split() == ["1", "1.5000", "2.0000", "7.39"]
    assert history.table().endswith("note: figures are of another corpus")
    written = (directory.path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert [row["round"] for row in rows] == [0, 1]
    assert rows[1]["train_loss"] == pytest.approx((3.0 * 1 + 1.0 * 3) / 4)
    assert rows[1]["perplexity"] == pytest.approx(math.exp(2.0))
    assert (directory.path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_the_servers_text_the_clients_figure_is_shown(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History(directory)
    history.finish_round(0, None)
    reply = RecordDict({"metrics": MetricRecord({"val-loss": 2.0, "num-examples": 5})})
    history.aggregate("val-loss")([reply], "num-examples")
    history.finish_round(1, None)
    _, before, after = capsys.readouterr().out.splitlines()
    assert before.split() == ["0", "-", "-", "-"]
    assert after.split() == ["1", "-", "2.0000", "7.39"]


def test_the_config_holds_what_the_figures_depend_on(
    directory: RunDirectory, text_file: Path
) -> None:
    corpus = load_corpus(str(text_file))
    model = GPT(GPTConfig(n_layer=1))
    directory.write_config(Settings(seed=7), corpus, Runtime.resolve(device="cpu"), model)
    about = json.loads((directory.path / "config.json").read_text())
    assert about["settings"] == Settings(seed=7).to_run_config()
    assert about["corpus"]["sha256"] == corpus.sha256
    assert about["server"]["device"] == "cpu"
    assert about["server"]["precision"] in ("fp32", "bf16")
    assert about["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("inside", ["", "model"])
def test_sampling_writes_the_prompt_and_as_many_characters(
    saved: RunDirectory, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", str(saved.path / inside), "--prompt", "abba", "--tokens", "30"]
    assert main([*arguments, "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("abba")
    assert len(first.rstrip("\n")) == 34
    main([*arguments, "--seed", "1"])
    assert capsys.readouterr().out == first
    main([*arguments, "--seed", "2"])
    assert capsys.readouterr().out != first


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", "abe"], "'e'"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--device", "gpu"], "device is 'gpu'"),
    ],
)
def test_a_bad_sampling_request_is_one_line(
    saved: RunDirectory, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = ["sample", str(saved.path), "--prompt", "a", "--tokens", "5"]
    assert main([*defaults, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("nanogpt-flower: error: ")
    assert named in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("option", ["--tokens", "--top-k", "--seed"])
@pytest.mark.parametrize("value", ["-1", "99999999999999999999", "few"])
def test_a_number_out_of_range_is_named_with_its_option(
    saved: RunDirectory, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sample", str(saved.path), option, value])
    told = capsys.readouterr()
    assert f"argument {option}: it is '{value}'; it must be a whole number from 0" in told.err
    assert told.out == ""


def test_sampling_without_a_prompt_fits_every_text(
    saved: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(saved.path), "--tokens", "5"]) == 0
    assert len(capsys.readouterr().out.rstrip("\n")) == 6


def test_sampling_from_no_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(tmp_path)]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
