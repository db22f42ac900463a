"""The setting `partition`: six schemes, their options, and who may see which text."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.composition import partition_scheme, parts, validation_text
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import SCHEMES, CharTokenizer, Corpus, load_corpus

SPECS = [
    "contiguous",
    "iid",
    "iid:100",
    "by-play",
    "by-speaker",
    "dirichlet:0.5",
    "dirichlet:alpha=1,by=speaker",
    "quantity-skew:0.5",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Four plays with four roles. No two places of the text have the same ten characters."""
    directory = tmp_path_factory.mktemp("plays")
    roles = ["ROMEO", "JULIET", "PARIS", "NURSE"]
    line = 0
    for play in range(4):
        speeches = []
        for speech in range(80):
            lines = []
            for _ in range(3):
                lines.append(f"line {line:06d} of {line:06d}")
                line += 1
            speeches.append(f"{roles[speech % 4]}:\n" + "\n".join(lines) + "\n")
        (directory / f"play {play}.txt").write_text("\n".join(speeches), encoding="utf-8")
    return load_corpus(str(directory))


def numbers(text: str) -> set[str]:
    """The numbers of the lines that are whole in a text. A line has its number twice."""
    return set(re.findall(r"line (\d{6}) of \1$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("spec", SPECS)
def test_no_client_trains_on_the_validation_text(spec: str, corpus: Corpus) -> None:
    settings = replace(Settings(), partition=spec, block_size=16)
    tokenizer = CharTokenizer.from_text(corpus.text)
    divided = parts(settings, corpus, tokenizer, 3)
    validation = numbers(validation_text(settings, corpus))
    trained = [numbers(tokenizer.decode(part.train)) for part in divided]
    validated = set().union(*(numbers(tokenizer.decode(part.val)) for part in divided))
    assert len(validation) > 50
    assert not validation & set().union(*trained)
    assert not validated & set().union(*trained)
    assert validated <= validation
    for i, one in enumerate(trained):
        assert one
        # A line at the border of two windows can be in both parts, but not as a whole.
        assert len(one & set().union(*trained[:i])) == 0


def test_all_schemes_are_tested() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(SCHEMES)


@pytest.mark.parametrize(
    ("spec", "scheme", "options"),
    [
        ("by-play", "by-play", {}),
        ("iid:50", "iid", {"window": 50}),
        ("dirichlet:0.5", "dirichlet", {"alpha": 0.5}),
        ("dirichlet:by=speaker,alpha=2", "dirichlet", {"by": "speaker", "alpha": 2.0}),
        ("quantity-skew:1", "quantity-skew", {"alpha": 1.0}),
    ],
)
def test_a_scheme_has_options(spec: str, scheme: str, options: dict[str, Any]) -> None:
    assert partition_scheme(replace(Settings(), partition=spec)) == (scheme, options)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("by-act", "the scheme must be one of contiguous, iid, by-play, by-speaker"),
        ("", "the scheme must be one of"),
        ("dirichlet:beta=1", "'beta=1' must set one of the options alpha (float)"),
        ("dirichlet:much", "'much' must set one of the options"),
        ("by-play:3", "'3' must set one of the options"),
    ],
)
def test_a_bad_scheme_is_refused(spec: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        partition_scheme(replace(Settings(), partition=spec))
    assert f"partition is {spec!r}; " in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize("spec", ["dirichlet:-1", "contiguous:alpha=1", "iid:0", "dirichlet:by=x"])
def test_a_bad_value_of_an_option_is_refused_before_the_run(spec: str, corpus: Corpus) -> None:
    settings = replace(Settings(), partition=spec, block_size=16)
    with pytest.raises(ValueError, match=r"alpha|window|by"):
        parts(settings, corpus, CharTokenizer.from_text(corpus.text), 2)


@pytest.mark.parametrize("spec", SPECS)
def test_the_partition_is_in_the_files_of_the_run(
    spec: str, corpus: Corpus, run_app: Callable[..., Path], tiny: dict[str, Any], tmp_path: Path
) -> None:
    text = {"corpus": str(corpus.name), "partition": spec, "output-dir": str(tmp_path)}
    short = {"num-server-rounds": 1, "max-steps": 2}
    directory = RunDirectory(run_app(tiny | short | text, 3))
    assert directory.read_json("config.json")["settings"]["partition"] == spec
    assert len(directory.read_lines("clients.jsonl")) == 3
