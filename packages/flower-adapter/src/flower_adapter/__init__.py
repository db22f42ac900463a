"""Any torch module in any Flower strategy, with nothing lost on the way."""

from importlib.metadata import version

from flower_adapter.arrays import ArrayMismatch, add, load_arrays, subtract, to_arrays
from flower_adapter.average import average_arrays
from flower_adapter.checkpoint import Checkpoint, CheckpointError, checkpoints, read_checkpoint
from flower_adapter.client import torch_client_app
from flower_adapter.compress import CodecError
from flower_adapter.durable import Durable
from flower_adapter.state import (
    StateFormatError,
    drop_state,
    restore_state,
    save_state,
    state_size,
)
from flower_adapter.strategies import (
    Checkpointed,
    Dropped,
    Guarded,
    OuterOptimizer,
    RoundFailed,
    Seeded,
    StreamingFedAvg,
    Wired,
)
from flower_adapter.wire import wire_mod

__version__ = version("flower-adapter")

__all__ = [
    "ArrayMismatch",
    "Checkpoint",
    "CheckpointError",
    "Checkpointed",
    "CodecError",
    "Dropped",
    "Durable",
    "Guarded",
    "OuterOptimizer",
    "RoundFailed",
    "Seeded",
    "StateFormatError",
    "StreamingFedAvg",
    "Wired",
    "add",
    "average_arrays",
    "checkpoints",
    "drop_state",
    "load_arrays",
    "read_checkpoint",
    "restore_state",
    "save_state",
    "state_size",
    "subtract",
    "to_arrays",
    "torch_client_app",
    "wire_mod",
]
