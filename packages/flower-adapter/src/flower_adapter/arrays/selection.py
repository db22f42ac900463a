"""Selections for the argument `select=` of `to_arrays` and `load_arrays`.

They choose which parameters and buffers are sent. A selection takes an `Entry` and returns True or
False. This module holds common selections, and a lambda works as well. An entry that is not
selected is not sent, so it keeps its value on the server and on the client.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn


class Entry(NamedTuple):
    """A parameter or persistent buffer. A tied parameter appears once, under its first name."""

    name: str  # the name in the record
    tensor: Tensor
    owner: nn.Module | None  # the module that holds the tensor; None in a bare state dict


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
        TypeError: the entry comes from a bare state dict. By default, the tensors of a state dict
            are detached and do not require a gradient.
    """
    if entry.owner is None:
        raise TypeError(f"{entry.name} comes from a state dict: trainable needs a module")
    return entry.tensor.requires_grad


def without_normalization(entry: Entry) -> bool:
    """Select all entries outside torch's normalization layers: FedBN (arXiv 2102.07623).

    Raises:
        TypeError: the entry comes from a bare state dict. A state dict does not name
            the layer classes.
    """
    if entry.owner is None:
        raise TypeError(
            f"{entry.name} comes from a state dict: without_normalization needs a module"
        )
    return not isinstance(entry.owner, _NORMALIZATIONS)


def matching(*patterns: str) -> Selection:
    """Select names that match at least one shell pattern, for example `matching("head.*")`."""
    return lambda entry: any(fnmatchcase(entry.name, pattern) for pattern in patterns)


def excluding(*patterns: str) -> Selection:
    """Select names that match none of the shell patterns."""
    matches = matching(*patterns)
    return lambda entry: not matches(entry)


adapters = matching("*lora_*", "*adapter*")
"""Select LoRA and other adapters by the names that PEFT and most other libraries use."""
