"""Strategies, and wrappers around any: `Checkpointed(Guarded(Wired(FedAvg())), "checkpoints")`."""

from flower_adapter.strategies.averaging import OuterOptimizer, StreamingFedAvg
from flower_adapter.strategies.checkpointed import Checkpointed
from flower_adapter.strategies.guarded import Dropped, Guarded, RoundFailed
from flower_adapter.strategies.seeded import Seeded
from flower_adapter.strategies.wired import Wired

__all__ = [
    "Checkpointed",
    "Dropped",
    "Guarded",
    "OuterOptimizer",
    "RoundFailed",
    "Seeded",
    "StreamingFedAvg",
    "Wired",
]
