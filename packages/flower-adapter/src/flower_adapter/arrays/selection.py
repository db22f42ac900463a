"""Which parameters and buffers travel: functions for `select=` of `to_arrays` and `load_arrays`.

A selection takes an `Entry` and returns True or False. The functions here are examples, and a
lambda works as well. An entry that is not selected keeps its value on both sides.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn


class Entry(NamedTuple):
    """A parameter or persistent buffer. A tied one appears once, under its first name."""

    name: str  # its name in the record
    tensor: Tensor
    owner: nn.Module | None  # the module that holds it; None in a bare state dict


Selection: TypeAlias = Callable[[Entry], bool]

_NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)


def trainable(entry: Entry) -> bool:
    """Select the parameters that require a gradient.

    Raises:
        TypeError: the entry comes from a bare state dict, whose tensors never require a gradient.
    """
    if entry.owner is None:
        raise TypeError(f"{entry.name} comes from a state dict: trainable needs a module")
    return entry.tensor.requires_grad


def without_normalization(entry: Entry) -> bool:
    """Select all entries outside torch's normalization layers: FedBN (arXiv 2102.07623).

    Raises:
        TypeError: the entry comes from a bare state dict, which does not name its layers.
    """
    if entry.owner is None:
        raise TypeError(
            f"{entry.name} comes from a state dict: without_normalization needs a module"
        )
    return not isinstance(entry.owner, _NORMALIZATIONS)


def matching(*patterns: str) -> Selection:
    """Select names that match one of the shell patterns: `matching("head.*")`."""
    return lambda entry: any(fnmatchcase(entry.name, pattern) for pattern in patterns)


def excluding(*patterns: str) -> Selection:
    """Select names that match none of the shell patterns."""
    matches = matching(*patterns)
    return lambda entry: not matches(entry)


adapters = matching("*lora_*", "*adapter*")
"""Select low-rank and other adapters by the names that PEFT and most libraries use."""
