import errno
import hashlib
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nanogpt_flower
from gpt_core import GPT, GPTConfig, Runtime
from nanogpt_flower.artifacts import (
    MODEL_DIRECTORY,
    TOKENIZER_FILE,
    RunDirectory,
    new_run_name,
    writable_directory,
)
from nanogpt_flower.cli import main
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, load_corpus


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(str(tmp_path / "runs"), "42")


@pytest.fixture
def small_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=4, block_size=8, n_layer=1, n_head=1, n_embd=8))


@pytest.fixture
def finished(directory: RunDirectory, small_model: GPT) -> RunDirectory:
    """A run directory with a model whose characters are "abcd"."""
    directory.save_model(small_model, CharTokenizer("abcd"))
    return directory


@pytest.fixture
def runtime() -> Runtime:
    return Runtime.resolve(device="cpu")


def files_in(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*") if found.is_file())


def test_a_new_run_directory_is_empty_and_named_after_the_run(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path / "deep" / "runs"), "42")
    assert directory.path == tmp_path / "deep" / "runs" / "42"
    assert list(directory.path.iterdir()) == []


def test_a_directory_that_holds_a_run_is_not_used_for_another_run(directory: RunDirectory) -> None:
    directory.checkpoints.mkdir()
    with pytest.raises(SettingsError, match=r"run-name is '42', but the directory .* holds a run"):
        RunDirectory.create(str(directory.path.parent), "42")


def test_runs_of_the_same_minute_have_different_names(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        names.append(new_run_name(tmp_path, "quick"))
        (tmp_path / names[-1]).mkdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{4}-quick", names[0])
    assert len(set(names)) == 3
    assert names[2].endswith("-quick-3") or names[1].endswith("-quick")  # a minute may pass


def test_the_check_for_writing_leaves_the_users_files_alone(tmp_path: Path) -> None:
    for name in (".writable", "notes.txt"):
        (tmp_path / name).write_text("mine")
    assert writable_directory(str(tmp_path)) == tmp_path
    assert files_in(tmp_path) == [".writable", "notes.txt"]
    assert (tmp_path / ".writable").read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "file/runs", "nul\0", "~nobody-has-this-name/runs"])
def test_a_directory_that_cannot_be_written_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    output_dir = name if name.startswith("~") else f"{tmp_path}/{name}"
    with pytest.raises(SettingsError) as caught:
        RunDirectory.create(output_dir, "1")
    named = f"output-dir is {output_dir!r}; it must be a directory that can be written"
    assert str(caught.value).startswith(named)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_without_permission_to_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(SettingsError, match="cannot be written: Permission denied"):
        writable_directory(str(tmp_path))


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_without_checkpoints_cannot_be_resumed(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "7"
    if exists:
        path.mkdir()
    with pytest.raises(SettingsError, match=r"resume-from is '.*/7'; .* has no checkpoints"):
        RunDirectory.resume(Settings(resume_from=str(path)), None)


def test_a_run_without_a_config_can_be_resumed(directory: RunDirectory) -> None:
    directory.checkpoints.mkdir()
    resumed = RunDirectory.resume(Settings(resume_from=str(directory.path)), None)
    assert resumed.path == directory.path
    assert resumed.checkpoints == directory.path / "checkpoints"


def test_a_run_is_resumed_only_with_a_model_of_the_same_size(
    directory: RunDirectory, runtime: Runtime, small_model: GPT
) -> None:
    directory.checkpoints.mkdir()
    settings = Settings(resume_from=str(directory.path))
    directory.write_config(settings, None, runtime, small_model)
    assert RunDirectory.resume(replace(settings, max_steps=7), None).path == directory.path
    changes = "n-layer is 2 but was 6, n-embd is 192 but was 384"
    with pytest.raises(SettingsError, match=f"a model of another size: {changes}"):
        RunDirectory.resume(replace(settings, n_layer=2, n_embd=192), None)


def test_a_run_is_resumed_only_with_the_same_text(
    directory: RunDirectory, runtime: Runtime, small_model: GPT, text_file: Path, tmp_path: Path
) -> None:
    directory.checkpoints.mkdir()
    corpus = load_corpus(str(text_file))
    other = tmp_path / "other.txt"
    other.write_text(corpus.text.upper(), encoding="utf-8")
    settings = Settings(resume_from=str(directory.path))
    directory.write_config(settings, corpus, runtime, small_model)
    assert RunDirectory.resume(settings, corpus).path == directory.path
    for text in (load_corpus(str(other)), None):
        with pytest.raises(SettingsError, match=f"had another text: .* was {corpus.sha256}"):
            RunDirectory.resume(settings, text)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_config_is_moved_aside_and_the_run_can_be_resumed(
    content: str, directory: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    directory.checkpoints.mkdir()
    config = directory.path / "config.json"
    config.write_text(content)
    logging.getLogger("flwr").propagate = True
    resumed = RunDirectory.resume(Settings(resume_from=str(directory.path)), None)
    assert resumed.path == directory.path
    assert f"{config} is damaged and is now" in caplog.text
    assert (directory.path / "damaged-config.json").read_text() == content
    assert not config.exists()


def test_the_config_has_settings_corpus_device_and_versions(
    directory: RunDirectory, runtime: Runtime, small_model: GPT, text_file: Path
) -> None:
    corpus = load_corpus(str(text_file))
    directory.write_config(Settings(seed=7), corpus, runtime, small_model)
    config = json.loads((directory.path / "config.json").read_text())
    assert config["settings"] == Settings(seed=7).to_run_config()
    assert config["parameters"] == small_model.num_parameters()
    assert config["corpus"]["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert config["server"]["device"] == "cpu"
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["nanogpt-flower"] == nanogpt_flower.__version__


def test_files_are_replaced_and_no_temporary_file_is_left(directory: RunDirectory) -> None:
    for text in ("first, and longer", "second"):
        directory.write_sample(text)
    directory.write_lines("metrics.jsonl", [{"round": 0}, {"round": 1}])
    directory.draw_curve([(0, 4.0), (1, 2.0)], [(1, 2.5)])
    assert files_in(directory.path) == ["curve.png", "metrics.jsonl", "sample.txt"]
    assert (directory.path / "sample.txt").read_text() == "second"
    assert (directory.path / "metrics.jsonl").read_text() == '{"round": 0}\n{"round": 1}\n'
    assert (directory.path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_metric_that_is_not_a_number_is_refused(directory: RunDirectory) -> None:
    """JSON has no NaN, so many programs could not read the file."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        directory.write_lines("metrics.jsonl", [{"val_loss": float("nan")}])


@pytest.mark.parametrize("inside", ["", "model"])
def test_the_sample_command_prints_the_prompt_and_as_many_characters_as_asked(
    finished: RunDirectory, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(finished.path / inside)
    assert main(["sample", path, "--prompt", "abba", "--tokens", "30"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("abba")
    assert len(printed.rstrip("\n")) == 4 + 30
    assert set(printed.rstrip("\n")) <= set("abcd")


def test_equal_seeds_give_equal_samples(
    finished: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for seed in ("1", "1", "2"):
        main(["sample", str(finished.path), "--tokens", "30", "--seed", seed])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_without_a_prompt_a_sample_starts_with_a_character_of_the_text(
    finished: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(finished.path), "--tokens", "5"]) == 0
    printed = capsys.readouterr().out  # the text has no line break
    assert printed.startswith("a")
    assert len(printed.rstrip("\n")) == 1 + 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", "abe"], "'e'"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--device", "gpu"], "device is 'gpu'"),
    ],
)
def test_a_bad_option_of_the_sample_command_is_explained_in_one_line(
    finished: RunDirectory, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = ["sample", str(finished.path), "--prompt", "a", "--tokens", "5"]
    assert main([*defaults, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("nanogpt-flower: error: ")
    assert named in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("option", ["--tokens", "--top-k", "--seed"])
@pytest.mark.parametrize("value", ["-1", "99999999999999999999", "few"])
def test_a_number_out_of_range_is_refused_with_its_option(
    finished: RunDirectory, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(finished.path), option, value]) == 2
    printed = capsys.readouterr()
    assert option in printed.err
    assert value in printed.err
    assert printed.out == ""


def test_a_directory_without_a_model_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "config.json" in message
    assert message.count("\n") == 1


def test_a_model_with_the_tokenizer_of_another_text_is_refused(
    finished: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    CharTokenizer("abcde").save(finished.path / MODEL_DIRECTORY / TOKENIZER_FILE)
    assert main(["sample", str(finished.path)]) == 2
    assert "has 5 characters, but the model beside it has 4" in capsys.readouterr().err
