"""This module holds all uses of names in Flower that are not public.

Flower's public modules are `flwr.app`, `flwr.clientapp`, `flwr.serverapp` and
`flwr.serverapp.strategy`. Any other module of Flower may change in any release. `pyproject.toml`
therefore sets an upper bound on the version of `flwr`. When Flower has a new release, test this
file first.
"""

from flwr.app import Message
from flwr.app.typing import ConfigRecordValues, MetricRecordValues  # types of record values
from flwr.clientapp.typing import ClientAppCallable, Mod  # types of a mod's arguments

# An error reply needs an error code, and Flower's public modules have no list of the codes.
from flwr.common.constant import ErrorCode

# The grid in `flower_adapter.testing` has to define `Grid.run`, which has this return type.
from flwr.supercore.run import Run

# A process can only make messages once it knows its run, node and task. Flower sets them in a
# ServerApp, and `become_a_server` sets them in a test.
from flwr.supercore.task_identity import TaskIdentity

# Flower talks to the SuperLink with httpx. This is the error of a connection.
from httpx import TransportError


def become_a_server() -> None:
    """Give this process the identity of a ServerApp, if it has none. It can then make messages."""
    if TaskIdentity._run_id is None:
        TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = 1


def set_message_id(message: Message, message_id: str) -> None:
    """Set the id of a message. Flower computes ids only when a message is sent to a SuperLink."""
    message.metadata.__dict__["_message_id"] = message_id


__all__ = [
    "ClientAppCallable",
    "ConfigRecordValues",
    "ErrorCode",
    "MetricRecordValues",
    "Mod",
    "Run",
    "TransportError",
    "become_a_server",
    "set_message_id",
]
