import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shakespeare_data import (
    CharTokenizer,
    Corpus,
    DataError,
    contiguous,
    partition,
    read_part,
    write_partitions,
)

MakeCorpus = Callable[..., Corpus]


@pytest.fixture(scope="session")
def verses(make_corpus: MakeCorpus) -> Corpus:
    return make_corpus()


@pytest.fixture(scope="session")
def tokenizer(verses: Corpus) -> CharTokenizer:
    return CharTokenizer.from_text(verses.text)


@given(length=st.integers(0, 200), num_partitions=st.integers(1, 40))
def test_contiguous_parts_are_equal_disjoint_and_together_whole(
    length: int, num_partitions: int
) -> None:
    tokens = np.arange(length, dtype=np.uint16)
    parts = contiguous(tokens, num_partitions)
    assert len(parts) == num_partitions
    assert np.concatenate(parts).tolist() == list(range(length))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_contiguous_parts_are_views() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    assert all(np.shares_memory(part, tokens) for part in contiguous(tokens, 3))


@given(num_partitions=st.integers(1, 9))
def test_the_parts_of_all_clients_make_up_the_split_text(
    verses: Corpus, tokenizer: CharTokenizer, num_partitions: int
) -> None:
    corpus = verses
    parts = [partition(corpus, tokenizer, num_partitions, i) for i in range(num_partitions)]
    train, val = corpus.split()
    assert "".join(tokenizer.decode(part.train) for part in parts) == train
    assert "".join(tokenizer.decode(part.val) for part in parts) == val


def test_a_part_says_whose_it_is_and_of_what(verses: Corpus, tokenizer: CharTokenizer) -> None:
    part = partition(verses, tokenizer, 2, 0)
    assert part.name == "0 of 2"
    assert part.train.dtype == part.val.dtype == np.uint16
    assert part.meta["corpus_sha256"] == verses.sha256
    assert part.meta["scheme"] == "contiguous"


@pytest.mark.parametrize("num_partitions", [0, -1])
def test_fewer_than_one_partition_is_refused(
    verses: Corpus, tokenizer: CharTokenizer, num_partitions: int, tmp_path: Path
) -> None:
    message = f"num_partitions must be at least 1, it is {num_partitions}"
    with pytest.raises(DataError, match=message):
        contiguous(np.arange(3), num_partitions)
    with pytest.raises(DataError, match=message):
        partition(verses, tokenizer, num_partitions, 0)
    with pytest.raises(DataError, match=message):
        write_partitions(verses, num_partitions, tmp_path)


@pytest.mark.parametrize("partition_id", [-1, 2])
def test_a_client_that_does_not_exist_is_refused(
    verses: Corpus, tokenizer: CharTokenizer, partition_id: int
) -> None:
    with pytest.raises(DataError, match=f"from 0 to 1, it is {partition_id}"):
        partition(verses, tokenizer, 2, partition_id)


def test_more_clients_than_the_text_can_feed_names_the_number_that_works(
    make_corpus: MakeCorpus,
) -> None:
    corpus = make_corpus("ab" * 500)  # 900 characters of training text, 100 of validation
    tokenizer = CharTokenizer("ab")
    message = (
        "a client of 4 would get 25 val characters, block_size 32 needs at least 33; "
        "the text allows a block_size of at most 24, or at most 3 clients"
    )
    with pytest.raises(DataError, match=message):
        partition(corpus, tokenizer, 4, 3, block_size=32)
    assert all(len(partition(corpus, tokenizer, 3, i, block_size=32).val) >= 33 for i in range(3))
    assert len(partition(corpus, tokenizer, 4, 3, block_size=24).val) == 25
    with pytest.raises(DataError, match=r"the text allows a block_size of at most 24$"):
        partition(corpus, tokenizer, 4, 0, block_size=100)
    with pytest.raises(DataError, match=r"the text is too short$"):
        partition(make_corpus("ab"), tokenizer, 4, 0)


def test_a_text_outside_the_vocabulary_is_refused(make_corpus: MakeCorpus) -> None:
    with pytest.raises(DataError, match="not in the vocabulary"):
        partition(make_corpus("abc" * 100), CharTokenizer("ab"), 2, 0)


def test_written_parts_equal_those_in_memory(
    verses: Corpus, tokenizer: CharTokenizer, tmp_path: Path
) -> None:
    corpus = verses
    directories = write_partitions(corpus, 3, tmp_path / "deep" / "datasets")
    assert [directory.name for directory in directories] == [
        f"shakespeare_part_{i}" for i in range(3)
    ]
    for i, directory in enumerate(directories):
        written, in_memory = read_part(directory), partition(corpus, tokenizer, 3, i)
        np.testing.assert_array_equal(written.train, in_memory.train)
        np.testing.assert_array_equal(written.val, in_memory.val)
        assert written.tokenizer == in_memory.tokenizer
        assert written.meta == in_memory.meta
        assert written.name == str(directory)
        assert isinstance(written.train, np.memmap)


def test_written_parts_are_nanogpts_format(verses: Corpus, tmp_path: Path) -> None:
    (directory,) = write_partitions(verses, 1, tmp_path)
    train, _ = verses.split()
    chars = sorted(set(verses.text))
    expected = b"".join(chars.index(character).to_bytes(2, "little") for character in train)
    assert (directory / "train.bin").read_bytes() == expected
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    assert meta["vocab"] == "".join(chars)
    assert meta["vocab_size"] == len(chars)
    assert {file.name for file in directory.iterdir()} == {"train.bin", "val.bin", "meta.json"}


def test_the_validation_fraction_is_the_callers(verses: Corpus, tmp_path: Path) -> None:
    (directory,) = write_partitions(verses, 1, tmp_path, validation_fraction=0.25)
    part = read_part(directory)
    assert len(part.val) == pytest.approx(len(verses.text) / 4, abs=1)


def test_writing_again_replaces_the_parts_and_nothing_else(
    make_corpus: MakeCorpus, verses: Corpus, tokenizer: CharTokenizer, tmp_path: Path
) -> None:
    write_partitions(verses, 3, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    write_partitions(make_corpus("xy" * 500), 2, tmp_path)
    assert read_part(tmp_path / "shakespeare_part_0").tokenizer.vocab == "xy"
    assert read_part(tmp_path / "shakespeare_part_2").tokenizer == tokenizer
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "notes.txt",
        *(f"shakespeare_part_{i}" for i in range(3)),
    }


def test_what_was_there_survives_a_write_that_fails(
    make_corpus: MakeCorpus,
    verses: Corpus,
    tokenizer: CharTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_partitions(verses, 2, tmp_path)

    def full(_: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(DataError, match="No space left on device"):
            write_partitions(make_corpus("xy" * 500), 2, tmp_path)
    assert read_part(tmp_path / "shakespeare_part_0").tokenizer == tokenizer
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "shakespeare_part_0",
        "shakespeare_part_1",
    }


def test_what_was_there_survives_a_move_that_fails(
    make_corpus: MakeCorpus,
    verses: Corpus,
    tokenizer: CharTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_partitions(verses, 1, tmp_path)
    rename = Path.rename

    def refuse_the_new_one(source: Path, target: Path) -> Path:
        if source.name == target.name == "shakespeare_part_0":
            raise OSError(5, "Input/output error")
        return rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse_the_new_one)
        with pytest.raises(DataError, match="Input/output error"):
            write_partitions(make_corpus("xy" * 500), 1, tmp_path)
    assert read_part(tmp_path / "shakespeare_part_0").tokenizer == tokenizer


def test_an_output_that_cannot_be_written_is_named(verses: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*file"):
        write_partitions(verses, 2, tmp_path / "file" / "datasets")


def test_a_file_in_a_parts_place_is_not_replaced(verses: Corpus, tmp_path: Path) -> None:
    (tmp_path / "shakespeare_part_1").write_text("mine")
    with pytest.raises(DataError, match=r"cannot replace .*shakespeare_part_1"):
        write_partitions(verses, 2, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["shakespeare_part_1"]


def test_a_text_too_short_for_the_parts_writes_nothing(
    make_corpus: MakeCorpus, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="the text allows at most 1 clients"):
        write_partitions(make_corpus("ab" * 10), 3, tmp_path / "datasets")
    assert not (tmp_path / "datasets").exists()


def test_a_part_has_one_fingerprint_wherever_it_lies(
    verses: Corpus, tokenizer: CharTokenizer, tmp_path: Path
) -> None:
    here, there = (
        [read_part(part) for part in write_partitions(verses, 2, tmp_path / name)]
        for name in ("here", "there")
    )
    found = [part.fingerprint for part in here]
    assert found == [part.fingerprint for part in there]
    assert found == [partition(verses, tokenizer, 2, i).fingerprint for i in range(2)]
    assert (
        found[0]
        == sha256((tmp_path / "here/shakespeare_part_0/train.bin").read_bytes()).hexdigest()[:16]
    )
    assert found[0] != found[1]


@pytest.fixture
def part_directory(verses: Corpus, tmp_path: Path) -> Path:
    return write_partitions(verses, 2, tmp_path)[0]


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a directory"):
        read_part(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_a_missing_file_is_named(part_directory: Path, name: str) -> None:
    (part_directory / name).unlink()
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        read_part(part_directory)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda _: b"", "is empty, expected [0-9]+ ids of 2 bytes", id="empty"),
        pytest.param(lambda content: content[:-1], "need an even number", id="odd"),
        pytest.param(lambda content: content[:-2], "ids, meta.json says", id="truncated"),
        pytest.param(
            lambda content: content[:-2] + b"\xff\x01", "has the id 511, .* 0 to ", id="foreign"
        ),
    ],
)
def test_damaged_tokens_are_named(
    part_directory: Path, name: str, damage: Any, message: str
) -> None:
    path = part_directory / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as raised:
        read_part(part_directory)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2, .* reads 1"),
        ({"vocab": None}, "vocab must be str, it is None"),
        ({"vocab": "ba"}, "sorted"),
        ({"vocab_size": 1}, "vocab_size is 1, but vocab has"),
        ({"val_length": "many"}, "val_length must be int, it is 'many'"),
    ],
)
def test_a_bad_meta_json_is_named(
    part_directory: Path, change: dict[str, Any], message: str
) -> None:
    path = part_directory / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(DataError, match=message) as raised:
        read_part(part_directory)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff\xfe\xfd", "is not JSON"), (b"[]", "JSON object, it is list")],
)
def test_a_meta_json_that_is_no_object_is_named(
    part_directory: Path, content: bytes, message: str
) -> None:
    (part_directory / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_part(part_directory)


def test_a_part_shorter_than_a_window_is_refused(part_directory: Path) -> None:
    length = len(read_part(part_directory).val)
    assert len(read_part(part_directory, block_size=length - 1).val) == length
    with pytest.raises(DataError, match=rf"has {length} ids, block_size {length} needs"):
        read_part(part_directory, block_size=length)
