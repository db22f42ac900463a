"""The sub-commands that read a finished run, and their help. test_launch.py tests `run`."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanogpt_flower.cli import app, main
from nanogpt_flower.preset import all_presets, preset_named
from nanogpt_flower.settings import Settings, SettingsError
from nanogpt_flower.trained import evaluate_run

COMMANDS = ["run", "resume", "presets", "runs", "sample", "chat", "eval", "report", "compare"]
COMMANDS += ["credentials", "node", "policy"]


@pytest.fixture(scope="module")
def finished(
    tiny: dict[str, Any],
    run_app: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The directory of a finished run, in a directory with this run alone."""
    output = tmp_path_factory.mktemp("out")
    return run_app(tiny | {"output-dir": str(output), "run-name": "2026-11-24-2215-tiny"})


def last_loss(directory: Path) -> float:
    line = (directory / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(line)["val_loss"])


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert main(list(map(str, arguments))) == status
    return capsys.readouterr().out


def test_the_commands_are_those_that_the_readme_names() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert sorted(names) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"nanogpt-flower {command}" in printed(capsys, command, "--help").split("Usage")[-1][20:]


def test_eval_gives_the_loss_of_the_last_round(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = last_loss(finished)
    assert evaluate_run(finished).loss == pytest.approx(loss, rel=1e-6)
    lines = printed(capsys, "eval", "latest", "--output-dir", finished.parent).splitlines()
    assert lines[1].split()[1] == f"{loss:.4f}"
    assert lines[2].split()[-1] == f"{loss / math.log(2):.4f}"
    assert lines[3].split()[-1] == f"{math.exp(loss):.2f}"


def test_eval_of_another_text_reads_all_of_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("to be\nor not\n" * 30)
    assert "389 characters" in printed(capsys, "eval", finished, "--text", text)


def test_eval_of_a_text_with_unknown_characters_names_one(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "other.txt"
    text.write_text("to be\n#")
    assert main(["eval", str(finished), "--text", str(text)]) == 2
    message = capsys.readouterr().err
    assert "'#'" in message
    assert message.count("\n") == 1


def test_eval_refuses_a_text_that_has_changed(
    tiny: dict[str, Any], text_file: Path, run_app: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    settings = {"num-server-rounds": 1, "max-steps": 1, "output-dir": str(tmp_path / "out")}
    directory = run_app(tiny | settings | {"corpus": str(text)})
    text.write_bytes(text_file.read_bytes()[::-1])
    with pytest.raises(SettingsError, match="has changed since the run"):
        evaluate_run(directory)


def test_chat_writes_a_text_for_each_prompt_until_the_input_ends(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("my lord\n#\nsweet\n"))
    options = ["--tokens", "7", "--seed", "1", "--top-p", "0.9", "--int8"]
    assert main(["chat", str(finished), *options]) == 0
    captured = capsys.readouterr()
    out = captured.out
    assert out.startswith("my lord")
    second = out.index("sweet", len("my lord") + 7)
    assert second == len("my lord") + 7 + 1  # the prompt, 7 characters and a line end
    assert "'#'" in captured.err


def test_int8_writes_almost_the_same_as_float(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["sample", finished, "--tokens", 20, "--temperature", 0, "--prompt", "my"]
    assert printed(capsys, *options)[:5] == printed(capsys, *options, "--int8")[:5]


def test_runs_shows_when_text_rounds_loss_and_state(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, line = printed(capsys, "runs", "--output-dir", finished.parent).splitlines()
    assert header.split() == ["run", "when", "preset", "text", "rounds", "loss", "state"]
    cells = line.split()
    assert cells[0] == "2026-11-24-2215-tiny"
    assert cells[3:] == ["-", "text.txt", "2/2", f"{last_loss(finished):.4f}", "completed"]


def test_without_runs_the_command_says_how_to_start_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nanogpt-flower run quick" in printed(capsys, "runs", "--output-dir", tmp_path)


def test_report_writes_the_page_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = finished / "report.html"
    page.unlink()
    assert printed(capsys, "report", finished) == f"{page}\n"
    assert "completed" in page.read_text()


@pytest.mark.parametrize("command", ["sample", "chat", "eval", "report", "resume"])
def test_an_unknown_run_is_refused_with_the_newest_runs(
    command: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "nowhere", "--output-dir", str(finished.parent)]) == 2
    message = capsys.readouterr().err
    assert "the run is 'nowhere'; it must be 'latest', the path of a run" in message
    assert "2026-11-24-2215-tiny" in message


def test_presets_are_shown_with_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "presets")
    for preset in all_presets().values():
        assert f"{preset.name}: {preset.summary}" in text
        assert f"{preset.val_loss:.2f} on Tiny Shakespeare" in text
        assert preset.minutes
        for machine in preset.minutes:
            assert machine in text
    assert "0.80M parameters" in text
    assert "10.65M parameters" in text
    assert f"{2 * 4 * 200 * 12 * 64:,} of all clients" in text


def test_each_file_of_settings_is_a_preset_and_valid() -> None:
    folder = Path(preset_named.__code__.co_filename).with_name("presets")
    files = {path.stem for path in folder.glob("*.toml")} - {"measured"}
    assert files == set(all_presets())
    assert preset_named("quick").settings.optimizer == "muon"
    assert preset_named("original").settings == Settings()


def test_original_has_the_ten_values_of_the_example_and_no_others() -> None:
    example = {
        "num-server-rounds": 5,
        "local-epochs": 1,
        "max-steps": 50,
        "learning-rate": 1e-3,
        "batch-size": 64,
        "block-size": 256,
        "n-layer": 6,
        "n-head": 6,
        "n-embd": 384,
        "dropout": 0.2,
    }
    assert preset_named("original").run_config == example


def test_each_line_of_a_preset_has_a_comment() -> None:
    folder = Path(preset_named.__code__.co_filename).with_name("presets")
    for path in folder.glob("*.toml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert path.stem == "measured" or "#" in line, f"{path.name}: {line}"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version").strip().count(".") == 2


def test_an_unknown_option_is_refused_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--colour"]) == 2
    assert "--colour" in capsys.readouterr().err


def test_the_printed_policy_is_a_policy_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policy"]) == 0
    (tmp_path / "policy.toml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["policy", "--check", str(tmp_path / "policy.toml")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'policy.toml'} is a sound policy\n"


def test_a_policy_file_with_an_unknown_key_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policy.toml").write_text("max-round = 3", encoding="utf-8")
    assert main(["policy", "--check", str(tmp_path / "policy.toml")]) == 2
    assert "max-round is unknown, should be one of messages" in capsys.readouterr().err


def test_a_run_that_the_policy_forbids_is_refused_before_it_starts(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{key}={value}" for key, value in tiny.items()]
    given += ["batch-size=1", f"output-dir={tmp_path / 'runs'}"]
    assert main(["run", "--deploy", *given]) == 2
    assert "batch-size is 1, this client allows 8 to 512" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_policy_is_for_a_deployment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--policy", str(tmp_path / "policy.toml")]) == 2
    assert "--policy is for --deploy" in capsys.readouterr().err
