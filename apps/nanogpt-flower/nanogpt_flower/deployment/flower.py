"""The two programs of a party's SuperNode: `flower-supernode`, and an executor of our own.

    python -m nanogpt_flower.deployment.flower supernode ROLE-OPTIONS
    python -m nanogpt_flower.deployment.flower executor DIGESTS ROLE-OPTIONS

Flower's `flower-superexec` starts a new `flwr-clientapp` for each message. That program unpacks the
FAB of the run, and runs the code in it. The executor here never unpacks a FAB. It compares the
FAB's SHA-256 with a list, and answers with the ClientApp that is installed on this machine. It has
imported everything before the first message, and forks for each message, so no message waits for an
import.

This module holds all names of Flower that are not public and that the app uses. `NAMES` lists them,
and `missing_names` says which of them the installed Flower does not have.
"""

import hashlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from flwr.app import Context, Error, Message

from flower_adapter._flwr import ErrorCode

CLIENTAPP = "flwr.supernode.runtime.run_clientapp"
SUPEREXEC = "flwr.supercore.superexec.run_superexec"
SUPERNODE = "flwr.supernode.start_client_internal"
NAMES = {
    # `install_from_fab` unpacks a FAB, and `get_load_client_app_fn` imports the code in it.
    CLIENTAPP: (
        *("run_clientapp", "install_from_fab", "get_load_client_app_fn"),
        "pull_and_inflate_object_from_tree",  # for its arguments about pauses
    ),
    SUPEREXEC: ("get_executor",),
    SUPERNODE: ("time",),  # for `time.sleep` alone
    "flwr.supercore.superexec.executor": ("ExecutionSpec", "LaunchResult"),
    "flwr.supercore.constant": ("TaskType",),
    "flwr.supercore.cli": ("flower_superexec",),
    "flwr.supernode.cli": ("flower_supernode",),
}
REFUSED_APP = "app: this client does not answer runs of this app"
# Seconds between two looks for a reply of the executor, which is on this machine.
REPLY_PAUSE = 0.02
# Seconds between two looks for an array that the SuperNode has not yet received: the first pause,
# which doubles, and the longest. Flower's are 1 and 10.
ARRAY_PAUSES = {"initial_backoff": 0.05, "backoff_cap": 1.0, "max_tries_per_object": None}
# Seconds until the SuperNode asks an idle SuperLink again: this part of the time that it has
# already waited, at least the shortest pause, and at most Flower's own three seconds.
SHORTEST_PAUSE, GROWTH = 0.1, 0.2
PARENT_PAUSE = 0.5  # seconds between two looks whether the program that started this one lives


def missing_names() -> list[str]:
    """Return the names in `NAMES` that the installed Flower does not have."""
    missing = []
    for module, names in NAMES.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        missing += [f"{module}.{name}" for name in names if not hasattr(found, name)]
    return missing


def refuse_app(message: Message, context: Context) -> Message:
    """Answer a message of an app that is not on the list."""
    return Message(
        Error(code=ErrorCode.LOAD_CLIENT_APP_EXCEPTION, reason=REFUSED_APP), reply_to=message
    )


def answer(spec: Any, digests: Collection[str]) -> None:
    """Answer one message with the installed ClientApp. This function ends the process.

    Args:
        spec: Flower's description of the task.
        digests: the SHA-256 of each FAB whose runs are answered.
    """
    module: Any = importlib.import_module(CLIENTAPP)
    constants: Any = importlib.import_module("flwr.supercore.constant")
    seen: list[str] = []

    def look_at(fab: bytes, *_: Any, **__: Any) -> None:
        """Take note of a FAB, in place of unpacking it."""
        seen.append(hashlib.sha256(fab).hexdigest())

    def load(*_: Any) -> Callable[[Message, Context], Message]:
        """Return the installed ClientApp, in place of the one in the FAB."""
        known = len(seen) == 1 and seen[0] in digests
        if not known or spec.task_type != constants.TaskType.CLIENT_APP:
            print(f"refused a {spec.task_type} task of the FAB {seen}", file=sys.stderr, flush=True)
            return refuse_app
        from nanogpt_flower.client_app import app

        return app

    module.install_from_fab = look_at
    module.get_load_client_app_fn = lambda *_, **__: load
    module.pull_and_inflate_object_from_tree = partial(
        module.pull_and_inflate_object_from_tree, **ARRAY_PAUSES
    )
    module.run_clientapp(
        runtime_api_address=spec.runtime_api_address,
        token=spec.token,
        insecure=spec.insecure,
        parent_pid=spec.parent_pid,
        runtime_dependency_install=False,
    )


class ForkingExecutor:
    """Answers each task in a new process, which is a copy of this one.

    Where processes cannot be copied safely, such as on macOS, a new Python process imports the app
    again for each message.
    """

    def __init__(self, digests: Collection[str]) -> None:
        self._digests = digests
        method = "fork" if sys.platform == "linux" else "spawn"
        self._processes: Any = multiprocessing.get_context(method)
        self._running: list[BaseProcess] = []
        self._owner, self._parent = os.getpid(), os.getppid()

    def get_eligible_capacity(self, types: set[Any], **_: Any) -> tuple[set[Any], set[str]]:
        """Accept tasks of every type, so that a refused task gets an answer at once."""
        return types, set()

    def wait_for_capacity(self, *_: Any, **__: Any) -> None:
        """Return at once, because the number of tasks is not limited here."""

    def launch(self, spec: Any) -> Any:
        """Answer a task in a new process."""
        process = self._processes.Process(target=answer, args=(spec, self._digests))
        process.start()
        self._running.append(process)
        executor: Any = importlib.import_module("flwr.supercore.superexec.executor")
        return executor.LaunchResult.accepted()

    def reconcile(self) -> None:
        """Forget the processes that have ended, and end if the program that started this one has.

        Flower calls this method before it asks for each task.
        """
        self._running = [process for process in self._running if process.is_alive()]
        if os.getppid() != self._parent:
            signal.raise_signal(signal.SIGTERM)

    def close(self) -> None:
        """Terminate the processes that still answer. A copy of this process ends none."""
        if os.getpid() == self._owner:
            for process in self._running:
                process.terminate()


class ShortPauses:
    """Takes the place of the module `time` in the loop of Flower's SuperNode.

    The loop sleeps half a second while the executor works on a reply, and three seconds if the
    SuperLink had no message.
    """

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep
        self._waited = 0.0  # seconds since the last message

    def sleep(self, seconds: float) -> None:
        """Sleep for a shorter time than the loop asks for."""
        if seconds < 1.0:
            self._waited = 0.0
            self._sleep(REPLY_PAUSE)
            return
        pause = min(max(SHORTEST_PAUSE, GROWTH * self._waited), seconds)
        self._waited += pause
        self._sleep(pause)


def run_supernode() -> None:
    """Run Flower's SuperNode with short pauses, and end it if its parent ends."""
    importlib.import_module(SUPERNODE).time = ShortPauses()  # type: ignore[attr-defined]
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_PAUSE)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    importlib.import_module("flwr.supernode.cli").flower_supernode()


def import_everything() -> None:
    """Import all that a message needs, so that no message waits for an import.

    This process must not compute and must not use a GPU. A copy of it could then use neither the
    threads of PyTorch nor CUDA.
    """
    importlib.import_module("nanogpt_flower.client_app")
    importlib.import_module(CLIENTAPP)
    # The first optimizer of a process imports a part of torch.
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


def run_executor(digests: Collection[str]) -> None:
    """Run Flower's SuperExec with an executor that answers with the installed ClientApp."""
    import_everything()
    superexec: Any = importlib.import_module(SUPEREXEC)
    superexec.get_executor = lambda *_, **__: ForkingExecutor(digests)
    importlib.import_module("flwr.supercore.cli").flower_superexec()


def main() -> None:
    """Run one of the two programs."""
    role = sys.argv.pop(1)
    if role == "supernode":
        run_supernode()
    else:
        digests = frozenset(sys.argv.pop(1).split(","))
        run_executor(digests)


if __name__ == "__main__":
    main()
