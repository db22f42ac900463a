"""Checks that `nanogpt-flower run` makes before it starts any program of Flower."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.cli import main
from nanogpt_flower.composition import parts
from nanogpt_flower.interrupts import ENDING_SIGNALS
from nanogpt_flower.local import launch
from nanogpt_flower.local.launch import Launch, alone_in, write_parts
from nanogpt_flower.preset import all_presets
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import CharTokenizer, load_corpus

MORE_THAN_HERE = 1_000_000
RUNTIMES = [[], ["--deploy"]]


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """The run configs of the runs that `main` started. The runs themselves are replaced."""
    run_configs: list[dict[str, Any]] = []

    def record(launch: Launch, console: Console, *, verbose: bool) -> Path:
        run_configs.append(launch.run_config)
        return tmp_path

    monkeypatch.setattr(launch, "run", record)
    handlers = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    yield run_configs
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def arguments(text_file: Path, tmp_path: Path) -> list[str]:
    """Overrides that fit on this machine."""
    overrides = {"corpus": text_file, "block-size": 16, "output-dir": tmp_path / "runs"}
    return ["original", *(f"{key}={value}" for key, value in overrides.items())]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("n-layers=3", "n-layers is not a setting of this app"),
        ("n-head=5", "n-embd is 384; it must be divisible by n-head, which is 5"),
        ("batch-size=0", "batch-size is 0; it must be a whole number of at least 1"),
        ("corpus=hamlet", "corpus 'hamlet'"),
        ("device=gpu", "device is 'gpu'"),
        ("sample-prompt=#", "sample-prompt is '#'"),
        ("block-size=400", "block-size 400"),
        ("n-layer", "the override is 'n-layer'; it must be key=value"),
        ("=3", "the override is '=3'; it must be key=value"),
        ("resume-from=/nowhere", "resume-from is '/nowhere'; it must be the directory of a run"),
        ("client-state=~nobody-has-this-name", "client-state is '~nobody-has-this-name'"),
    ],
)
def test_a_bad_setting_is_explained_in_one_line_before_anything_starts(
    runtime: list[str],
    override: str,
    problem: str,
    arguments: list[str],
    started: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", *arguments, override, *runtime]) == 2
    message = capsys.readouterr().err
    assert message.startswith("nanogpt-flower: error: ")
    assert problem in message
    assert message.count("\n") == 1
    assert started == []


def test_an_unknown_preset_is_refused_with_the_known_ones(
    started: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "slow"]) == 2
    message = capsys.readouterr().err
    known = ", ".join(all_presets())
    assert message == (f"nanogpt-flower: error: the preset is 'slow'; it must be one of {known}\n")
    assert started == []


def test_an_output_directory_that_is_a_file_is_refused_and_kept(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("mine")
    assert main(["run", *arguments]) == 2
    assert "must be a directory that can be written" in capsys.readouterr().err
    assert (tmp_path / "runs").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--clients", "0"], "--clients is 0; it must be at least 1"),
        (["--cpus", str(MORE_THAN_HERE)], f"--cpus is {MORE_THAN_HERE}"),
        (["--cpus", "0"], "--cpus is 0; it must be from 1 to"),
        (["--gpus", "1000"], "--gpus is 1000; it must be from 0 to"),
        (["--gpus", "-1"], "--gpus is -1; it must be from 0 to"),
        (["--gpus", "nan"], "--gpus is nan; it must be from 0 to"),
        (["--deploy", "--gpus", "0.5"], "--gpus is for simulated clients"),
        (["--deploy", "--cpus", "1"], "--cpus is for simulated clients"),
    ],
)
def test_resources_that_this_machine_does_not_have_are_refused(
    options: list[str],
    problem: str,
    arguments: list[str],
    started: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", *arguments, *options]) == 2
    assert problem in capsys.readouterr().err
    assert started == []


def test_the_first_round_waits_for_all_clients(
    arguments: list[str], started: list[dict[str, Any]]
) -> None:
    assert main(["run", *arguments, "--clients", "3"]) == 0
    assert main(["run", *arguments, "--clients", "3", "min-clients=2"]) == 0
    assert [run_config["min-clients"] for run_config in started] == [3, 2]
    assert [run_config["min-replies"] for run_config in started] == [2, 2]


def test_overrides_change_the_preset_and_shells_may_remove_their_quotes(
    arguments: list[str], started: list[dict[str, Any]]
) -> None:
    quick = ["quick" if argument == "original" else argument for argument in arguments]
    overrides = ["dropout=0.1", "optimizer=adamw", 'uplink="2-bit"', "sample-prompt=my lord"]
    assert main(["run", *quick, *overrides]) == 0
    settings = Settings.from_run_config(started[0])
    assert (settings.n_layer, settings.max_steps) == (4, 200)  # of the preset
    assert (settings.dropout, settings.optimizer) == (0.1, "adamw")
    assert (settings.uplink, settings.sample_prompt) == ("2-bit", "my lord")


def test_the_quick_preset_is_used_if_none_is_named(
    arguments: list[str], started: list[dict[str, Any]]
) -> None:
    arguments.remove("original")
    assert main(["run", *arguments]) == 0
    assert Settings.from_run_config(started[0]).n_layer == 4


def test_paths_become_absolute(
    arguments: list[str],
    text_file: Path,
    tmp_path: Path,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The SuperLink works in another directory than the user."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_bytes(text_file.read_bytes())
    relative = ["corpus=mine.txt", "output-dir=out", "client-state=clients"]
    assert main(["run", *arguments, *relative]) == 0
    expected = {"corpus": "mine.txt", "output-dir": "out", "client-state": "clients"}
    for key, name in expected.items():
        assert started[0][key] == str(tmp_path / name)


def test_the_name_of_a_corpus_is_not_taken_for_a_path(
    arguments: list[str],
    tmp_path: Path,
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    assert main(["run", *arguments, "corpus=none", "--deploy"]) == 0
    assert started[0]["corpus"] == "none"


def test_simulated_clients_need_a_text(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments, "corpus=none"]) == 2
    assert "corpus is 'none', but simulated clients have no text" in capsys.readouterr().err


def test_a_run_cannot_wait_for_more_clients_than_it_has(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments, "min-clients=3"]) == 2
    assert "min-clients is 3; it must be at most 2" in capsys.readouterr().err


def test_only_one_program_runs_in_a_directory(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with (
        alone_in(directory),
        pytest.raises(SettingsError, match="a run is in progress in"),
        alone_in(directory),
    ):
        pass
    with alone_in(directory):
        pass


@pytest.mark.parametrize(
    ("spec", "holds"),
    [
        ("contiguous", [[], []]),
        ("by-play", [["Long"], ["Short"]]),
        ("by-speaker", [["ROMEO"], ["PARIS"]]),
        ("dirichlet:1e9,by=speaker", [["PARIS", "PARIS", "ROMEO", "1 more"]] * 2),
    ],
)
def test_the_parts_name_their_plays_or_roles(
    spec: str, holds: list[list[str]], tmp_path: Path
) -> None:
    for title, number in (("Long", 60), ("Short", 40)):
        speeches = "ROMEO:\nMy lord.\n\nPARIS:\nGood night, good night.\n\n"
        (tmp_path / f"{title}.txt").write_text(speeches * number, encoding="utf-8")
    settings = Settings(partition=spec, block_size=16)
    corpus = load_corpus(str(tmp_path))
    divided = parts(settings, corpus, CharTokenizer.from_text(corpus.text), 2)
    write_parts(Launch("quick", {}), RunDirectory(tmp_path), divided)
    clients = RunDirectory(tmp_path).read_json("parts.json")["clients"]
    assert sorted(client["holds"] for client in clients) == sorted(holds)
