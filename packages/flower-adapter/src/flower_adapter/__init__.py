"""Any torch module in any Flower strategy."""

from importlib.metadata import version

from flower_adapter.arrays import ArrayMismatch, load_arrays, to_arrays
from flower_adapter.client import torch_client_app
from flower_adapter.state import StateFormatError, restore_state, save_state, state_size
from flower_adapter.strategies import Dropped, Guarded, RoundFailed, Seeded

__version__ = version("flower-adapter")

__all__ = [
    "ArrayMismatch",
    "Dropped",
    "Guarded",
    "RoundFailed",
    "Seeded",
    "StateFormatError",
    "load_arrays",
    "restore_state",
    "save_state",
    "state_size",
    "to_arrays",
    "torch_client_app",
]
