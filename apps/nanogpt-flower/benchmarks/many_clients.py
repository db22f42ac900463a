"""Run a federation of many simulated clients, and print its time and the server's memory by round.

    nox -s many                         # 1,000 clients, 3 rounds, a small model
    nox -s many -- --clients 100 max-steps=5

All clients train and evaluate in every round. The server is the process of Flower's simulation: it
runs the ServerApp, and it passes the messages to the worker processes in which Ray simulates the
clients.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

SERVER = "flwr-simulation"
SETTINGS = {
    "num-server-rounds": 3,
    "n-layer": 1,
    "n-head": 2,
    "n-embd": 16,
    "block-size": 32,
    "batch-size": 8,
    "max-steps": 2,
    "sample-tokens": 0,
    "round-sample-tokens": 0,
}


def server_mib(launcher: psutil.Process) -> float:
    """Return the resident memory of the server in MiB, or 0 if it does not run."""
    try:
        for process in launcher.children(recursive=True):
            command = process.cmdline()
            if any(Path(part).name == SERVER for part in command[:3]):
                return process.memory_info().rss / 2**20
    except psutil.Error:
        pass
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--clients", type=int, default=1000)
    options = parser.parse_args()
    given = [f"{key}={value}" for key, value in SETTINGS.items()]
    with tempfile.TemporaryDirectory() as room:
        run = ["run-name=many", f"output-dir={room}", *given, *options.settings]
        clients = ["--clients", str(options.clients), "--cpus", "1"]
        program = Path(sys.executable).with_name("nanogpt-flower")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = time.monotonic()
        launcher = subprocess.Popen(
            [program, "run", "quick", *clients, *run], env=environment, stdout=subprocess.PIPE
        )
        seen: list[tuple[float, float]] = []  # seconds since the start, MiB
        rounds: list[float] = []  # the second at which each round was over

        def watch() -> None:
            timings = Path(room, "many", "timings.jsonl")
            while launcher.poll() is None:
                seen.append((time.monotonic() - started, server_mib(psutil.Process(launcher.pid))))
                lines = timings.read_text().splitlines() if timings.exists() else []
                rounds.extend([seen[-1][0]] * (len(lines) - len(rounds)))
                time.sleep(0.5)

        watcher = threading.Thread(target=watch)
        watcher.start()
        launcher.communicate()
        watcher.join()
        if launcher.returncode:
            sys.exit(f"the run failed with exit status {launcher.returncode}")
        lines = Path(room, "many", "timings.jsonl").read_text().splitlines()
    print(f"{options.clients} clients, {seen[-1][0]:.0f} s in all; {os.cpu_count()} cores")
    print("round  seconds  ms a train message  ms an evaluate message  largest server MiB")
    for line, begin, end in zip(lines, [0.0, *rounds], rounds, strict=False):
        timing = json.loads(line)
        phases = timing["seconds"]
        each = [1e3 * phases.get(key, 0.0) / options.clients for key in ("train", "evaluate")]
        largest = max((mib for at, mib in seen if begin <= at <= end), default=0.0)
        print(
            f"{timing['round']:5}  {end - begin:7.0f}  {each[0]:18.1f}  {each[1]:22.1f}  "
            f"{largest:18,.0f}"
        )


if __name__ == "__main__":
    main()
