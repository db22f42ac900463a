"""Stop a federation whose program was killed. `Federation` starts this program as its watcher.

The standard input of the watcher is a pipe from the program. The pipe ends when the program does,
however it ends.
"""

import shutil
import sys

from nanogpt_flower.local.processes import stop_processes


def main() -> None:
    """Wait for the end of the program, stop its federation, and delete the federation's files."""
    federation_id, home = sys.argv[1:]
    sys.stdin.buffer.read()
    stop_processes(federation_id)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
