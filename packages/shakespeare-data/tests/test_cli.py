import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import shakespeare_data
from shakespeare_data import Corpus, read_part
from shakespeare_data.cli import main


@pytest.fixture
def corpus(make_corpus: Callable[..., Corpus]) -> Corpus:
    return make_corpus()


@pytest.fixture
def verses(tmp_path: Path, corpus: Corpus) -> str:
    """A file with the text of `corpus`."""
    path = tmp_path / "verses.txt"
    path.write_bytes(corpus.text.encode())
    return str(path)


def test_partition_writes_the_parts_and_prints_their_sizes(
    verses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "datasets"
    arguments = ["partition", "--num-partitions", "2", "--output", str(output)]
    assert main([*arguments, "--corpus", verses]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["directory", "train", "val"]
    for i, row in enumerate(rows):
        part = read_part(output / f"shakespeare_part_{i}")
        assert row.split() == [part.name, f"{len(part.train):,}", f"{len(part.val):,}"]
    assert len(rows) == 2


def test_an_empty_output_is_not_the_current_directory(
    verses: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["partition", "--num-partitions", "2", "--output", "", "--corpus", verses])
    assert "--output: it is empty" in capsys.readouterr().err


def test_info_says_what_the_corpus_is(
    verses: str, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--corpus", verses]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["name"] == verses
    assert facts["characters"] == f"{len(corpus.text):,}"
    assert facts["sha256"] == corpus.sha256
    assert facts["vocabulary"].startswith(f"{len(set(corpus.text))}: ")


def test_info_prints_that_a_fallback_was_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "NOT TINY SHAKESPEARE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "--corpus", "nowhere.txt"],
        ["partition", "--num-partitions", "0", "--output", "x", "--corpus", "VERSES"],
        ["partition", "--num-partitions", "9999", "--output", "x", "--corpus", "VERSES"],
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
    assert "example: shakespeare-data partition --num-partitions 2" in capsys.readouterr().out


def test_the_installed_command_tells_the_version() -> None:
    command = Path(sys.executable).with_name("shakespeare-data")
    told = subprocess.run([command, "--version"], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == shakespeare_data.__version__


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, shakespeare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
