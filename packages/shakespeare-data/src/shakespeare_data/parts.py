"""A client's part of a text as token ids, in memory or as files of nanoGPT's form.

A directory of a part holds `train.bin` and `val.bin`, little-endian uint16 ids without a header,
and `meta.json` with the vocabulary and where the part comes from.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from shakespeare_data._atomic import write_synced
from shakespeare_data.batches import ON_DISK, map_tokens
from shakespeare_data.errors import DataError, whole_number
from shakespeare_data.tokenizer import CharTokenizer

FORMAT_VERSION = 1
MANIFEST = "partition.json"

_FILES = {"train.bin", "val.bin", "meta.json"}
_PART_DIRECTORY = re.compile(r"shakespeare_part_\d+")


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
        return ids_sha256(self.train)[:16]


def ids_sha256(ids: NDArray[np.uint16]) -> str:
    """Of a `.bin` with these ids, hexadecimal."""
    return sha256(np.ascontiguousarray(ids, dtype=ON_DISK).data).hexdigest()


def part_directory(output: Path, partition_id: int) -> Path:
    return output / f"shakespeare_part_{partition_id}"


def write_federation(
    parts: Iterable[Part], manifest: Mapping[str, Any], output: str | Path
) -> list[Path]:
    """Write every part to `<output>/shakespeare_part_<i>`, `manifest` to `<output>/partition.json`.

    All is written beside `output`, which then takes its place at once: it is the old federation or
    the new one, whole, at every moment but the instant between two renamings, in which it is
    missing and the old one, beside it, is put back by the next call. `output` may be new, empty or
    an earlier federation, which is replaced whole; anything else raises `DataError` naming what is
    in the way, as does what cannot be written. Returns the parts' directories.
    """
    if not str(output):
        raise DataError("the output is empty; it must be a directory")
    output = Path(output).resolve()  # what a link points to is written, the link stays
    if Path.cwd().is_relative_to(output):
        raise DataError(
            f"cannot replace {output}: the current directory is in it; choose one below"
        )
    beside, old = (output.with_name(f".{output.name}.{suffix}") for suffix in ("new", "old"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock_path(output)):
            _recover(output, beside, old)
            _refuse_what_is_not_ours(output)
            try:
                count = _write_parts(parts, manifest, beside)
                _put_in_place(output, beside, old)
            finally:
                shutil.rmtree(beside, ignore_errors=True)  # there only after a failure
    except OSError as error:
        where = error.filename2 or error.filename or output
        raise DataError(f"cannot write {where}: {error.strerror}") from error
    return [part_directory(output, i) for i in range(count)]


def _lock_path(output: Path) -> Path:
    """Of the user's writers of `output`.

    Two at once would take each other's unfinished directory for what a killed one left.
    """
    user = os.getuid() if hasattr(os, "getuid") else ""
    digest = sha256(os.fsencode(output)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"shakespeare-data-{user}-{digest}.lock"


def _recover(output: Path, beside: Path, old: Path) -> None:
    """Undo what a process that was killed left half done."""
    shutil.rmtree(beside, ignore_errors=True)
    if old.exists() and not output.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_what_is_not_ours(output: Path) -> None:
    """Raise `DataError` naming the first entry that no earlier federation put there."""
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError(f"cannot replace {output}: it is not a directory")
    for entry in sorted(output.iterdir()):
        foreign = None
        if entry.name == MANIFEST:
            foreign = None if _is_ours(entry) else entry
        elif _PART_DIRECTORY.fullmatch(entry.name) and _is_ours(entry / "meta.json"):
            foreign = next((file for file in entry.iterdir() if file.name not in _FILES), None)
        else:
            foreign = entry
        if foreign is not None:
            raise DataError(
                f"{output} holds {str(foreign.relative_to(output))!r}, which is no part of a "
                "federation; choose a new or empty directory"
            )


def _is_ours(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"format_version", "corpus_sha256"} <= document.keys()


def _write_parts(parts: Iterable[Part], manifest: Mapping[str, Any], beside: Path) -> int:
    beside.mkdir()
    count = 0
    for count, part in enumerate(parts, 1):
        directory = part_directory(beside, count - 1)
        directory.mkdir()
        for split, tokens in (("train", part.train), ("val", part.val)):
            write_synced(directory / f"{split}.bin", tokens.astype(ON_DISK, copy=False).tobytes())
        write_synced(directory / "meta.json", _json(part.meta))
    write_synced(beside / MANIFEST, _json(manifest))
    return count


def _put_in_place(output: Path, beside: Path, old: Path) -> None:
    if output.exists():
        output.rename(old)
    try:
        beside.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(document), indent=2, ensure_ascii=False) + "\n").encode()


def read_part(directory: str | Path, *, block_size: int = 1) -> Part:
    """The part that `Partition.write` wrote to `directory`, memory-mapped and read-only.

    Raises `DataError` naming the file for one that is missing, too short for a window of
    `block_size` and its targets, or at odds with `meta.json`, which has the SHA-256 of both.
    """
    directory, block_size = Path(directory), whole_number("block_size", block_size, 1)
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
        _read_tokens(directory / f"{split}.bin", tokenizer, meta, split, block_size)
        for split in ("train", "val")
    )
    return Part(train, val, tokenizer, str(directory), meta)


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
    path: Path, tokenizer: CharTokenizer, meta: Mapping[str, Any], split: str, block_size: int
) -> NDArray[np.uint16]:
    tokens = map_tokens(path)
    if len(tokens) != meta[f"{split}_length"]:
        raise DataError(f"{path} has {len(tokens)} ids, meta.json says {meta[f'{split}_length']}")
    if len(tokens) <= block_size:
        raise DataError(
            f"{path} has {len(tokens)} ids, block_size {block_size} needs at least {block_size + 1}"
        )
    largest = int(tokens.max())
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{path} has the id {largest}, meta.json allows 0 to {tokenizer.vocab_size - 1}"
        )
    # parts of version 0.1 say no SHA-256
    expected = meta.get(f"{split}_sha256")
    if expected is not None and (found := ids_sha256(tokens)) != expected:
        raise DataError(f"{path} was altered: its SHA-256 is {found}, meta.json says {expected}")
    return tokens
