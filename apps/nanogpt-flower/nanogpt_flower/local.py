"""Start a Flower federation on this machine, run the app once, and stop the federation.

`flwr run` exits with status 0 even if the run has failed. It also leaves a SuperLink running, and
later runs use that SuperLink with its old environment. This module gives each run its own
`FLWR_HOME`, ports and processes. It exits with status 0 only if the run has completed. At the end
of the run, or after Ctrl-C, the module stops every process that it has started.

    python -m nanogpt_flower.local simulate quick --app apps/nanogpt-flower
    python -m nanogpt_flower.local deploy quick num-server-rounds=2 --app apps/nanogpt-flower
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil
import tomli_w
import torch

from nanogpt_flower.artifacts import RunDirectory, writable_directory
from nanogpt_flower.composition import NO_CORPUS, compression, parts, runtime, sample_prompt
from nanogpt_flower.settings import Settings
from shakespeare_data import CORPORA, CharTokenizer, load_corpus, partition

CONNECTION = "local"  # the SuperLink's name in Flower's config.toml
FEDERATION_ID = "NANOGPT_FLOWER_FEDERATION"  # environment variable that marks each process
# A shell can start a background job with SIGINT ignored. Python then does not turn SIGINT into a
# KeyboardInterrupt, so SIGINT needs a handler too. Windows has no SIGHUP.
ENDING_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
START_SECONDS = 60.0  # a SuperLink that takes longer to answer has failed
STOP_SECONDS = 10.0  # a process that takes longer to end is killed


class LocalRunError(RuntimeError):
    """The error for a federation that did not start or a run that failed. The message says why."""


def program(name: str) -> str:
    """Return the path of a program in the Python environment of this process."""
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
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self._id = uuid.uuid4().hex
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {
            # Flower starts its own programs by name, so their directory must be in PATH.
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(home),
            "RAY_DEDUP_LOGS": "0",  # else Ray merges similar progress lines of two clients
            FEDERATION_ID: self._id,
        }
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n',
            encoding="utf-8",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self, name: str, command: Sequence[str], **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start one of Flower's programs in the background. Its log is `<home>/<name>.log`."""
        with (self.home / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=environment | self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                # In its own session the program does not receive Ctrl-C. `stop` ends it instead.
                start_new_session=True,
            )
        self._started[name] = process
        return process

    def start_superlink(self, *options: str) -> None:
        """Start the SuperLink and wait until it accepts connections.

        Raises:
            LocalRunError: if the SuperLink ends, or if it accepts no connections within a minute.
                The message quotes the log of the SuperLink.
        """
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port"]
        process = self.start("superlink", [*command, str(self.port), *options])
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise LocalRunError(f"the SuperLink did not start: {self.log_tail('superlink')}")

    def start_supernode(self, name: str, node_config: str, *, threads: int = 1) -> None:
        """Start a SuperNode in which PyTorch uses `threads` threads.

        By default PyTorch uses one thread for each core. If several SuperNodes share the same
        cores, their threads wait for each other, and a training step becomes many times slower. If
        the user has set `OMP_NUM_THREADS`, its value is used instead of `threads`.
        """
        addresses = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        command = ["flower-supernode", "--insecure", *addresses, "--node-config", node_config]
        self.start(name, command, OMP_NUM_THREADS=str(threads))

    def run(self, app: Path, run_config: Mapping[str, Any], *options: str) -> None:
        """Run the app with `flwr run --stream` and wait until the run has ended.

        Raises:
            LocalRunError: if the run did not start or did not complete, or if the SuperLink or a
                SuperNode ended during the run. In the last case, the message quotes the log of the
                program that ended.
        """
        config = self.home / "run-config.toml"
        config.write_text(tomli_w.dumps(run_config), encoding="utf-8")
        command = [program("flwr"), "run", str(app), CONNECTION, "--stream", *options]
        command += ["--run-config", str(config)] if run_config else []
        with subprocess.Popen(command, env=self._environment) as flwr_run:
            while flwr_run.poll() is None:
                time.sleep(0.5)
                for name, process in self._started.items():
                    if process.poll() is not None:
                        flwr_run.terminate()
                        raise LocalRunError(f"{name} ended during the run: {self.log_tail(name)}")
        if flwr_run.returncode:
            raise LocalRunError("`flwr run` did not start the run; see its message above")
        status, details = self._run_status()
        if status != "finished:completed":
            raise LocalRunError(details or f"the status of the run is {status}; see the log above")

    def _run_status(self) -> tuple[str, str]:
        """Ask Flower for the status of the newest run, and for the details of this status."""
        listed = subprocess.run(
            [program("flwr"), "list", CONNECTION, "--format", "json"],
            env=self._environment,
            check=True,
            capture_output=True,
            text=True,
        )
        newest = json.loads(listed.stdout)["runs"][0]
        return newest["status"], newest.get("status-details", "")

    def log(self, name: str) -> list[str]:
        """Return the lines that a program has logged so far."""
        text = (self.home / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return text.splitlines()

    def log_tail(self, name: str, lines: int = 15) -> str:
        """Return the last lines of a program's log."""
        return "\n".join(self.log(name)[-lines:])

    def log_summary(self, name: str) -> str:
        """Return the lines in a SuperNode's log that name the SuperNode's text or an error."""
        kept = ("trains on", "ERROR", "Error:")
        return "\n".join(line for line in self.log(name) if any(word in line for word in kept))

    def processes(self) -> set[psutil.Process]:
        """Find all running processes that this federation or one of its processes has started."""
        marked = {process for process in psutil.process_iter() if self._is_marked(process)}
        # Ray's agents overwrite their environment when they rename themselves. The parents of
        # these agents still have the mark, so the agents are found as children.
        return marked.union(*(_descendants(process) for process in marked))

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(FEDERATION_ID) == self._id)
        except (psutil.Error, OSError):
            return False  # the process belongs to another user or has ended

    def stop(self) -> None:
        """Terminate every process, and wait until all processes have ended.

        Processes that still run after ten seconds are killed.
        """
        terminated: set[psutil.Process] = set()
        deadline = time.monotonic() + STOP_SECONDS
        # A process may start a new process while it ends, so look for new processes each time.
        while living := {process for process in self.processes() | terminated if _lives(process)}:
            late = time.monotonic() > deadline
            for process in living if late else living - terminated:
                _end(process, kill=late)
            terminated |= living
            psutil.wait_procs(living, timeout=0.2)
        for started in self._started.values():
            started.wait()


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


def read_run_config(app: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Read the arguments `[preset] [key=value ...]` and return the run config that they describe.

    Each override `key=value` changes a setting of the preset or adds a setting. The default preset
    is "quick". The preset "full" is empty, so the app's defaults apply.

    Raises:
        LocalRunError: if the preset does not exist, or if an override is not of the form
            `key=value`.
    """
    preset, overrides = "quick", list(arguments)
    if overrides and "=" not in overrides[0]:
        preset = overrides.pop(0)
    presets = {path.stem: path for path in sorted((app / "presets").glob("*.toml"))}
    if preset != "full" and preset not in presets:
        known = ", ".join(["full", *presets])
        raise LocalRunError(f"the preset is {preset!r}; it must be one of {known}")
    config: dict[str, Any] = {}
    if preset != "full":
        config = tomllib.loads(presets[preset].read_text(encoding="utf-8"))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key or not equals:
            raise LocalRunError(f"the override is {override!r}; it must be key=value")
        config[key] = _value(value)
    return config


def _value(text: str) -> Any:
    """Parse a TOML value. If the text is not a TOML value, return the text itself.

    A string value is often not valid TOML here, because the shell has removed its quotes.
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def make_paths_absolute(run_config: dict[str, Any]) -> None:
    """Make the paths in a run config absolute.

    The paths then do not depend on the directory in which the SuperLink or a client runs. If
    `output-dir` is missing, its default is added first.

    Raises:
        LocalRunError: if a path begins with the home directory of an unknown user.
    """
    run_config.setdefault("output-dir", Settings().output_dir)
    for key in ("output-dir", "resume-from", "client-state", "corpus"):
        value = run_config.get(key)
        if not isinstance(value, str) or not value:
            continue
        if key == "corpus" and value in (*CORPORA, NO_CORPUS):
            continue
        try:
            path = Path(value).expanduser().resolve()
        except RuntimeError as error:
            raise LocalRunError(f"{key} is {value!r}: {error}") from error
        if key != "corpus" or path.exists():  # else `load_corpus` explains the unknown name
            run_config[key] = str(path)


def check_run_config(run_config: Mapping[str, Any], num_clients: int) -> None:
    """Check the settings as the ServerApp does, but before any program starts.

    Raises:
        ValueError: if a setting cannot work. The message names the setting and what is allowed.
    """
    settings = Settings.from_run_config(run_config)
    runtime(settings)
    compression(settings)
    corpus = None if settings.corpus == NO_CORPUS else load_corpus(settings.corpus)
    if corpus is not None:
        tokenizer = CharTokenizer.from_text(corpus.text)
        sample_prompt(settings, tokenizer)
        parts(settings, corpus, tokenizer, num_clients)
    if settings.resume_from:
        RunDirectory.resume(settings, corpus)
    else:
        writable_directory(settings.output_dir)


def simulate(app: Path, run_config: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Run the app once in Flower's Simulation Runtime."""
    federation_config = {
        "num-supernodes": options.num_clients,
        "client-resources-num-cpus": options.cpus or 1,
        "client-resources-num-gpus": options.gpus or 0.0,
    }
    pairs = " ".join(f"{key}={value}" for key, value in federation_config.items())
    with _temporary_federation() as federation:
        federation.start_superlink("--simulation", "--isolation", "subprocess")
        federation.run(app, run_config, "--federation-config", pairs)


def deploy(app: Path, run_config: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Run the app once in Flower's Deployment Runtime.

    The text is divided into parts, one for each client. Each SuperNode gets a directory with one
    part.
    """
    corpus = str(run_config.get("corpus", "auto"))
    text = load_corpus("auto" if corpus == NO_CORPUS else corpus)
    with _temporary_federation() as federation:
        directories = partition(text, options.num_clients).write(federation.home / "datasets")
        federation.start_superlink()
        names = [f"supernode-{number}" for number in range(options.num_clients)]
        threads = max(1, (os.cpu_count() or 1) // options.num_clients)
        for name, directory in zip(names, directories, strict=True):
            federation.start_supernode(name, f"data-path='{directory}'", threads=threads)
        try:
            federation.run(app, run_config)
        finally:
            for name in names:
                print(f"--- log of {name}\n{federation.log_summary(name)}", flush=True)


@contextmanager
def _temporary_federation() -> Iterator[Federation]:
    with (
        tempfile.TemporaryDirectory(prefix="nanogpt-flower-") as home,
        Federation(Path(home)) as federation,
    ):
        yield federation


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app once and return the exit status, which is 0 only if the run has completed."""
    parser = argparse.ArgumentParser(
        prog="python -m nanogpt_flower.local",
        description="Run the app once in a Flower federation on this machine.",
    )
    parser.add_argument(
        "runtime", choices=("simulate", "deploy"), help="simulated clients, or real SuperNodes"
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="[preset] key=value",
        help="a preset (default: quick; full is the app's defaults), then settings",
    )
    parser.add_argument("--app", type=Path, required=True, help="directory of the app")
    parser.add_argument("--num-clients", type=int, default=2, help="number of clients (default: 2)")
    parser.add_argument(
        "--cpus", type=int, help="simulate only: CPU cores of each client (default: 1)"
    )
    parser.add_argument(
        "--gpus", type=float, help="simulate only: share of a GPU of each client (default: 0)"
    )
    options = parser.parse_intermixed_args(argv)
    try:
        check_resources(options)
    except ValueError as error:
        parser.error(str(error))
    for number in ENDING_SIGNALS:
        signal.signal(number, _interrupt)
    try:
        run_config = read_run_config(options.app, options.arguments)
        run_config.setdefault("min-clients", options.num_clients)
        make_paths_absolute(run_config)
        check_run_config(run_config, options.num_clients)
        run = simulate if options.runtime == "simulate" else deploy
        run(options.app, run_config, options)
    except (LocalRunError, ValueError) as error:
        print(f"{options.runtime}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{options.runtime}: interrupted; all processes have been stopped", file=sys.stderr)
        return 130
    return 0


def check_resources(options: argparse.Namespace) -> None:
    """Check the number of clients, and the number of cores and GPUs for each client.

    Raises:
        ValueError: if an option is not allowed or asks for more than this machine has. The message
            names the option.
    """
    clients, cpus, gpus = options.num_clients, options.cpus, options.gpus
    if clients < 1:
        raise ValueError(f"--num-clients is {clients}; it must be at least 1")
    if options.runtime == "deploy":
        for name, value in {"--cpus": cpus, "--gpus": gpus}.items():
            if value is not None:
                raise ValueError(f"{name} is for simulate; with deploy, SuperNodes share the cores")
    num_cores, num_gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if cpus is not None and not 1 <= cpus <= num_cores:
        raise ValueError(
            f"--cpus is {cpus}; it must be from 1 to {num_cores}, this machine's number of cores"
        )
    if gpus is not None and not 0 <= gpus <= num_gpus:
        raise ValueError(
            f"--gpus is {gpus:g}; it must be from 0 to {num_gpus}, the number of GPUs that PyTorch "
            "finds"
        )


def _interrupt(signum: int, frame: FrameType | None) -> None:
    for number in ENDING_SIGNALS:  # a second Ctrl-C must not interrupt `Federation.stop`
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
