"""Start a deployment on this machine: the programs of a server, and a node for each party."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from nanogpt_flower.deployment.credentials import (
    CA_FILE,
    Credentials,
    make_credentials,
    nginx,
)
from nanogpt_flower.local.federation import Federation, LocalRunError, free_port

HOST = "127.0.0.1"
NO_PROXY = (
    "nginx is not installed, so nothing stands before the SuperLink: its Control API is open to "
    "whoever reaches the port"
)


def start_deployment(
    federation: Federation,
    directories: Sequence[Path],
    *,
    state: str = "",
    policy: str = "",
    threads: int = 1,
    stage: Callable[[str], None] = lambda _: None,
) -> Path:
    """Start the programs of a server, and a node for each directory of text.

    Args:
        federation: starts and stops the programs.
        directories: the directories of text, one for each node.
        state: the directory in which each client gets a directory for its state, or "".
        policy: the policy file of all clients, or "" for the default policy.
        threads: the number of threads of PyTorch in each node.
        stage: is told what is being done.

    Returns:
        The directory of the app, for `Federation.run`.
    """
    made = start_server(federation, len(directories), stage=stage)
    stage(f"starting {len(directories)} SuperNodes")
    for number, (party, data) in enumerate(zip(made.parties, directories, strict=True)):
        command = ["nanogpt-flower", "node", str(party), "--data", str(data)]
        command += ["--state", str(Path(state) / party.name)] if state else []
        command += ["--policy", policy] if policy else []
        # One user has all parties, so the draws follow from the seed and a run can be prolonged.
        command += ["--keep-state", "--reproducible"]
        federation.start(f"supernode-{number}", command, OMP_NUM_THREADS=str(threads))
    return made.app


def start_server(
    federation: Federation, supernodes: int, *, stage: Callable[[str], None] = lambda _: None
) -> Credentials:
    """Make credentials, start the programs of a server, and register the keys of the SuperNodes.

    SuperNodes connect over TLS, each with a key of its own. If nginx is installed, they connect to
    nginx, which passes the messages of SuperNodes alone.

    Raises:
        LocalRunError: a program did not start, or a key could not be registered. The message quotes
            its output.
    """
    stage("making keys and certificates")
    port = federation.port if nginx() is None else free_port()
    made = make_credentials(
        federation.home / "credentials",
        host=HOST,
        supernodes=supernodes,
        port=port,
        superlink_port=federation.port,
    )
    federation.connect(root_certificates=str(made.server / CA_FILE))
    stage("starting the SuperLink")
    federation.start("superlink", made.superlink_command)
    federation.wait_for("superlink", federation.port)
    federation.start("superexec", made.superexec_command)
    if nginx() is None:
        stage(NO_PROXY)
    else:
        # nginx overwrites its environment, which marks the processes of a federation. So it is the
        # child of a shell, which the second command keeps.
        shell = ["/bin/sh", "-c", f"{shlex.join(made.proxy_command)}; :"]
        federation.start("superlink-proxy", shell)
        federation.wait_for("superlink-proxy", port)
    for command in made.register_commands:
        finished = federation.call(command)
        if finished.returncode:
            printed = f"{finished.stdout}{finished.stderr}"
            raise LocalRunError(f"{command[3]} could not be registered: {printed}")
    return made
