import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord

from flower_adapter import Checkpoint
from gpt_core import GPT, GPTConfig, Runtime
from nanogpt_flower.artifacts import CHECKPOINTS, RunDirectory
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


def test_the_directory_of_a_resumed_run_needs_checkpoints(tmp_path: Path) -> None:
    old = tmp_path / "runs" / "7"
    for path in (old, tmp_path / "nowhere"):
        with pytest.raises(SettingsError, match=r"resume-from is '.*/(7|nowhere)'; .* no checkp"):
            RunDirectory.resume(Settings(resume_from=str(path)))
    (old / CHECKPOINTS).mkdir(parents=True)
    assert RunDirectory.resume(Settings(resume_from=str(old))).checkpoints == old / CHECKPOINTS


def test_a_run_is_not_resumed_with_another_model(directory: RunDirectory) -> None:
    directory.checkpoints.mkdir()
    settings = Settings(resume_from=str(directory.path))
    runtime = Runtime.resolve(device="cpu")
    directory.write_config(settings, None, runtime, GPT(GPTConfig(n_layer=1)))
    assert RunDirectory.resume(settings).path == directory.path
    with pytest.raises(SettingsError, match=r"another model: n-layer is 2, was 6, n-embd is 192"):
        RunDirectory.resume(replace(settings, n_layer=2, n_embd=192))


def checkpoint(*rounds: tuple[float | None, float | None, float | None, int]) -> Checkpoint:
    """A run whose round 0 has a loss of 4; then train, server's and clients' loss, and replies."""

    def by_round(name: str, index: int) -> dict[int, MetricRecord]:
        found = enumerate((row[index] for row in rounds), start=1)
        return {at: MetricRecord({name: value}) for at, value in found if value is not None}

    train = by_round("train-loss", 0)
    for at, (*_, replies) in enumerate(rounds, start=1):
        train.setdefault(at, MetricRecord())["num-replies"] = replies
    return Checkpoint(
        run="1",
        resumed=[],
        server_round=len(rounds),
        arrays=ArrayRecord(),
        model={},
        strategy=[],
        random_states={},
        train_metrics=train,
        evaluate_metrics=by_round("val-loss", 2),
        server_metrics={0: MetricRecord({"val-loss": 4.0}), **by_round("val-loss", 1)},
    )


def rows_of(directory: RunDirectory) -> list[dict[str, float | None]]:
    lines = (directory.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_rounds_are_printed_written_and_drawn(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History(directory, note="figures are of another corpus")
    history.show(checkpoint())
    history.show(checkpoint((1.5, 2.0, 2.5, 3)))
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


def test_a_resumed_run_shows_and_writes_the_rounds_before_too(
    directory: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = [(1.5, 2.0, 2.5, 3), (1.25, 1.75, 2.25, 2), (None, 1.75, None, 0)]
    whole, resumed = History(directory), History(RunDirectory.create(str(tmp_path), 43))
    for end in range(4):
        whole.show(checkpoint(*rounds[:end]))
    printed = capsys.readouterr().out
    for end in (2, 3):
        resumed.show(checkpoint(*rounds[:end]))
    assert capsys.readouterr().out == printed
    assert rows_of(resumed.directory) == rows_of(directory)
    assert [row["clients"] for row in rows_of(directory)] == [0, 3, 2, 0]


def test_without_the_servers_text_the_clients_figure_is_shown(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    without = checkpoint((None, None, 2.0, 2))
    without.server_metrics.clear()
    History(directory).show(without)
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
