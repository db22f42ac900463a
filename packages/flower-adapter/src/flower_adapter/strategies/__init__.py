"""Wrappers around any Flower strategy: `Guarded(Seeded(FedAvg(), seed=1))`."""

from flower_adapter.strategies.guarded import Dropped, Guarded, RoundFailed
from flower_adapter.strategies.seeded import Seeded

__all__ = ["Dropped", "Guarded", "RoundFailed", "Seeded"]
