"""Report the progress of a run to the program that shows it.

The program names a file in the environment variable `NANOGPT_FLOWER_PROGRESS`. Flower's processes
inherit the variable, so server and clients on this machine append their events to the same file,
one JSON object in each line. Without the variable nothing is written.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

VARIABLE = "NANOGPT_FLOWER_PROGRESS"


def is_shown() -> bool:
    """Tell whether a program shows the progress of this run."""
    return bool(os.environ.get(VARIABLE))


def emit(event: str, **values: Any) -> None:
    """Append an event to the file, if a program shows the progress of this run."""
    if is_shown():
        line = json.dumps({"event": event, "time": time.time(), **values}) + "\n"
        # One write in append mode: the lines of several processes do not mix.
        with Path(os.environ[VARIABLE]).open("ab", buffering=0) as file:
            file.write(line.encode())


class Lines:
    """The lines that programs append to a file while this process reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._unfinished = b""

    def new(self) -> list[str]:
        """Return the complete lines since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._position)
            read = file.read()
        self._position += len(read)
        *lines, self._unfinished = (self._unfinished + read).split(b"\n")
        return [line.decode(errors="replace") for line in lines]
