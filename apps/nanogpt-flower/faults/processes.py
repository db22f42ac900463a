"""A SuperLink and SuperNodes on this machine, whose processes can be stopped and killed."""

import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import psutil
import tomli_w

from faults.matrix import Unexpected
from faults.runs import ALL, HONEST, Finished, learn_labels, new_clients, settings
from nanogpt_flower import progress
from nanogpt_flower.local.app_directory import write_app
from nanogpt_flower.local.federation import free_port, program
from nanogpt_flower.local.processes import FEDERATION_ID, stop_processes

CLOCK = Path(__file__).with_name("clock")
ENDED = ("finished:completed", "finished:failed", "finished:stopped")
POLL_SECONDS = 0.2


class Deployment:
    """A SuperLink and SuperNodes with the parts and states of the honest clients.

    All processes listen on 127.0.0.1 alone. Use the class as a context manager, which stops them.

    Args:
        directory: an empty directory, for the states, the logs and the run.
        numbers: the clients.
        database: True if the SuperLink keeps its nodes and runs in a file.
        changes: changed settings of the run, with "_" in place of "-".
    """

    def __init__(
        self,
        directory: Path,
        numbers: Sequence[int] = HONEST,
        *,
        database: bool = False,
        **changes: Any,
    ) -> None:
        self.directory = directory
        self.clients = new_clients(directory, numbers, of=len(ALL))
        self.port = free_port()
        self.home = directory / "home"
        self.home.mkdir()
        self.database = ["--database", str(self.home / "superlink.db")] if database else []
        self._id = uuid.uuid4().hex
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._events = directory / "events.jsonl"
        self.clock_file = directory / "clocks-are-wrong"
        paths = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
        self._environment = os.environ | {
            "PATH": os.pathsep.join(paths),
            "FLWR_HOME": str(self.home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
            "OMP_NUM_THREADS": "1",
            FEDERATION_ID: self._id,
            progress.VARIABLE: str(self._events),
        }
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "local"\n\n[superlink.local]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        self.app = write_app(directory / "app")
        given = {"min-clients": len(numbers), "output-dir": str(directory), "run-name": "run"}
        given |= {key.replace("_", "-"): value for key, value in changes.items()}
        self.run_config = settings(given)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        stop_processes(self._id)
        for process in self._started.values():
            process.wait()

    # --- starting

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a program in the background. Its output is appended to `<home>/<name>.log`."""
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=self._environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started[name] = process
        return process

    def start_all(self) -> None:
        """Start the SuperLink and all SuperNodes."""
        self.start_superlink()
        for number in self.clients:
            self.start_supernode(number)

    def start_superlink(self) -> None:
        """Start the SuperLink, always on the same port, and wait until it answers."""
        self.start(
            "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port",
            str(self.port), *self.database,
        )  # fmt: skip
        self.wait(lambda: listens(self.port), "the SuperLink listens")

    def start_supernode(self, number: int, *, port: int = 0, ahead: float = 0.0) -> None:
        """Start the SuperNode of a client.

        Args:
            number: the client.
            port: where it finds the SuperLink, if not at the SuperLink's own port.
            ahead: seconds by which its clock is ahead once `clock_file` exists.
        """
        pairs = [f"{key}='{value}'" for key, value in self.clients[number].node_config.items()]
        path = os.pathsep.join([str(CLOCK), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        clock = {"FAULT_CLOCK_SECONDS": str(ahead), "FAULT_CLOCK_FILE": str(self.clock_file)}
        clock = {"PYTHONPATH": path, **clock} if ahead else {}
        self.start(
            f"supernode-{number}", "flower-supernode", "--insecure", "--superlink",
            f"127.0.0.1:{port or self.port}", "--port", str(free_port()), "--node-config",
            " ".join(pairs), **clock,
        )  # fmt: skip

    def submit(self, *, resume: bool = False) -> None:
        """Start the run with `flwr run`, or resume it."""
        config = self.directory / "run-config.toml"
        more = {"resume-from": str(self.directory / "run")} if resume else {}
        config.write_text(tomli_w.dumps(self.run_config | more), encoding="utf-8")
        self.start(
            "run", "flwr", "run", str(self.app), "local", "--stream", "--run-config", str(config)
        )

    # --- watching

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
        """Wait until a condition holds.

        Raises:
            Unexpected: the condition does not hold in time. The error quotes the logs.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Unexpected(f"after {seconds:g} s still not: {what}; {self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return what the processes of the run have reported, such as "round" events."""
        text = self._events.read_text(encoding="utf-8") if self._events.exists() else ""
        lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
        return [event for event in map(json.loads, lines) if event.get("event") == kind]

    def wait_for_round(self, server_round: int) -> None:
        """Wait until a round has ended."""
        self.wait(
            lambda: any(e["round"] >= server_round for e in self.events("round")),
            f"round {server_round} has ended",
        )

    def wait_for_work(self, number: int) -> None:
        """Wait until a client works on a message."""
        name = f"supernode-{number}"
        self.wait(lambda: self.named(name, "flwr-clientapp"), f"{name} works on a message")

    def wait_for_end(self, seconds: float = 180.0) -> str:
        """Wait until the run has ended, and return its status."""
        self.wait(lambda: self._started["run"].poll() is not None, "`flwr run` has ended", seconds)
        deadline = time.monotonic() + 30.0
        while (status := self.status()) not in ENDED and time.monotonic() < deadline:
            time.sleep(1.0)
        return status

    def status(self) -> str:
        """Return the status of the newest run."""
        listed = subprocess.run(
            [program("flwr"), "list", "local", "--format", "json"],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            return str(json.loads(listed.stdout)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError):
            return "unknown"

    def finished(self) -> Finished:
        """Return the run, with the labels of its clients."""
        learn_labels(self.clients, self.run_config)
        grid: Any = SimpleNamespace(clients=self.clients)
        return Finished(self.directory / "run", grid, self.log("run"))

    def log(self, name: str) -> str:
        """Return the log of a program."""
        path = self.home / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def log_tail(self) -> str:
        """Return the last lines of the run's log."""
        return " / ".join(self.log("run").splitlines()[-4:])

    # --- hurting

    def tree(self, name: str) -> list[psutil.Process]:
        """Return a program and all that it has started."""
        try:
            process = psutil.Process(self._started[name].pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def named(self, name: str, part: str) -> list[psutil.Process]:
        """Return the processes of a program with a name, such as "flwr-clientapp"."""
        found = []
        for process in self.tree(name):
            try:
                if part in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def signal(self, processes: Sequence[psutil.Process], number: signal.Signals) -> None:
        """Send a signal to processes."""
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def kill(self, name: str) -> None:
        """Kill a program and all that it has started, as a crash of its machine does."""
        processes = self.tree(name)
        self.signal(processes, signal.SIGKILL)
        self._started[name].wait()
        psutil.wait_procs(processes, timeout=10)


def listens(port: int) -> bool:
    """Tell whether a program listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
