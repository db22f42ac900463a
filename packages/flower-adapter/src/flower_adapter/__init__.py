"""Federate any torch module with any Flower strategy."""

from importlib.metadata import version

from flower_adapter.arrays.codecs import CodecError
from flower_adapter.arrays.convert import ArrayMismatch, load_arrays, to_arrays
from flower_adapter.client.app import torch_client_app
from flower_adapter.client.audit import AuditLog
from flower_adapter.client.compression import compression_mod
from flower_adapter.client.disk import DiskState
from flower_adapter.client.policy import Policy, PolicyError, policy_mod
from flower_adapter.client.refusals import Refusal
from flower_adapter.client.secret import derive, own_secret
from flower_adapter.client.state import (
    StateFormatError,
    restore_state,
    save_state,
    state_digest,
)
from flower_adapter.server.checkpoints import CheckpointError, Checkpoints
from flower_adapter.server.compression import Compression
from flower_adapter.server.guard import Guard
from flower_adapter.server.outer import OuterOptimizer
from flower_adapter.server.record import RoundFailed, RoundRecord
from flower_adapter.server.rounds import run_rounds
from flower_adapter.server.streaming import StreamingFedAvg

__version__ = version("flower-adapter")

__all__ = [
    "ArrayMismatch",
    "AuditLog",
    "CheckpointError",
    "Checkpoints",
    "CodecError",
    "Compression",
    "DiskState",
    "Guard",
    "OuterOptimizer",
    "Policy",
    "PolicyError",
    "Refusal",
    "RoundFailed",
    "RoundRecord",
    "StateFormatError",
    "StreamingFedAvg",
    "compression_mod",
    "derive",
    "load_arrays",
    "own_secret",
    "policy_mod",
    "restore_state",
    "run_rounds",
    "save_state",
    "state_digest",
    "to_arrays",
    "torch_client_app",
]
