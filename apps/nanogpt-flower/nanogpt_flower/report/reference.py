"""Published losses on Tiny Shakespeare with which a run can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

# The reference losses are losses on Tiny Shakespeare. The nine plays are nearly the same text.
CORPORA = ("tiny-shakespeare", "nine-plays")

# The original example: 2 clients, 50 steps of 64 x 256 characters in each round. The losses are
# those after rounds 0 to 5.
ORIGINAL_ROUND_TOKENS = 2 * 50 * 64 * 256
ORIGINAL_LOSSES = (4.23, 2.97, 2.64, 2.56, 2.52, 2.52)
ORIGINAL_POINTS = [(ORIGINAL_ROUND_TOKENS * r, loss) for r, loss in enumerate(ORIGINAL_LOSSES)]
ORIGINAL_TOKENS = ORIGINAL_POINTS[-1][0]


@dataclass(frozen=True)
class NanoGPT:
    """A validation loss that nanoGPT publishes for a model that it trained on one machine."""

    loss: float
    tokens: int
    shape: Mapping[str, int]  # by key of the settings


NANOGPT = (
    NanoGPT(1.88, 2000 * 12 * 64, {"n-layer": 4, "n-embd": 128, "block-size": 64}),
    NanoGPT(1.4697, 5000 * 64 * 256, {"n-layer": 6, "n-embd": 384, "block-size": 256}),
)


def original_loss(tokens: float) -> float:
    """Return the loss of the original example after a number of tokens.

    The loss is interpolated linearly between two rounds. After its last round it is constant.
    """
    for (start, before), (end, after) in pairwise(ORIGINAL_POINTS):
        if tokens <= end:
            return before + (after - before) * (tokens - start) / (end - start)
    return ORIGINAL_LOSSES[-1]


def matching_nanogpt(settings: Mapping[str, object]) -> NanoGPT | None:
    """Return nanoGPT's figure for a model of the shape in `settings`, if there is one."""
    for figure in NANOGPT:
        if all(settings.get(key) == value for key, value in figure.shape.items()):
            return figure
    return None
