import json
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shakespeare_data import CharTokenizer, Corpus, DataError, partition, read_part

MakeCorpus = Callable[..., Corpus]


@pytest.fixture(scope="session")
def tokenizer(verses: Corpus) -> CharTokenizer:
    return CharTokenizer.from_text(verses.text)


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def test_written_parts_equal_those_in_memory(
    verses: Corpus, tokenizer: CharTokenizer, tmp_path: Path
) -> None:
    corpus = verses
    directories = partition(corpus, 3).write(tmp_path / "deep" / "datasets")
    assert [directory.name for directory in directories] == [
        f"shakespeare_part_{i}" for i in range(3)
    ]
    for i, directory in enumerate(directories):
        written, in_memory = read_part(directory), partition(corpus, 3, tokenizer=tokenizer)[i]
        np.testing.assert_array_equal(written.train, in_memory.train)
        np.testing.assert_array_equal(written.val, in_memory.val)
        assert written.tokenizer == in_memory.tokenizer
        assert written.meta == in_memory.meta
        assert written.name == str(directory)
        assert isinstance(written.train, np.memmap)


def test_written_parts_are_nanogpts_format(verses: Corpus, tmp_path: Path) -> None:
    (directory,) = partition(verses, 1).write(tmp_path)
    train, _ = verses.split()
    chars = sorted(set(verses.text))
    expected = b"".join(chars.index(character).to_bytes(2, "little") for character in train)
    assert (directory / "train.bin").read_bytes() == expected
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    assert meta["vocab"] == "".join(chars)
    assert meta["vocab_size"] == len(chars)
    assert {file.name for file in directory.iterdir()} == {"train.bin", "val.bin", "meta.json"}


def test_the_caller_chooses_the_validation_fraction(verses: Corpus, tmp_path: Path) -> None:
    (directory,) = partition(verses, 1, validation_fraction=0.25).write(tmp_path)
    part = read_part(directory)
    assert len(part.val) == pytest.approx(len(verses.text) / 4, abs=1)


@pytest.mark.parametrize("scheme", ["by-speaker", "dirichlet"])
def test_the_report_is_written_beside_the_parts(folio: Corpus, tmp_path: Path, scheme: Any) -> None:
    divided = partition(folio, 3, scheme, seed=5)
    divided.write(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "partition.json").read_bytes())
    assert manifest["scheme"] == scheme
    assert manifest["seed"] == 5
    assert manifest["left_out"] == divided.left_out
    assert [part["train"] for part in manifest["parts"]] == [
        len(read_part(tmp_path / "out" / f"shakespeare_part_{i}").train) for i in range(3)
    ]


def test_writing_again_replaces_the_whole_federation(
    make_corpus: MakeCorpus, verses: Corpus, tmp_path: Path
) -> None:
    partition(verses, 3).write(tmp_path / "out")
    partition(make_corpus("xy" * 500), 2).write(tmp_path / "out")
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {
        "partition.json",
        "shakespeare_part_0",
        "shakespeare_part_1",
    }
    assert read_part(tmp_path / "out" / "shakespeare_part_0").tokenizer.vocab == "xy"


@pytest.mark.parametrize(
    "entry",
    [
        "notes.txt",
        "shakespeare_part_9",
        "shakespeare_part_0/checkpoint.pt",
        "shakespeare_part_notes/meta.json",
        "shakespeare_part_1/meta.json",
        "partition.json",
    ],
)
def test_a_directory_with_foreign_files_is_not_replaced(
    verses: Corpus, tmp_path: Path, entry: str
) -> None:
    output = tmp_path / "out"
    partition(verses, 1).write(output)
    (output / entry).parent.mkdir(exist_ok=True)
    (output / entry).write_text('{"format_version": "mine"}')
    with pytest.raises(DataError, match=r"holds '.*', which is no part of a federation"):
        partition(verses, 2).write(output)
    assert (output / entry).read_text() == '{"format_version": "mine"}'
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("made", [True, False], ids=["there", "dangling"])
def test_a_link_stays_and_its_target_is_written(verses: Corpus, tmp_path: Path, made: bool) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    if made:
        real.mkdir(parents=True)
    link.symlink_to(real)
    for _ in range(2):
        partition(verses, 2).write(link)
        assert link.is_symlink()
        assert read_part(real / "shakespeare_part_1").meta["num_partitions"] == 2
    assert names(tmp_path) == {"disk", "link"}
    assert names(real.parent) == {"real"}


@pytest.mark.parametrize("output", [".", "..", "/", ""])
def test_the_current_directory_is_not_replaced(
    verses: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match=r"the current directory is in it|the output is empty"):
        partition(verses, 2).write(output)
    assert names(tmp_path) == {"here"}


def test_an_output_that_is_a_file_is_not_replaced(verses: Corpus, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="out: it is not a directory"):
        partition(verses, 2).write(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_below_a_file_is_named(verses: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*file"):
        partition(verses, 2).write(tmp_path / "file" / "datasets")


@pytest.mark.parametrize("failing", ["write", "move"])
def test_an_earlier_federation_survives_a_failure(
    make_corpus: MakeCorpus,
    verses: Corpus,
    tokenizer: CharTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    partition(verses, 2).write(tmp_path / "out")
    rename = Path.rename

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def refuse_the_new_one(source: Path, target: Path) -> Path:
        if source.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(source, target)

    with monkeypatch.context() as patched:
        if failing == "write":
            patched.setattr("shakespeare_data.parts.write_synced", full)
        else:
            patched.setattr(Path, "rename", refuse_the_new_one)
        with pytest.raises(DataError, match="No space left on device"):
            partition(make_corpus("xy" * 500), 2).write(tmp_path / "out")
    assert read_part(tmp_path / "out" / "shakespeare_part_1").tokenizer == tokenizer
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("disk", ["free", "full"])
def test_the_next_writer_recovers_from_a_killed_one(
    make_corpus: MakeCorpus,
    verses: Corpus,
    tokenizer: CharTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    disk: str,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    partition(verses, 2).write(tmp_path / "out")
    # One process was killed between its two renames, and one while it wrote.
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / ".out.new" / "shakespeare_part_0").mkdir(parents=True)
    new = partition(make_corpus("xy" * 500), 2)
    if disk == "free":
        new.write(tmp_path / "out")
        expected = new.tokenizer
        assert names(tmp_path) == {"out"}
    else:
        monkeypatch.setattr("shakespeare_data.parts.write_synced", full)
        with pytest.raises(DataError, match="No space left on device"):
            new.write(tmp_path / "out")
        expected = tokenizer
    assert read_part(tmp_path / "out" / "shakespeare_part_0").tokenizer == expected


WRITE = """
import sys
from shakespeare_data import load_corpus, partition
corpus = load_corpus(sys.argv[1])
divided = partition(corpus, 12, "iid", int(sys.argv[2]))
print("ready", flush=True)
while True:
    divided.write(sys.argv[3])
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_federation(
    verses: Corpus, tmp_path: Path
) -> None:
    text, output = tmp_path / "verses.txt", tmp_path / "out"
    text.write_text(verses.text)
    expected = [partition(verses, 12, "iid", seed) for seed in (0, 1)]
    for turn in range(4):
        seed = turn % 2
        command = [sys.executable, "-c", WRITE, str(text), str(seed), str(output)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.01 * (turn + 1))
            process.kill()
        if not output.exists():  # killed between two renames; the next call recovers
            continue
        parts = [read_part(output / f"shakespeare_part_{i}") for i in range(12)]
        (of_seed,) = {part.meta["seed"] for part in parts}
        for part, whole in zip(parts, expected[of_seed], strict=True):
            assert part.fingerprint == whole.fingerprint
    partition(verses, 12).write(output)
    assert names(tmp_path) == {"verses.txt", "out"}


def test_the_fingerprint_does_not_depend_on_the_place(
    verses: Corpus, tokenizer: CharTokenizer, tmp_path: Path
) -> None:
    here, there = (
        [read_part(part) for part in partition(verses, 2).write(tmp_path / name)]
        for name in ("here", "there")
    )
    found = [part.fingerprint for part in here]
    assert found == [part.fingerprint for part in there]
    assert found == [part.fingerprint for part in partition(verses, 2, tokenizer=tokenizer)]
    assert (
        found[0]
        == sha256((tmp_path / "here/shakespeare_part_0/train.bin").read_bytes()).hexdigest()[:16]
    )
    assert found[0] != found[1]


@pytest.fixture
def part_directory(verses: Corpus, tmp_path: Path) -> Path:
    return partition(verses, 2).write(tmp_path / "datasets")[0]


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
        pytest.param(lambda _: b"", "is empty, expected ids of 2 bytes", id="empty"),
        pytest.param(lambda content: content[:-1], "need an even number", id="odd"),
        pytest.param(lambda content: content[:-2], "ids, meta.json says", id="truncated"),
        pytest.param(
            lambda content: bytes(len(content)), "was altered: its SHA-256 is", id="zeros"
        ),
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
        ({"train_sha256": None}, "train_sha256 must be str, it is None"),
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
def test_a_meta_json_that_is_not_an_object_is_named(
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
