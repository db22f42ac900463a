"""Files that are either whole or not there."""

import os
import tempfile
from pathlib import Path
from typing import BinaryIO


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it. Raises `OSError`."""
    with path.open("xb") as file:
        _write_through(file, content)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, then move into place. Raises `OSError`; what was there then stays."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _write_through(file, content)
        # mkstemp makes files that only their owner can read; a shared cache needs the usual rights.
        beside.chmod(0o644)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _write_through(file: BinaryIO, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
