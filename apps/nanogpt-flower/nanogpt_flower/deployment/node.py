"""Run a party's SuperNode: two programs, which end together."""

import os
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from nanogpt_flower.client_node import read_policy
from nanogpt_flower.deployment.credentials import (
    CA_FILE,
    KEY_FILE,
    NODE_FILE,
    SECRET_FILE,
    CredentialsError,
)
from nanogpt_flower.deployment.flower import missing_names
from nanogpt_flower.interrupts import deferred
from nanogpt_flower.local.federation import free_port
from shakespeare_data import read_part

POLL_SECONDS = 0.2  # time between two looks at the programs
STOP_SECONDS = 10.0  # a program that takes longer to end is killed
ENVIRONMENT = {
    # A SuperNode connects to its SuperLink alone.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds
}


def run_node(
    party: Path,
    data: Path,
    *,
    policy: Path | None = None,
    state: Path | None = None,
    superlink: str | None = None,
    allowed: Sequence[str] = (),
    stock: bool = False,
    keep_state: bool = False,
    reproducible: bool = False,
) -> None:
    """Run a SuperNode until it ends or this process is interrupted.

    Args:
        party: the directory that `nanogpt-flower credentials` made for this party.
        data: the directory of text that `shakespeare-data` made.
        policy: the file that says what a server may ask of this client.
        state: the directory in which the client keeps its state, by default `<party>/state`.
        superlink: the address HOST:PORT of the SuperLink, by default the one in `node.toml`.
        allowed: the SHA-256 of each further FAB whose runs are answered.
        stock: start Flower's own programs, which run the code that a run brings.
        keep_state: keep the state of runs that have ended, so that they can be prolonged.
        reproducible: let the seed of the run decide what the client draws.

    Raises:
        PolicyError: the policy file cannot be used.
        CredentialsError: a file is missing or damaged, or others can read a key.
        RuntimeError: the SuperNode has ended by itself.
    """
    node = read_node(party)
    digests = [*node["fabs"], *allowed]
    for digest in digests:
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise CredentialsError(f"{digest!r} is no SHA-256; it must be 64 digits of 0-9 and a-f")
    if not stock and (missing := missing_names()):
        raise CredentialsError(
            f"this Flower has no {', '.join(missing)}, on which the SuperNode rests. Install flwr "
            "1.41, or start Flower's own programs with --stock, which run the code of each run"
        )
    read_part(data)  # explains what is wrong with a directory that is not one of text
    if policy is not None:
        read_policy(policy)
    state = party / "state" if state is None else state
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = {"data-path": data, "state-path": state} | ({"policy": policy} if policy else {})
    values: dict[str, Any] = {key: str(path.resolve()) for key, path in paths.items()}
    values |= {"keep-state": keep_state, "reproducible": reproducible}
    config = party / "node-config.toml"
    config.write_text(tomli_w.dumps(values), encoding="utf-8")
    connection = ["--superlink", superlink or node["superlink"]]
    connection += ["--root-certificates", str(party / CA_FILE)]
    connection += ["--auth-supernode-private-key", str(party / KEY_FILE)]
    connection += ["--node-config", str(config), "--host", "127.0.0.1"]
    run_programs(stock_commands(connection) if stock else commands(party, connection, digests))


def read_node(party: Path) -> dict[str, Any]:
    """Return the content of a party's `node.toml`, and check the other files of the party.

    Raises:
        CredentialsError: a file is missing or damaged, or others can read a key.
    """
    for name in (NODE_FILE, CA_FILE, KEY_FILE, SECRET_FILE):
        if not (party / name).is_file():
            raise CredentialsError(
                f"{party} has no {name}; it must be a directory that `nanogpt-flower credentials` "
                "made for one party"
            )
    for name in (KEY_FILE, SECRET_FILE):
        if os.name == "posix" and (mode := (party / name).stat().st_mode & 0o777) & 0o077:
            raise CredentialsError(
                f"{party / name} has mode {mode:04o}, so others can read it; use: chmod 600 "
                f"{party / name}"
            )
    try:
        node = tomllib.loads((party / NODE_FILE).read_text(encoding="utf-8"))
        superlink, fabs = node["superlink"], node["fabs"]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError) as error:
        raise CredentialsError(f"{party / NODE_FILE} is damaged: {error}") from error
    if not isinstance(superlink, str) or not all(isinstance(fab, str) for fab in fabs):
        raise CredentialsError(f"{party / NODE_FILE} is damaged: superlink and fabs are texts")
    return node


def commands(party: Path, connection: list[str], digests: Sequence[str]) -> list[list[str]]:
    """Return the commands of the SuperNode and of its executor."""
    port, secret = str(free_port()), ["--superexec-auth-secret-file", str(party / SECRET_FILE)]
    program = [sys.executable, "-m", "nanogpt_flower.deployment.flower"]
    isolation = ["--isolation", "process", "--port", port, *secret]
    address = ["--insecure", "--runtime-api-address", f"127.0.0.1:{port}", *secret]
    return [
        [*program, "supernode", *connection, *isolation],
        [*program, "executor", ",".join(digests), *address],
    ]


def stock_commands(connection: list[str]) -> list[list[str]]:
    """Return the command of Flower's own SuperNode."""
    program = str(Path(sysconfig.get_path("scripts")) / "flower-supernode")
    return [[program, *connection, "--port", str(free_port())]]


def run_programs(commands: Sequence[Sequence[str]]) -> None:
    """Run programs until one of them ends, and then stop the others.

    Raises:
        RuntimeError: a program has ended.
    """
    started: list[subprocess.Popen[bytes]] = []
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    try:
        for command in commands:
            with deferred():
                started.append(
                    subprocess.Popen(
                        command,
                        env=ENVIRONMENT | os.environ | {"PATH": path},
                        stdin=subprocess.DEVNULL,
                        # In its own session a program does not receive Ctrl-C. It is stopped below.
                        start_new_session=True,
                    )
                )
        while all(process.poll() is None for process in started):
            time.sleep(POLL_SECONDS)
        raise RuntimeError(
            "the SuperNode has ended; its lines above say why. If it could not be activated, the "
            "server does not know the key of this party: its operator must register it"
        )
    finally:
        with deferred():
            stop(started)


def stop(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate programs and all that they have started, and kill those that take too long."""
    running: list[psutil.Process] = []
    for process in reversed(started):  # the executor first, else it asks a SuperNode that is gone
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid)
            running += [*found.children(recursive=True), found]
    for found in running:
        with suppress(psutil.NoSuchProcess):
            found.terminate()
    for found in psutil.wait_procs(running, timeout=STOP_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            found.kill()
    for process in started:
        process.wait()
