"""Put a process's clock forward by `FAULT_CLOCK_SECONDS` once the file `FAULT_CLOCK_FILE` exists.

Python runs this file at its start if this directory is in PYTHONPATH.
"""

import datetime
import os
import time

AHEAD = float(os.environ.get("FAULT_CLOCK_SECONDS", "0"))
FILE = os.environ.get("FAULT_CLOCK_FILE", "")


def ahead() -> float:
    """Return the seconds by which the clock is ahead now."""
    return AHEAD if os.path.exists(FILE) else 0.0  # noqa: PTH110


class Shifted(datetime.datetime):
    """A datetime of which `now` is shifted."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "Shifted":
        """Return the shifted time."""
        return super().now(tz) + datetime.timedelta(seconds=ahead())


def shift() -> None:
    """Replace the functions that read the clock."""
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + ahead()
    time.time_ns = lambda: nanoseconds() + int(ahead() * 1e9)
    datetime.datetime = Shifted  # type: ignore[misc]


if AHEAD:
    shift()
