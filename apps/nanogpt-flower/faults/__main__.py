"""Try the faults: `python -m faults [name ...]`."""

import sys
from pathlib import Path

from rich.console import Console

from faults import accidents, by_client, by_server, network  # noqa: F401, they register
from faults.matrix import run_faults, selected, show, write
from nanogpt_flower.interrupts import handle_signals

REPOSITORY = Path(__file__).parents[3]


def main(names: list[str]) -> int:
    """Try the faults with these names, and return the exit status: 0 only if none failed."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    results = run_faults(selected(names), console)
    show(results, console)
    write(results, REPOSITORY / ".benchmarks")
    return int(any(result.status == "FAIL" for result in results))


if __name__ == "__main__":
    handle_signals()  # after SIGTERM, as after Ctrl-C, a fault stops its processes
    sys.exit(main(sys.argv[1:]))
