"""Wrappers around any Flower strategy: `Guarded(Seeded(FedAvg(), seed=1))`."""

from flower_adapter.strategies.guarded import Guarded, RoundFailed
from flower_adapter.strategies.seeded import Seeded

__all__ = ["Guarded", "RoundFailed", "Seeded"]
