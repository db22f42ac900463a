"""Every name that this package takes from outside Flower's public modules, with the reason.

Flower's public modules are `flwr.app`, `flwr.clientapp`, `flwr.serverapp` and
`flwr.serverapp.strategy`. All else may change in any release. `pyproject.toml` therefore bounds
`flwr` from above, and a new release of Flower is tried against this file first.
"""

# An error reply needs a code, and the public `Error` has no list of them.
from flwr.app.typing import ConfigRecordValues, MetricRecordValues  # types of record values
from flwr.clientapp.typing import ClientAppCallable, Mod  # types of a mod's arguments
from flwr.common.constant import ErrorCode

# `Grid.run` is abstract, so the grid of `flower_adapter.testing` has to return one of these.
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
