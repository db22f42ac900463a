"""This module defines the outer optimizer of DiLoCo."""

import math
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from flower_adapter.arrays import npy


class OuterOptimizer:
    """The outer optimizer of DiLoCo: Nesterov momentum on each round's update (arXiv 2311.08105).

    Let w be the global arrays, d = (the strategy's aggregate) - w, and v = 0 at first. A step is
    v <- momentum v + d, then w <- w + learning_rate (d + momentum v). This is torch's SGD with
    `nesterov=True` and the gradient -d. Learning rate 1 and momentum 0 give the aggregate itself,
    bit for bit. Integer and bool arrays are taken from the aggregate.

    Args:
        learning_rate: above 0. DiLoCo uses 0.7.
        momentum: at least 0 and below 1. DiLoCo uses 0.9.
    """

    def __init__(self, *, learning_rate: float = 0.7, momentum: float = 0.9) -> None:
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate is {learning_rate}, should be a number above 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, should be at least 0 and below 1")
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.reset()

    def __repr__(self) -> str:
        return f"OuterOptimizer(learning_rate={self.learning_rate}, momentum={self.momentum})"

    def reset(self) -> None:
        """Set the velocity to zero."""
        self._velocity: dict[str, Tensor] = {}

    def step(self, arrays: ArrayRecord, aggregate: ArrayRecord) -> ArrayRecord:
        """Compute the next global arrays from the present arrays and the round's aggregate."""
        if self.learning_rate == 1 and self.momentum == 0:
            return aggregate
        return ArrayRecord(
            {name: self._moved(name, arrays[name], array) for name, array in aggregate.items()}
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        return {"velocity": dict(self._velocity)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        self._velocity = dict(state["velocity"])

    def _moved(self, name: str, before: Array, aggregated: Array) -> Array:
        if np.dtype(before.dtype).kind not in "fc":
            return aggregated
        target = npy.array_view(aggregated)
        update = target - npy.array_view(before)
        velocity = self._velocity.get(name)
        velocity = update if velocity is None else update + self.momentum * velocity
        self._velocity[name] = velocity
        # This is w + lr (d + momentum v), computed from the aggregate w + d.
        change = (self.learning_rate - 1) * update
        change += self.learning_rate * self.momentum * velocity
        return npy.to_array(torch.add(target, change).numpy())
