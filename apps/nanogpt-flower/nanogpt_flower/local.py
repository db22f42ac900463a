"""A Flower federation on this machine for one run: processes on loopback that end with it.

`flwr run` alone exits 0 when the run failed, and leaves a SuperLink behind that later runs reuse
with the environment of today. Here a run has a `FLWR_HOME`, ports and processes of its own, its
outcome is the exit status, and nothing is left running, after Ctrl-C too.

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
from nanogpt_flower.composition import NO_CORPUS, parts, runtime, sample_prompt
from nanogpt_flower.settings import Settings
from shakespeare_data import CORPORA, CharTokenizer, load_corpus, partition

CONNECTION = "here"
MARK = "NANOGPT_FLOWER_LOCAL"  # in the environment of every process that a federation starts
# SIGINT too: a shell's background jobs are started with it ignored. Windows has no SIGHUP.
ENDING_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
START_SECONDS = 60.0
END_SECONDS = 10.0


class LocalRunError(RuntimeError):
    """The federation could not start, or its run failed; the message says why."""


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Federation:
    """A SuperLink with an empty state, and whatever joins it; a context manager that ends them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self._mark = uuid.uuid4().hex
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = os.environ | {
            # Flower starts its own programs by bare name
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(home),
            "RAY_DEDUP_LOGS": "0",  # else Ray takes two clients' progress for one line
            MARK: self._mark,
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
        self.end()

    def start(
        self, name: str, command: Sequence[str], **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start one of Flower's programs in the background, its log in `<home>/<name>.log`."""
        with (self.home / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=environment | self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
            )
        self._started[name] = process
        return process

    def start_superlink(self, *options: str) -> None:
        """Start the SuperLink and wait until it answers.

        Raises:
            LocalRunError: if it ends or does not answer within a minute; its log is quoted.
        """
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port"]
        process = self.start("superlink", [*command, str(self.port), *options])
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise LocalRunError(f"the SuperLink did not start: {self.tail('superlink')}")

    def start_supernode(self, name: str, node_config: str, *, threads: int = 1) -> None:
        """Start a SuperNode that joins the SuperLink, and computes with that many threads.

        By default PyTorch takes a thread a core in each of them, and threads that wait for each
        other on shared cores make a step many times slower. `OMP_NUM_THREADS`, if set, decides.
        """
        link = ["--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        command = ["flower-supernode", "--insecure", *link, "--node-config", node_config]
        self.start(name, command, OMP_NUM_THREADS=str(threads))

    def run(self, app: Path, run_config: Mapping[str, Any], *options: str) -> None:
        """`flwr run`, streamed, to the end of the run.

        Raises:
            LocalRunError: if the run could not be started or did not complete, or if a program of
                the federation ended before it; its log is quoted.
        """
        config = self.home / "run-config.toml"
        config.write_text(tomli_w.dumps(run_config), encoding="utf-8")
        command = [program("flwr"), "run", str(app), CONNECTION, "--stream", *options]
        command += ["--run-config", str(config)] if run_config else []
        with subprocess.Popen(command, env=self._environment) as streaming:
            while streaming.poll() is None:
                time.sleep(0.5)
                for name, started in self._started.items():
                    if started.poll() is not None:
                        streaming.terminate()
                        raise LocalRunError(f"{name} ended during the run: {self.tail(name)}")
        if streaming.returncode:
            raise LocalRunError("`flwr run` did not start the run; its message stands above")
        status, details = self.outcome()
        if status != "finished:completed":
            raise LocalRunError(details or f"the run ended {status}; see the log above")

    def outcome(self) -> tuple[str, str]:
        """Status and details of the newest run."""
        listed = subprocess.run(
            [program("flwr"), "list", CONNECTION, "--format", "json"],
            env=self._environment,
            check=True,
            capture_output=True,
            text=True,
        )
        newest = json.loads(listed.stdout)["runs"][0]
        return newest["status"], newest.get("status-details", "")

    def tail(self, name: str, lines: int = 15) -> str:
        """The end of a program's log."""
        text = (self.home / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def told(self, name: str) -> str:
        """What a SuperNode's log says of data and errors, without the steps."""
        text = (self.home / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        kept = ("trains on", "ERROR", "Error:")
        return "\n".join(line for line in text.splitlines() if any(k in line for k in kept))

    def processes(self) -> set[psutil.Process]:
        """Every living process that this federation started, however far down."""
        marked = {process for process in psutil.process_iter() if self._is_marked(process)}
        # Ray's agents rename themselves over their environment; their parents still have it
        return marked.union(*(_descendants(process) for process in marked))

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(MARK) == self._mark)
        except (psutil.Error, OSError):
            return False  # another user's, or already gone

    def end(self) -> None:
        """End them all: asked first, killed after ten seconds."""
        asked: set[psutil.Process] = set()
        deadline = time.monotonic() + END_SECONDS
        while living := {process for process in self.processes() | asked if _lives(process)}:
            late = time.monotonic() > deadline
            for process in living if late else living - asked:
                _end(process, kill=late)
            asked |= living
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


def program(name: str) -> str:
    """The path of a program of this very environment, whatever is on PATH."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def read_run_config(app: Path, preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The keys of a preset ("full" has none), then each `key=value` on top.

    Raises:
        LocalRunError: for an unknown preset, or an override without a key.
    """
    names = sorted(path.stem for path in (app / "presets").glob("*.toml"))
    if preset != "full" and preset not in names:
        raise LocalRunError(f"the preset is {preset!r}; there are {', '.join(['full', *names])}")
    config: dict[str, Any] = {}
    if preset != "full":
        config = tomllib.loads((app / "presets" / f"{preset}.toml").read_text(encoding="utf-8"))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not key or not equals:
            raise LocalRunError(f"the override is {override!r}; it must be key=value")
        config[key] = _value(value)
    corpus = str(config.get("corpus", ""))
    if corpus and corpus not in (*CORPORA, NO_CORPUS) and Path(corpus).exists():
        config["corpus"] = str(Path(corpus).resolve())
    return config


def _value(text: str) -> Any:
    """A TOML value; what is none is a text, whose quotes a shell has taken."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def check(run_config: Mapping[str, Any], num_clients: int) -> None:
    """Refuse at once, in one line, what the ServerApp would refuse once all programs have started.

    Raises:
        ValueError: naming what cannot work and what is allowed.
    """
    settings = Settings.from_run_config(run_config)
    runtime(settings)
    if settings.corpus != NO_CORPUS:
        corpus = load_corpus(settings.corpus)
        tokenizer = CharTokenizer.from_text(corpus.text)
        sample_prompt(settings, tokenizer)
        parts(settings, corpus, tokenizer, num_clients)
    if settings.resume_from:
        RunDirectory.resume(settings)
    else:
        writable_directory(settings.output_dir)


def simulate(app: Path, run_config: Mapping[str, Any], options: argparse.Namespace) -> None:
    """One run in the Simulation Runtime."""
    size = {
        "num-supernodes": options.num_clients,
        "client-resources-num-cpus": options.cpus or 1,
        "client-resources-num-gpus": options.gpus or 0.0,
    }
    with _temporary_federation() as federation:
        federation.start_superlink("--simulation", "--isolation", "subprocess")
        pairs = " ".join(f"{key}={value}" for key, value in size.items())
        federation.run(app, run_config, "--federation-config", pairs)


def deploy(app: Path, run_config: Mapping[str, Any], options: argparse.Namespace) -> None:
    """One run in the Deployment Runtime: a SuperNode a part, each with its own directory."""
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
                print(f"--- log of {name}\n{federation.told(name)}", flush=True)


@contextmanager
def _temporary_federation() -> Iterator[Federation]:
    with (
        tempfile.TemporaryDirectory(prefix="nanogpt-flower-") as home,
        Federation(Path(home)) as federation,
    ):
        yield federation


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 0 only if the run completed."""
    parser = argparse.ArgumentParser(prog="python -m nanogpt_flower.local")
    parser.add_argument("runtime", choices=("simulate", "deploy"))
    parser.add_argument("arguments", nargs="*", metavar="[preset] key=value")
    parser.add_argument("--app", type=Path, required=True, help="the app's directory")
    parser.add_argument("--num-clients", type=int, default=2, help="at least 1 (2)")
    parser.add_argument("--cpus", type=int, help="simulate: cores of a client (1)")
    parser.add_argument("--gpus", type=float, help="simulate: a client's share of a GPU (0)")
    options = parser.parse_intermixed_args(argv)
    if wrong := wrong_size(options):
        parser.error(wrong)
    preset = "quick"
    overrides: list[str] = options.arguments
    if overrides and "=" not in overrides[0]:
        preset, *overrides = overrides
    for ending in ENDING_SIGNALS:
        signal.signal(ending, _interrupt)
    try:
        config = read_run_config(options.app, preset, overrides)
        config.setdefault("output-dir", "runs")
        for key in ("output-dir", "resume-from", "client-state"):  # the SuperLink is elsewhere
            if config.get(key):
                config[key] = str(Path(config[key]).expanduser().resolve())
        config.setdefault("min-clients", options.num_clients)
        check(config, options.num_clients)
        run = simulate if options.runtime == "simulate" else deploy
        run(options.app, config, options)
    except (LocalRunError, ValueError) as error:
        print(f"{options.runtime}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{options.runtime}: interrupted; every process has ended", file=sys.stderr)
        return 130
    return 0


def wrong_size(options: argparse.Namespace) -> str:
    """What is wrong with the number of clients and their shares of this machine, if anything."""
    if options.num_clients < 1:
        return f"--num-clients is {options.num_clients}; it must be at least 1"
    if options.runtime == "deploy":
        given = [name for name in ("cpus", "gpus") if getattr(options, name) is not None]
        return f"--{given[0]} is for simulate; SuperNodes share this machine" if given else ""
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    if options.cpus is not None and not 1 <= options.cpus <= cores:
        return f"--cpus is {options.cpus}; it must be from 1 to {cores}, this machine's cores"
    if options.gpus is not None and not 0 <= options.gpus <= gpus:
        return (
            f"--gpus is {options.gpus:g}; it must be from 0 to {gpus}, the GPUs that PyTorch finds"
        )
    return ""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    for ending in ENDING_SIGNALS:  # a second Ctrl-C must not stop the clearing up
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
