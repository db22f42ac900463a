"""Find and stop the processes of a federation, which have its identity in their environment."""

import time

import psutil

FEDERATION_ID = "NANOGPT_FLOWER_FEDERATION"  # environment variable that marks each process
STOP_SECONDS = 10.0  # a process that takes longer to end is killed


def processes(federation_id: str) -> set[psutil.Process]:
    """Find all running processes that a federation or one of its processes has started."""
    marked = {found for found in psutil.process_iter() if _is_marked(found, federation_id)}
    # Ray's agents overwrite their environment when they rename themselves. The parents of
    # these agents still have the mark, so the agents are found as children.
    return marked.union(*(_descendants(process) for process in marked))


def stop_processes(federation_id: str) -> None:
    """Terminate every process of a federation, and wait until all processes have ended.

    Processes that still run after ten seconds are killed.
    """
    terminated: set[psutil.Process] = set()
    deadline = time.monotonic() + STOP_SECONDS
    # A process may start a new process while it ends, so look for new processes each time.
    while living := {p for p in processes(federation_id) | terminated if _lives(p)}:
        late = time.monotonic() > deadline
        for process in living if late else living - terminated:
            _end(process, kill=late)
        terminated |= living
        psutil.wait_procs(living, timeout=0.2)


def _is_marked(process: psutil.Process, federation_id: str) -> bool:
    try:
        return bool(process.environ().get(FEDERATION_ID) == federation_id)
    except (psutil.Error, OSError):
        return False  # the process belongs to another user or has ended


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return
