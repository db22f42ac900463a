"""A small GPT in PyTorch: the model, training, generation and checkpoints."""

from importlib.metadata import PackageNotFoundError, version

from gpt_core.checkpoint import CheckpointError, from_pretrained, save_pretrained
from gpt_core.config import ConfigError, GPTConfig
from gpt_core.convert import (
    HFGPT2,
    from_hf_gpt2,
    from_nanogpt_checkpoint,
    to_hf_gpt2,
    to_nanogpt_checkpoint,
)
from gpt_core.decode import Decoder
from gpt_core.generate import generate, stream
from gpt_core.model import GPT, GPTOutput, KVCache
from gpt_core.optim import Muon, build_optimizer, learning_rate_at
from gpt_core.quantize import int8_weights
from gpt_core.runtime import Runtime
from gpt_core.train import Progress, TrainingDiverged, TrainResult, evaluate, train_steps

try:
    __version__ = version("gpt-core")
except PackageNotFoundError:  # not installed: imported from the source directory
    __version__ = "0.0.0"

__all__ = [
    "GPT",
    "HFGPT2",
    "CheckpointError",
    "ConfigError",
    "Decoder",
    "GPTConfig",
    "GPTOutput",
    "KVCache",
    "Muon",
    "Progress",
    "Runtime",
    "TrainResult",
    "TrainingDiverged",
    "build_optimizer",
    "evaluate",
    "from_hf_gpt2",
    "from_nanogpt_checkpoint",
    "from_pretrained",
    "generate",
    "int8_weights",
    "learning_rate_at",
    "save_pretrained",
    "stream",
    "to_hf_gpt2",
    "to_nanogpt_checkpoint",
    "train_steps",
]
