"""Define the settings of a GPT: its shape, its dropout and its activation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


class ConfigError(ValueError):
    """An error for an invalid setting. The message says which values are allowed."""


@dataclass(frozen=True)
class GPTConfig:
    """Settings of a GPT. The defaults are nanoGPT's baby GPT.

    The baby GPT has 10.65M parameters, not counting its position embeddings.

    Raises:
        ConfigError: if a value is out of range.
    """

    vocab_size: int = 65  # number of distinct tokens
    block_size: int = 256  # number of tokens of context
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384  # number of channels; must be divisible by n_head
    dropout: float = 0.2  # rate for the embeddings and both residual branches
    attention_dropout: float = 0.0  # rate for attention weights; slow on a CPU if above 0
    bias: bool = False  # whether linear layers and layer norms have biases
    gelu_approximate: str = "none"  # "none" (nanoGPT) or "tanh" (GPT-2), as in torch's `gelu`

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd is {self.n_embd}; it must be divisible by n_head, which is {self.n_head}"
            )
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0.0 <= value < 1.0:
                raise ConfigError(f"{name} is {value!r}; it must be at least 0 and less than 1")
        if not isinstance(self.bias, bool):
            raise ConfigError(f"bias is {self.bias!r}; it must be True or False")
        if self.gelu_approximate not in ("none", "tanh"):
            raise ConfigError(
                f"gelu_approximate is {self.gelu_approximate!r}; it must be 'none' or 'tanh'"
            )

    def num_parameters(self) -> int:
        """Return the number of parameters of a GPT of this shape, with its position embeddings.

        The number is computed without a model, so it costs no memory.
        """
        n, has_bias = self.n_embd, int(self.bias)
        norm = n * (1 + has_bias)
        block = 12 * n * n + 9 * n * has_bias + 2 * norm  # attention 4 n^2, MLP 8 n^2
        return (self.vocab_size + self.block_size) * n + self.n_layer * block + norm

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as a dictionary that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "GPTConfig":
        """Build a configuration from the dictionary that `to_dict` returned.

        Raises:
            ConfigError: if a key is unknown or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"unknown model settings {unknown}; allowed are {sorted(known)}")
        return cls(**settings)
