"""Turn the signals that end a program into `KeyboardInterrupt`, at a moment that loses nothing."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# A shell can start a background job with SIGINT ignored. Python then does not turn SIGINT into a
# KeyboardInterrupt, so SIGINT needs a handler too. Windows has no SIGHUP.
ENDING_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_state = {"deferred": 0, "arrived": 0}


class Interrupted(Exception):
    """The user has interrupted a run, and all its processes have been stopped."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.directory = directory


def handle_signals() -> None:
    """Let each ending signal raise `KeyboardInterrupt`. Later signals are ignored.

    So a second Ctrl-C does not interrupt the program while it stops its processes.
    """
    _state.update(deferred=0, arrived=0)
    for number in ENDING_SIGNALS:
        signal.signal(number, _interrupt)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold back a `KeyboardInterrupt` until the end of the context.

    A process that starts in the context is therefore always known, and a clean-up is always whole.
    """
    _state["deferred"] += 1
    try:
        yield
    finally:
        _state["deferred"] -= 1
    if _state["arrived"] == 1 and not _state["deferred"]:
        _state["arrived"] += 1
        raise KeyboardInterrupt


def _interrupt(signum: int, frame: FrameType | None) -> None:
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if _state["deferred"]:
        _state["arrived"] += 1
    else:
        raise KeyboardInterrupt
