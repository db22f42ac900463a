"""A small GPT: the model, training and generation."""

from importlib.metadata import PackageNotFoundError, version

from gpt_core.checkpoint import CheckpointError, from_pretrained, save_pretrained
from gpt_core.config import ConfigError, GPTConfig
from gpt_core.generate import generate, stream
from gpt_core.model import GPT, GPTOutput, KVCache
from gpt_core.optim import Muon, build_optimizer, learning_rate_at
from gpt_core.runtime import Runtime
from gpt_core.train import Progress, TrainingDiverged, TrainResult, evaluate, train_steps

try:
    __version__ = version("gpt-core")
except PackageNotFoundError:  # run from the source directory
    __version__ = "0.0.0"

__all__ = [
    "GPT",
    "CheckpointError",
    "ConfigError",
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
    "from_pretrained",
    "generate",
    "learning_rate_at",
    "save_pretrained",
    "stream",
    "train_steps",
]
