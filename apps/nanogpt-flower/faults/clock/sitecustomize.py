"""Put a process's clock forward by `FAULT_CLOCK_SECONDS`.

Python runs this file at its start if this directory is in PYTHONPATH.
"""

import datetime
import os
import time

AHEAD = float(os.environ.get("FAULT_CLOCK_SECONDS", "0"))


class Shifted(datetime.datetime):
    """A datetime of which `now` is shifted."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "Shifted":
        """Return the shifted time."""
        return super().now(tz) + datetime.timedelta(seconds=AHEAD)


def shift() -> None:
    """Replace the functions that read the clock."""
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + AHEAD
    time.time_ns = lambda: nanoseconds() + int(AHEAD * 1e9)
    datetime.datetime = Shifted  # type: ignore[misc]


if AHEAD:
    shift()
