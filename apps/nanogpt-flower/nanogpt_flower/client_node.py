"""The decisions of a client's operator, who sets the node config of a SuperNode.

| key | meaning |
|---|---|
| `data-path` | a directory with the client's own text |
| `partition-id`, `num-partitions` | the client's share of a text that the server names |
| `corpus-path` | the text for that share, if the server's text is a file |
| `state-path` | a directory for the client's secret, its state and its audit log |
| `policy` | a policy file; without it the client has the default policy |
| `keep-state` | true keeps the state of runs that have ended, so that they can be prolonged |
| `reproducible` | true lets the run's seed decide all draws; never among strangers |

A simulated client has no operator: it runs in the server's own program.
"""

import sys
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from flwr.app import Context

from flower_adapter import Policy, PolicyError, derive, own_secret
from nanogpt_flower.settings import Settings
from shakespeare_data import DataError

NO_SECRET = b""  # everybody knows it, so everything that is derived from it is reproducible


def is_simulated() -> bool:
    """Tell whether this process simulates clients on the server's own machine.

    Flower runs simulated clients as actors of Ray, and clients of a deployment never. No message
    can change this.
    """
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def state_path(context: Context) -> Path | None:
    """Return the directory in which this client keeps what must survive a restart, or None.

    A simulated client takes it from the run config, and has a directory of its own in there.
    """
    if is_simulated():
        directory = str(context.run_config.get("client-state", ""))
        return Path(directory) / text_name(context) if directory else None
    directory = str(context.node_config.get("state-path", ""))
    return Path(directory).expanduser().absolute() if directory else None


def keeps_ended_runs(context: Context) -> bool:
    """Tell whether the client keeps the state of runs that have ended."""
    return is_simulated() or bool(context.node_config.get("keep-state", False))


def is_reproducible(context: Context) -> bool:
    """Tell whether the run's seed decides what the client draws."""
    return is_simulated() or bool(context.node_config.get("reproducible", False))


def secret(context: Context) -> bytes:
    """Return the secret of this client, from which it derives its label and its draws."""
    return NO_SECRET if is_reproducible(context) else own_secret(context, state_path(context))


def audit_path(context: Context) -> Path | None:
    """Return the path of the audit log. A client without a state path has none."""
    directory = None if is_simulated() else state_path(context)
    return directory and directory / "audit.jsonl"


def policy(context: Context) -> Policy | None:
    """Return the policy of this client. A simulated client has none.

    Raises:
        PolicyError: the policy file cannot be used.
    """
    if is_simulated():
        return None
    path = str(context.node_config.get("policy", ""))
    return read_policy(Path(path).expanduser()) if path else default_policy()


def read_policy(path: Path) -> Policy:
    """Read a policy file. What it does not say is as in the default policy.

    Raises:
        PolicyError: the file cannot be read, or it has a key or a value that means nothing here.
    """
    usual, own = default_policy(), Policy.read(path, default_policy())
    known = {
        "messages": (own.messages, usual.messages),
        "queries": (own.queries, usual.queries),
        "run-config": (own.run_config, {**Settings().to_run_config(), **usual.run_config}),
        "limits": (own.limits, usual.limits),
    }
    for key, (found, allowed) in known.items():
        if unknown := sorted(set(found) - set(allowed)):
            raise PolicyError(
                f"{path}: {key} has {unknown[0]!r}, should have only {', '.join(allowed)}"
            )
    for key, choices in usual.run_config.items():
        mine = own.run_config[key]
        if bool(mine.one_of) != bool(choices.one_of) or set(mine.one_of) - set(choices.one_of):
            raise PolicyError(f"{path}: run-config.{key} allows {mine}, should be within {choices}")
    return own


@lru_cache(maxsize=1)
def default_policy() -> Policy:
    """Return the policy of a client whose operator names none."""
    return Policy.from_toml(default_policy_text(), "the default policy")


def default_policy_text() -> str:
    """Return the file of the default policy, with a comment for each key."""
    return (files("nanogpt_flower") / "default_policy.toml").read_text(encoding="utf-8")


def text_name(context: Context) -> str:
    """Return the name of this client's data directory, or the name of its partition.

    The name is for the client's own log. `label` is the name that others see.

    Raises:
        DataError: the node config names neither a data directory nor a partition.
    """
    node = context.node_config
    if "data-path" in node:
        return str(node["data-path"])
    if "partition-id" in node and "num-partitions" in node:
        return f"partition {int(node['partition-id']):04d} of {int(node['num-partitions'])}"
    raise DataError(
        f"the node config {dict(node)} names no data; give the SuperNode \"data-path='…'\", or "
        '"partition-id=0 num-partitions=2"'
    )


def label_from(own: bytes, text: str) -> str:
    """Return the label of a client with this secret, for a fingerprint or name of its text.

    Nobody without the secret can find out from the label which text the client has.
    """
    return f"client {derive(own, 'label', text).hex()[:16]}"
