"""Texts that are too small for a preset."""

from pathlib import Path
from typing import Any

import pytest

from nanogpt_flower.composition import parts
from nanogpt_flower.fit import fit
from nanogpt_flower.preset import preset_named
from nanogpt_flower.settings import Settings
from shakespeare_data import CharTokenizer, Corpus, DataError, load_corpus

QUICK = preset_named("quick").run_config


@pytest.fixture
def corpus_of(tmp_path: Path) -> Any:
    def make(text: str) -> Corpus:
        path = tmp_path / "my.txt"
        path.write_text(text, encoding="utf-8")
        return load_corpus(str(path))

    return make


def fits(corpus: Corpus, block_size: int, clients: int) -> bool:
    settings = Settings.from_run_config({**QUICK, "block-size": block_size})
    try:
        parts(settings, corpus, CharTokenizer.from_text(corpus.text), clients)
    except DataError:
        return False
    return True


def test_a_text_that_is_large_enough_changes_nothing(corpus_of: Any) -> None:
    assert fit(QUICK, corpus_of("to be or not " * 4000), 2, frozenset()) == ({}, [])


def test_a_note_says_how_often_a_small_text_is_read(corpus_of: Any) -> None:
    corpus = corpus_of("to be or not " * 400)
    changes, (note,) = fit(QUICK, corpus, 2, frozenset())
    assert changes == {}
    # A client has 2,340 characters to train, so 2,276 windows of 64 characters, 12 in each batch.
    assert f"is read {190 * 12 * 64 / 2340:.0f} times a round" in note
    assert "max-steps=30 would read it about 10 times" in note
    assert fit(QUICK, corpus, 2, frozenset({"max-steps"})) == ({}, [])


@pytest.mark.parametrize("clients", [1, 2, 5])
@pytest.mark.parametrize("characters", [300, 600, 1000])
def test_the_block_size_is_the_largest_that_fits(
    characters: int, clients: int, corpus_of: Any
) -> None:
    corpus = corpus_of(("to be or not " * 100)[:characters])
    largest = max((b for b in range(8, 65) if fits(corpus, b, clients)), default=None)
    if largest is None:
        with pytest.raises(DataError, match="block-size 8 needs at least 9 characters"):
            fit(QUICK, corpus, clients, frozenset())
        return
    changes, notes = fit(QUICK, corpus, clients, frozenset())
    assert changes.get("block-size", 64) == largest
    assert sum("in this run" in note for note in notes) == len(changes)
    for key, value in changes.items():
        assert any(f"{key} is {value} in this run" in note for note in notes)


def test_a_small_text_is_seen_about_ten_times_in_a_round(corpus_of: Any) -> None:
    changes, _ = fit(QUICK, corpus_of("to be or not " * 60), 2, frozenset())
    characters = changes["max-steps"] * QUICK["batch-size"] * changes["block-size"]
    assert 5 <= characters / (0.45 * 780) <= 11


def test_what_the_user_has_chosen_stays(corpus_of: Any) -> None:
    corpus = corpus_of("to be or not " * 60)
    changes, _ = fit({**QUICK, "max-steps": 3000}, corpus, 2, frozenset({"max-steps"}))
    assert changes.keys() == {"block-size"}
    with pytest.raises(DataError, match="block-size 64 needs at least 65 characters"):
        fit(QUICK, corpus, 2, frozenset({"block-size"}))
