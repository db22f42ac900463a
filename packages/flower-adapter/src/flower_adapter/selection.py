"""Which parameters and buffers travel: for `select=` of `to_arrays` and `load_arrays`.

A selection is a function of an `Entry`; the ones here are examples of it, and a lambda is as good.
What is not selected stays as it is, on both sides.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn


class Entry(NamedTuple):
    """A parameter or persistent buffer; a tied one is there once, under its first name."""

    name: str  # as in the record
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
    """Parameters that require a gradient: no buffers, nothing frozen.

    Raises:
        TypeError: the entry is of a bare state dict, whose tensors never require one.
    """
    if entry.owner is None:
        raise TypeError(f"{entry.name} is of a state dict: what is trainable needs a module")
    return entry.tensor.requires_grad


def without_normalization(entry: Entry) -> bool:
    """All but what belongs to a normalization layer of torch: FedBN (arXiv 2102.07623).

    Raises:
        TypeError: the entry is of a bare state dict, which does not say what its layers are.
    """
    if entry.owner is None:
        raise TypeError(f"{entry.name} is of a state dict: normalization layers need a module")
    return not isinstance(entry.owner, _NORMALIZATIONS)


def matching(*patterns: str) -> Selection:
    """Names that match one of the patterns, in the manner of a shell: `matching("head.*")`."""
    return lambda entry: any(fnmatchcase(entry.name, pattern) for pattern in patterns)


def excluding(*patterns: str) -> Selection:
    """Names that match none of the patterns."""
    matches = matching(*patterns)
    return lambda entry: not matches(entry)


adapters = matching("*lora_*", "*adapter*")
"""Low-rank and other adapters by the names that PEFT and most others give them."""
