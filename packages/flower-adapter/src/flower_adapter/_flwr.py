"""This module holds all imports from modules of Flower that are not public.

Flower's public modules are `flwr.app`, `flwr.clientapp`, `flwr.serverapp` and
`flwr.serverapp.strategy`. Any other module of Flower may change in any release. `pyproject.toml`
therefore sets an upper bound on the version of `flwr`. When Flower has a new release, test this
file first.
"""

from flwr.app.typing import ConfigRecordValues, MetricRecordValues  # types of record values
from flwr.clientapp.typing import ClientAppCallable, Mod  # types of a mod's arguments

# An error reply needs an error code, and Flower's public modules have no list of the codes.
from flwr.common.constant import ErrorCode

# The grid in `flower_adapter.testing` has to define `Grid.run`, which has this return type.
from flwr.supercore.run import Run

# A process can only make messages once it knows its run, node and task. Flower sets them in a
# ServerApp. `flower_adapter.testing` sets them in a test.
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "ClientAppCallable",
    "ConfigRecordValues",
    "ErrorCode",
    "MetricRecordValues",
    "Mod",
    "Run",
    "TaskIdentity",
]
