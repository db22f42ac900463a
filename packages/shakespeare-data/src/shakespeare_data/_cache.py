"""Cache values that were read from files, for as long as the process runs.

A cached value stays valid while each file from which it was read keeps its path, size, modification
time and inode. To check these properties, the cache calls `stat` and opens no file. All callers
receive the same object, so it must be immutable. If a file changes and all four properties stay the
same, the cache does not notice the change. The cache always notices when this package writes a
file, because the new file has a new inode.
"""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")
FileState = tuple[str, int, int, int]  # path, size in bytes, mtime in ns, inode

_MAX_VALUES = 16  # if there are more, the oldest value is dropped; this limits the memory
_values: dict[Hashable, tuple[list[FileState], Any]] = {}


def cached_read(key: Hashable, paths: Sequence[Path], read: Callable[[], Value]) -> Value:
    """Return the cached value for `key` if the files in `paths` are unchanged.

    Otherwise, the function calls `read`, stores the result in the cache, and returns the result.
    The result is not stored if a file is missing or if `read` raises an exception.
    """
    try:
        states = [_state(path) for path in paths]
    except OSError:
        states = []
    if not states:
        return read()  # `read` raises its own error for the missing file
    cached = _values.get(key)
    if cached is not None and cached[0] == states:
        return cached[1]  # type: ignore[no-any-return]
    # The states were taken before the read. So if a file changes during the read, the next call
    # sees a different state and reads again.
    value = read()
    _values.pop(key, None)
    while len(_values) >= _MAX_VALUES:
        del _values[next(iter(_values))]
    _values[key] = states, value
    return value


def _state(path: Path) -> FileState:
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino
