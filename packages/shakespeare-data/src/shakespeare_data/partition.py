"""Who gets which part of the text: contiguous and equal, in memory or as files of nanoGPT's form.

A directory of a part holds `train.bin` and `val.bin`, little-endian uint16 ids without a header,
and `meta.json` with the vocabulary and where the part comes from.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shakespeare_data.corpus import Corpus
from shakespeare_data.errors import DataError
from shakespeare_data.tokenizer import CharTokenizer

FORMAT_VERSION = 1
_ON_DISK = np.dtype("<u2")


@dataclass(frozen=True, eq=False)
class Part:
    """What one client trains and validates on."""

    train: NDArray[np.uint16]  # (N,)
    val: NDArray[np.uint16]  # (M,)
    tokenizer: CharTokenizer = field(repr=False)
    name: str  # the directory, or "0 of 2"
    meta: Mapping[str, Any] = field(repr=False)  # what meta.json holds

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the training ids as `train.bin`.

        Equal wherever a part lies, and different for different texts.
        """
        return sha256(self.train.astype(_ON_DISK, copy=False).data).hexdigest()[:16]


def contiguous(tokens: NDArray[Any], num_partitions: int) -> list[NDArray[Any]]:
    """`tokens` (N,) as `num_partitions` consecutive views whose lengths differ by at most 1."""
    _check_count(num_partitions)
    return np.array_split(tokens, num_partitions)


def partition(
    corpus: Corpus,
    tokenizer: CharTokenizer,
    num_partitions: int,
    partition_id: int,
    *,
    block_size: int = 1,
) -> Part:
    """Client `partition_id`'s part: an equal share of the training text, one of the validation.

    The last 10 % of the corpus validate. Raises `DataError` when the smallest share holds no
    window of `block_size` tokens and their targets, that is, less than `block_size + 1` characters.
    """
    _check_count(num_partitions)
    if not 0 <= partition_id < num_partitions:
        raise DataError(
            f"partition_id must be from 0 to {num_partitions - 1}, it is {partition_id}"
        )
    train, val = (tokenizer.encode(text) for text in corpus.split())
    return _part(corpus, tokenizer, train, val, num_partitions, partition_id, block_size)


def write_partitions(
    corpus: Corpus,
    num_partitions: int,
    output: str | Path,
    *,
    validation_fraction: float = 0.1,
) -> list[Path]:
    """Write every part to `<output>/shakespeare_part_<i>` and return these directories.

    Directories that exist are replaced once all new ones are written. Raises `DataError` when the
    text cannot feed that many or `output` cannot be written; each directory is then the old
    one or the new one, whole.
    """
    _check_count(num_partitions)
    tokenizer = CharTokenizer.from_text(corpus.text)
    train, val = (tokenizer.encode(text) for text in corpus.split(validation_fraction))
    parts = [
        _part(corpus, tokenizer, train, val, num_partitions, i, block_size=1)
        for i in range(num_partitions)
    ]
    output = Path(output)
    directories = [output / f"shakespeare_part_{i}" for i in range(num_partitions)]
    for directory in directories:
        if directory.exists() and not directory.is_dir():
            raise DataError(f"cannot replace {directory}: it is not a directory")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".shakespeare_part_") as staging:
            written = [
                _write_part(part, Path(staging) / directory.name)
                for part, directory in zip(parts, directories, strict=True)
            ]
            for new, directory in zip(written, directories, strict=True):
                _replace_directory(directory, new, aside=Path(staging) / f"old_{directory.name}")
    except OSError as error:
        where = error.filename2 or error.filename or output
        raise DataError(f"cannot write {where}: {error.strerror}") from error
    return directories


def read_part(directory: str | Path, *, block_size: int = 1) -> Part:
    """The part that `write_partitions` wrote to `directory`, memory-mapped and read-only.

    Raises `DataError` naming the file for one that is missing, damaged, too short for a
    window of `block_size` and its targets, or at odds with `meta.json`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory; a part has train.bin, val.bin, meta.json")
    meta_path = directory / "meta.json"
    meta = _read_meta(meta_path)
    try:
        tokenizer = CharTokenizer(meta["vocab"])
    except DataError as error:
        raise DataError(f"{meta_path}: {error}") from error
    if meta["vocab_size"] != tokenizer.vocab_size:
        raise DataError(
            f"{meta_path}: vocab_size is {meta['vocab_size']}, "
            f"but vocab has {tokenizer.vocab_size} characters"
        )
    train, val = (
        _read_tokens(directory / f"{split}.bin", tokenizer, meta[f"{split}_length"], block_size)
        for split in ("train", "val")
    )
    return Part(train, val, tokenizer, str(directory), meta)


def _check_count(num_partitions: int) -> None:
    if num_partitions < 1:
        raise DataError(f"num_partitions must be at least 1, it is {num_partitions}")


def _part(
    corpus: Corpus,
    tokenizer: CharTokenizer,
    train: NDArray[np.uint16],
    val: NDArray[np.uint16],
    num_partitions: int,
    partition_id: int,
    block_size: int,
) -> Part:
    shares = {
        split: contiguous(tokens, num_partitions)[partition_id]
        for split, tokens in (("train", train), ("val", val))
    }
    for split, tokens in (("train", train), ("val", val)):
        # the smallest share counts, so that all clients of a federation refuse or none does
        if len(tokens) // num_partitions <= block_size:
            shorter = min(len(train), len(val))
            advice = []
            if (largest_block := shorter // num_partitions - 1) > 0:
                advice.append(f"a block_size of at most {largest_block}")
            if most_clients := shorter // (block_size + 1):
                advice.append(f"at most {most_clients} clients")
            raise DataError(
                f"a client of {num_partitions} would get {len(tokens) // num_partitions} {split} "
                f"characters, block_size {block_size} needs at least {block_size + 1}; "
                f"the text {'allows ' + ', or '.join(advice) if advice else 'is too short'}"
            )
    meta = {
        "format_version": FORMAT_VERSION,
        "scheme": "contiguous",
        "partition_id": partition_id,
        "num_partitions": num_partitions,
        "train_length": len(shares["train"]),
        "val_length": len(shares["val"]),
        "vocab_size": tokenizer.vocab_size,
        "vocab": tokenizer.vocab,
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "source": corpus.source,
        "licence": corpus.licence,
        "note": corpus.note,
    }
    label = f"{partition_id} of {num_partitions}"
    return Part(shares["train"], shares["val"], tokenizer, label, meta)


def _write_part(part: Part, directory: Path) -> Path:
    directory.mkdir()
    for split, tokens in (("train", part.train), ("val", part.val)):
        (directory / f"{split}.bin").write_bytes(tokens.astype(_ON_DISK, copy=False).tobytes())
    document = json.dumps(dict(part.meta), indent=2, ensure_ascii=False)
    (directory / "meta.json").write_text(document + "\n", encoding="utf-8")
    return directory


def _replace_directory(directory: Path, new: Path, *, aside: Path) -> None:
    if directory.exists():
        directory.rename(aside)
    try:
        new.rename(directory)
    finally:
        if aside.exists() and not directory.exists():
            aside.rename(directory)


_META_TYPES = {"vocab": str, "vocab_size": int, "train_length": int, "val_length": int}


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path} must hold a JSON object, it is {type(meta).__name__}")
    if meta.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version is {meta.get('format_version')!r}, "
            f"this version of shakespeare-data reads {FORMAT_VERSION}"
        )
    for key, kind in _META_TYPES.items():
        if not isinstance(meta.get(key), kind):
            raise DataError(f"{path}: {key} must be {kind.__name__}, it is {meta.get(key)!r}")
    return meta


def _read_tokens(
    path: Path, tokenizer: CharTokenizer, length: int, block_size: int
) -> NDArray[np.uint16]:
    try:
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path} is empty, expected {length} ids of 2 bytes")
        if size % 2:
            raise DataError(f"{path} has {size} bytes, ids of 2 bytes need an even number")
        tokens = np.memmap(path, dtype=_ON_DISK, mode="r")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if len(tokens) != length:
        raise DataError(f"{path} has {len(tokens)} ids, meta.json says {length}")
    if len(tokens) <= block_size:
        raise DataError(
            f"{path} has {len(tokens)} ids, block_size {block_size} needs at least {block_size + 1}"
        )
    largest = int(tokens.max())
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{path} has the id {largest}, meta.json allows 0 to {tokenizer.vocab_size - 1}"
        )
    return tokens
