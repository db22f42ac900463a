"""Hold, write and read the part of a text that belongs to one client.

A part is in memory or in a directory. This module defines the files in such a directory.
`train.bin` and `val.bin` hold token ids in nanoGPT's format, which is little-endian uint16 without
a header. `meta.json` holds the vocabulary, the origin of the text, and the length and SHA-256 of
both `.bin` files. One output directory contains `partition.json` and the directories of all
clients.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from shakespeare_data._atomic import write_synced
from shakespeare_data._cache import cached_read
from shakespeare_data.batches import ON_DISK, map_tokens
from shakespeare_data.errors import DataError, whole_number
from shakespeare_data.tokenizer import CharTokenizer

FORMAT_VERSION = 1  # the format version in meta.json and partition.json

_META = "meta.json"
_MANIFEST = "partition.json"
_FILES = {"train.bin", "val.bin", _META}
_PART_DIRECTORY = re.compile(r"shakespeare_part_\d+")


@dataclass(frozen=True)
class Origin:
    """A description of the divided text and of the way in which it was divided.

    Each `meta.json` and each `partition.json` contains these fields.
    """

    scheme: str
    seed: int
    options: Mapping[str, Any]
    num_partitions: int
    corpus: str  # the name of the corpus
    corpus_sha256: str
    source: str
    licence: str
    note: str


@dataclass(frozen=True, eq=False)
class Part:
    """The token ids on which one client trains and validates. A part cannot be changed."""

    train: NDArray[np.uint16]  # (N,), read-only
    val: NDArray[np.uint16]  # (M,), read-only
    tokenizer: CharTokenizer = field(repr=False)
    name: str  # the directory, or "0 of 2" for a part in memory
    meta: Mapping[str, Any] = field(repr=False)  # the content of meta.json, read-only

    @property
    def fingerprint(self) -> str:
        """A short identifier of the training ids.

        The identifier consists of the first 16 hexadecimal digits of the SHA-256 of `train.bin`. It
        does not depend on the directory or on the validation ids.
        """
        return str(self.meta["train_sha256"])[:16]


def make_part(
    train: NDArray[np.uint16],
    val: NDArray[np.uint16],
    tokenizer: CharTokenizer,
    origin: Origin,
    partition_id: int,
) -> Part:
    """Make the part that belongs to client number `partition_id`.

    The attribute `meta` of the part has the content that is written to `meta.json`.
    """
    meta = {
        **_described(origin),
        "partition_id": partition_id,
        "train_length": len(train),
        "val_length": len(val),
        "train_sha256": _ids_sha256(train),
        "val_sha256": _ids_sha256(val),
        "vocab_size": tokenizer.vocab_size,
        "vocab": tokenizer.vocab,
    }
    name = f"{partition_id} of {origin.num_partitions}"
    return Part(train, val, tokenizer, name, _read_only(meta))


def _described(origin: Origin) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        **asdict(replace(origin, options=dict(origin.options))),
    }


def _ids_sha256(ids: NDArray[np.uint16]) -> str:
    """Return the SHA-256 of a `.bin` file that contains `ids`, as hexadecimal digits."""
    return sha256(np.ascontiguousarray(ids, dtype=ON_DISK).data).hexdigest()


def _read_only(document: dict[str, Any]) -> Mapping[str, Any]:
    """Return `document` as a read-only mapping.

    A value in `document` that is a dictionary becomes a read-only mapping too. Dictionaries at
    deeper levels can still be changed.
    """
    return MappingProxyType(
        {
            key: MappingProxyType(value) if isinstance(value, dict) else value
            for key, value in document.items()
        }
    )


def part_directory(output: Path, partition_id: int) -> Path:
    """Return the directory for client number `partition_id` in the directory `output`."""
    return output / f"shakespeare_part_{partition_id}"


def write_federation(
    parts: Iterable[Part], origin: Origin, report: Mapping[str, Any], output: str | Path
) -> list[Path]:
    """Write the parts of all clients and `partition.json` into the directory `output`.

    `output` may be missing or empty, or it may contain an earlier federation. An earlier federation
    is replaced as a whole. The function first writes all files to a new directory beside `output`.
    Then it gives the earlier federation a temporary name, renames the new directory to `output`,
    and deletes the earlier federation. If the process is killed between the two renames, `output`
    is missing. In that case, the next call first gives the earlier federation its old name again.

    Returns a list with the directory of each part. Raises `DataError` if `output` contains other
    files, or if a file or directory cannot be written. The message names the file or directory.
    """
    if not str(output):
        raise DataError("the output is empty; it must be a directory")
    output = Path(output).resolve()  # if `output` is a link, its target is written
    if Path.cwd().is_relative_to(output):
        raise DataError(
            f"cannot replace {output}, because the current directory is in it; choose a "
            "directory below the current directory"
        )
    new, old = (output.with_name(f".{output.name}.{suffix}") for suffix in ("new", "old"))
    manifest = {**_described(origin), **report}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock_path(output)):
            _recover(output, new, old)
            _refuse_foreign_files(output)
            try:
                count = _write_parts(parts, manifest, new)
                _replace_directory(output, new, old)
            finally:
                shutil.rmtree(new, ignore_errors=True)  # `new` still exists after a failure
    except OSError as error:
        where = error.filename2 or error.filename or output
        raise DataError(f"cannot write {where}: {error.strerror}") from error
    return [part_directory(output, i) for i in range(count)]


def _lock_path(output: Path) -> Path:
    """Return the path of the lock file for `output`.

    All processes of one user that write to `output` share this lock file. Without the lock, a
    second process could delete the unfinished directory of the first process.
    """
    user = os.getuid() if hasattr(os, "getuid") else ""
    digest = sha256(os.fsencode(output)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"shakespeare-data-{user}-{digest}.lock"


def _recover(output: Path, new: Path, old: Path) -> None:
    """Finish or undo the work of an earlier process that was killed while it wrote `output`."""
    shutil.rmtree(new, ignore_errors=True)
    if old.exists() and not output.exists():
        old.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign_files(output: Path) -> None:
    """Raise `DataError` if `output` has an entry that does not belong to a federation."""
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError(f"cannot replace {output}: it is not a directory")
    for entry in sorted(output.iterdir()):
        foreign = None
        if entry.name == _MANIFEST:
            foreign = None if _is_ours(entry) else entry
        elif _PART_DIRECTORY.fullmatch(entry.name) and _is_ours(entry / _META):
            foreign = next((file for file in entry.iterdir() if file.name not in _FILES), None)
        else:
            foreign = entry
        if foreign is not None:
            raise DataError(
                f"{output} holds {str(foreign.relative_to(output))!r}, which is no part of a "
                "federation; choose a new or empty directory"
            )


def _is_ours(path: Path) -> bool:
    """Return whether the file `path` has the content of a `meta.json` or a `partition.json`.

    The format version in the file does not matter.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"format_version", "corpus_sha256"} <= document.keys()


def _write_parts(parts: Iterable[Part], manifest: Mapping[str, Any], new: Path) -> int:
    """Write all files into the directory `new`, and return the number of parts."""
    new.mkdir()
    count = 0
    for count, part in enumerate(parts, 1):
        directory = part_directory(new, count - 1)
        directory.mkdir()
        for split, tokens in (("train", part.train), ("val", part.val)):
            write_synced(directory / f"{split}.bin", tokens.astype(ON_DISK, copy=False).tobytes())
        write_synced(directory / _META, _json(part.meta))
    write_synced(new / _MANIFEST, _json(manifest))
    return count


def _replace_directory(output: Path, new: Path, old: Path) -> None:
    """Rename `output` to `old` and `new` to `output`, then delete `old`."""
    if output.exists():
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _json(document: Mapping[str, Any]) -> bytes:
    # default=dict is needed because json cannot write the read-only mappings from `_read_only`.
    text = json.dumps(dict(document), indent=2, ensure_ascii=False, default=dict)
    return f"{text}\n".encode()


def read_part(directory: str | Path, *, block_size: int = 1) -> Part:
    """Read a part that `Partition.write` wrote.

    The token ids are memory-mapped and read-only. The function opens each of the files
    `meta.json`, `train.bin` and `val.bin` only once. The SHA-256 of the mapped ids is compared with
    the SHA-256 in `meta.json`. A second call in the same process returns the same part without
    opening a file, if the path, size, modification time and inode of each file are unchanged.

    A window and its targets need `block_size + 1` ids. Raises `DataError` if `train.bin` or
    `val.bin` has fewer ids, if a file is missing, or if a file does not agree with `meta.json`. The
    message names the file.
    """
    directory, block_size = Path(directory), whole_number("block_size", block_size, 1)
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory; a part has train.bin, val.bin, meta.json")
    paths = [directory / _META, directory / "train.bin", directory / "val.bin"]
    part = cached_read(str(directory), paths, lambda: _read(directory))
    for path, ids in zip(paths[1:], (part.train, part.val), strict=True):
        if len(ids) <= block_size:
            raise DataError(
                f"{path} has {len(ids)} ids, block_size {block_size} needs at least "
                f"{block_size + 1}"
            )
    return part


def _read(directory: Path) -> Part:
    path = directory / _META
    meta = _read_meta(path)
    try:
        tokenizer = CharTokenizer(meta["vocab"])
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if meta["vocab_size"] != tokenizer.vocab_size:
        raise DataError(
            f"{path}: vocab_size is {meta['vocab_size']}, "
            f"but vocab has {tokenizer.vocab_size} characters"
        )
    train, val = (_read_ids(directory, split, meta) for split in ("train", "val"))
    return Part(train, val, tokenizer, str(directory), _read_only(meta))


_META_TYPES = {
    "vocab": str,
    "vocab_size": int,
    "train_length": int,
    "val_length": int,
    "train_sha256": str,
    "val_sha256": str,
}


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


def _read_ids(directory: Path, split: str, meta: Mapping[str, Any]) -> NDArray[np.uint16]:
    """Map the ids in `train.bin` or `val.bin` into memory, and check them against `meta`."""
    path = directory / f"{split}.bin"
    ids = map_tokens(path)
    if len(ids) != meta[f"{split}_length"]:
        raise DataError(f"{path} has {len(ids)} ids, meta.json says {meta[f'{split}_length']}")
    largest = int(ids.max())
    if largest >= meta["vocab_size"]:
        raise DataError(
            f"{path} has the id {largest}, meta.json allows 0 to {meta['vocab_size'] - 1}"
        )
    found, expected = _ids_sha256(ids), meta[f"{split}_sha256"]
    if found != expected:
        raise DataError(f"{path} was altered: its SHA-256 is {found}, meta.json says {expected}")
    return ids
