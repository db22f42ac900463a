"""Start a Flower federation on this machine, run an app once, and stop the federation.

`flwr run` exits with status 0 even if the run has failed. It also leaves a SuperLink running, and
later runs use that SuperLink with its old environment. This module gives each run its own
`FLWR_HOME`, ports and processes. At the end of the run, or after Ctrl-C, it stops every process
that it has started.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import psutil
import tomli_w

from nanogpt_flower.interrupts import deferred
from nanogpt_flower.local.processes import FEDERATION_ID, processes, stop_processes

CONNECTION = "local"  # the SuperLink's name in Flower's config.toml
START_SECONDS = 60.0  # a SuperLink that takes longer to answer has failed
POLL_SECONDS = 0.2  # time between two looks at the processes of a run


class LocalRunError(RuntimeError):
    """The error for a federation that did not start or a run that failed. The message says why."""


def program(name: str) -> str:
    """Return the path of a program in the Python environment of this process.

    An absolute path stays as it is.
    """
    return str(Path(sysconfig.get_path("scripts")) / name)


def free_port() -> int:
    """Return a port of 127.0.0.1 that no program uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Federation:
    """A new SuperLink and its SuperNodes, which are processes on this machine.

    Use it as a context manager. At the end of the context, all processes of the federation are
    stopped.

    Args:
        home: a directory for Flower's files and for the logs of the processes.
        environment: environment variables for all processes.
    """

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.port = free_port()
        self._id = uuid.uuid4().hex
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._watch: subprocess.Popen[bytes] | None = None
        self._environment = os.environ | {
            # Flower starts its own programs by name, so their directory must be in PATH.
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(home),
            # The environment of this process has all dependencies of the app.
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_DEDUP_LOGS": "0",  # else Ray merges similar progress lines of two clients
            FEDERATION_ID: self._id,
            **(environment or {}),
        }
        home.mkdir(parents=True, exist_ok=True)
        self.connect(insecure=True)

    def __enter__(self) -> Self:
        # If this process is killed, it cannot stop the federation. Then its watcher does it.
        with deferred():
            self._watch = subprocess.Popen(
                [sys.executable, "-m", "nanogpt_flower.local.watch", self._id, str(self.home)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        with deferred():
            self.stop()
            if self._watch is not None:
                self._watch.communicate()  # closes the pipe, so the watcher ends

    def connect(self, **options: str | bool) -> None:
        """Write how Flower's programs reach the SuperLink. The options have "_" in place of "-"."""
        options = {key.replace("_", "-"): value for key, value in options.items()}
        connection = {"address": f"127.0.0.1:{self.port}", **options}
        config = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        (self.home / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")

    def start(
        self, name: str, command: Sequence[str], **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start one of Flower's programs in the background. Its log is `<home>/<name>.log`."""
        with deferred(), (self.home / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=environment | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # In its own session the program does not receive Ctrl-C. `stop` ends it instead.
                start_new_session=True,
            )
            self._started[name] = process
        return process

    def start_superlink(self, *options: str) -> None:
        """Start a SuperLink without TLS, and wait until it accepts connections.

        Raises:
            LocalRunError: if the SuperLink ends, or if it accepts no connections within a minute.
                The message quotes the log of the SuperLink.
        """
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port"]
        self.start("superlink", [*command, str(self.port), *options])
        self.wait_for("superlink", self.port)

    def wait_for(self, name: str, port: int) -> None:
        """Wait until a program that was started accepts connections.

        Raises:
            LocalRunError: if the program ends, or if it accepts no connections within a minute. The
                message quotes the log of the program.
        """
        deadline = time.monotonic() + START_SECONDS
        while self._started[name].poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise LocalRunError(f"the {name} did not start: {self.log_tail(name)}")

    def call(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run one of Flower's programs to its end, and return its status and its output."""
        with deferred():
            return subprocess.run(
                [program(command[0]), *command[1:]],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )

    def start_supernode(self, name: str, node_config: str, *, threads: int = 1) -> None:
        """Start a SuperNode in which PyTorch uses `threads` threads.

        By default PyTorch uses one thread for each core. If several SuperNodes share the same
        cores, their threads wait for each other, and a training step becomes many times slower. If
        the user has set `OMP_NUM_THREADS`, its value is used instead of `threads`.
        """
        addresses = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        command = ["flower-supernode", "--insecure", *addresses, "--node-config", node_config]
        self.start(name, command, OMP_NUM_THREADS=str(threads))

    def run(
        self,
        app: Path,
        run_config: Mapping[str, Any],
        *options: str,
        log: Path | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run the app with `flwr run --stream` and wait until the run has ended.

        Args:
            app: the directory of the app.
            run_config: the settings that differ from the app's.
            options: further options of `flwr run`.
            log: the file to which the output of the run is appended, by default `<home>/run.log`.
            is_over: a function that is called about five times a second. If it returns True, the
                app has done all its work, and this method does not wait for Flower to end the run,
                which takes five seconds.

        Raises:
            LocalRunError: if the run did not start or did not complete, or if the SuperLink or a
                SuperNode ended during the run. In the last case, the message quotes the log of the
                program that ended.
        """
        config = self.home / "run-config.toml"
        config.write_text(tomli_w.dumps(run_config), encoding="utf-8")
        command = [program("flwr"), "run", str(app), "--stream", *options]
        command += ["--run-config", str(config)] if run_config else []
        log = log or self.home / "run.log"
        with deferred(), log.open("ab") as output:
            flwr_run = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._started["flwr run"] = flwr_run
        while flwr_run.poll() is None:
            time.sleep(POLL_SECONDS)
            if is_over():
                return
            for name, process in self._started.items():
                if process is not flwr_run and process.poll() is not None:
                    raise LocalRunError(f"{name} ended during the run: {self.log_tail(name)}")
        if is_over():
            return
        if flwr_run.returncode:
            raise LocalRunError(f"`flwr run` did not start the run: {tail(log)}")
        status, details = self._run_status()
        if status != "finished:completed":
            raise LocalRunError(details or f"the status of the run is {status}")

    def _run_status(self) -> tuple[str, str]:
        """Ask Flower for the status of the newest run, and for the details of this status."""
        listed = self.call(["flwr", "list", "--format", "json"])
        listed.check_returncode()
        newest = json.loads(listed.stdout)["runs"][0]
        return newest["status"], newest.get("status-details", "")

    def log_tail(self, name: str) -> str:
        """Return the last lines of a program's log."""
        return tail(self.home / f"{name}.log")

    def processes(self) -> set[psutil.Process]:
        """Find all running processes that this federation or one of its processes has started."""
        return processes(self._id)

    def stop(self) -> None:
        """Terminate every process, and wait until all processes have ended.

        Processes that still run after ten seconds are killed.
        """
        stop_processes(self._id)
        for started in self._started.values():
            started.wait()


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@contextmanager
def temporary_federation(environment: Mapping[str, str]) -> Iterator[Federation]:
    """Create a federation in a temporary directory. Stop it and delete the directory at the end."""
    home = Path(tempfile.mkdtemp(prefix="nanogpt-flower-"))
    try:
        with Federation(home, environment) as federation:
            yield federation
    finally:
        with deferred():
            shutil.rmtree(home, ignore_errors=True)
