"""What is refused before any program of Flower starts."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanogpt_flower import local

MORE_THAN_HERE = 1_000_000


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("simulate", "deploy"):
        monkeypatch.setattr(local, name, lambda *_: pytest.fail("a federation was started"))
    handlers = {number: signal.getsignal(number) for number in local.ENDING_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def arguments(app_directory: Path, text_file: Path, tmp_path: Path) -> list[str]:
    settings = {"corpus": text_file, "block-size": 16, "output-dir": tmp_path / "runs"}
    return [*(f"{key}={value}" for key, value in settings.items()), "--app", str(app_directory)]


@pytest.mark.parametrize("runtime", ["simulate", "deploy"])
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("n-layers=3", "n-layers is no setting of this app"),
        ("n-head=5", "n-embd is 384; it must be divisible by n-head, which is 5"),
        ("batch-size=0", "batch-size is 0; it must be a whole number of at least 1"),
        ("corpus=hamlet", "corpus 'hamlet' is neither 'auto'"),
        ("device=gpu", "device is 'gpu'"),
        ("sample-prompt=#", "sample-prompt is '#'"),
        ("block-size=400", "the text allows at most 1 clients"),
        ("n-layer", "the override is 'n-layer'; it must be key=value"),
    ],
)
def test_what_cannot_work_is_one_line(
    runtime: str,
    override: str,
    told: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert local.main([runtime, "full", *arguments[:-2], override, *arguments[-2:]]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"{runtime}: error: ")
    assert told in message
    assert message.count("\n") == 1


def test_an_output_that_cannot_be_written_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("mine")
    assert local.main(["simulate", "full", *arguments]) == 1
    assert "must be a directory that can be written" in capsys.readouterr().err
    assert (tmp_path / "runs").read_text() == "mine"


@pytest.mark.parametrize(
    ("runtime", "options", "told"),
    [
        ("simulate", ["--num-clients", "0"], "--num-clients is 0; it must be at least 1"),
        ("simulate", ["--cpus", str(MORE_THAN_HERE)], f"--cpus is {MORE_THAN_HERE}"),
        ("simulate", ["--cpus", "0"], "--cpus is 0; it must be from 1 to"),
        ("simulate", ["--gpus", "1000"], "--gpus is 1000; it must be from 0 to"),
        ("simulate", ["--gpus", "-1"], "--gpus is -1; it must be from 0 to"),
        ("deploy", ["--gpus", "0.5"], "--gpus is for simulate"),
        ("deploy", ["--cpus", "1"], "--cpus is for simulate"),
    ],
)
def test_a_share_that_this_machine_cannot_give_is_named(
    runtime: str,
    options: list[str],
    told: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        local.main([runtime, "full", *arguments, *options])
    assert told in capsys.readouterr().err


def test_all_clients_must_have_joined_before_the_first_round(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(local, "simulate", lambda _, config, options: started.append(config))
    assert local.main(["simulate", "full", *arguments, "--num-clients", "3"]) == 0
    assert started[0]["min-clients"] == 3
