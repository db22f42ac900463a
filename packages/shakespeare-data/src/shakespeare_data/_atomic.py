"""Write files in such a way that a reader never sees an incomplete file."""

import os
import tempfile
from pathlib import Path
from typing import BinaryIO


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file, and wait until the disk has stored the file.

    Raises `OSError` if the file already exists or cannot be written.
    """
    with path.open("xb") as file:
        _write_and_sync(file, content)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, and rename this file to `path`.

    Raises `OSError` if the file cannot be written. In that case, an existing file at `path` stays
    unchanged.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _write_and_sync(file, content)
        # mkstemp lets only the owner read the file, but other users may share the cache.
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_and_sync(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
