"""Save and load a model as `config.json` and `model.safetensors`."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt_core.config import GPTConfig
from gpt_core.model import GPT, uncompiled

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HEAD = "lm_head.weight"  # the same tensor as EMBEDDING, so it is not stored
EMBEDDING = "transformer.wte.weight"


class CheckpointError(ValueError):
    """An error for a model that cannot be loaded, saved or converted.

    The message names the file, the model or the configuration. It also names the settings or
    tensors that are wrong.
    """


def save_pretrained(model: GPT, directory: str | Path) -> None:
    """Save the model as `config.json` and `model.safetensors`.

    Both files are written to a temporary directory. When both are on the disk, they are moved to
    `directory`, one after the other. A failed save therefore leaves an older model in `directory`
    intact, unless the second move fails.

    Args:
        model: the model. If it is compiled, the original model inside the wrapper is saved.
        directory: the directory to write to. It is created if it does not exist.

    Raises:
        CheckpointError: if the directory cannot be written, or if the model's tensors no longer
            match its configuration (for example, with int8 weights).
    """
    directory = Path(directory)
    model = uncompiled(model)
    tensors = {name: t.to("cpu").contiguous() for name, t in weights_of(model).items()}
    settings = json.dumps(model.config.to_dict(), indent=2) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
            weights, config = Path(temporary) / WEIGHTS_FILE, Path(temporary) / CONFIG_FILE
            save_file(tensors, weights, metadata={"format": "pt"})
            config.write_text(settings, encoding="utf-8")
            # safetensors makes the file readable by the owner only; set the usual mode instead
            weights.chmod(config.stat().st_mode)
            for written in (weights, config):
                with written.open("r+b") as file:
                    os.fsync(file.fileno())
            for written in (weights, config):
                written.replace(directory / written.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from error


def from_pretrained(directory: str | Path) -> GPT:
    """Load a model that `save_pretrained` wrote.

    Returns:
        The model on the CPU, in the dtype in which it was saved, and in evaluation mode. Loading
        draws no random numbers.

    Raises:
        CheckpointError: if a file is missing or unreadable, if a setting is unknown or out of
            range, if a tensor is missing, is unknown or has the wrong shape, or if the tensors do
            not all have the same dtype (fp32, float64, bf16 or fp16).
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE)
    weights = directory / WEIGHTS_FILE
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} cannot be read: {error}") from error
    wrong = mismatches(config, tensors)
    if wrong:
        raise CheckpointError(f"{weights} does not fit {CONFIG_FILE}: {'; '.join(wrong)}")
    return assemble(config, tensors)


def weights_of(model: GPT) -> dict[str, Tensor]:
    """Return a dictionary from names to tensors of the model.

    The head is left out, because it is the same tensor as the embedding. The returned tensors share
    memory with the model.

    Raises:
        CheckpointError: if the model's tensors no longer match its configuration.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    head = tensors.pop(HEAD, None)
    wrong = mismatches(model.config, tensors)
    if not wrong and head is not None and not equal(head, tensors[EMBEDDING]):
        wrong = [f"{HEAD} differs from {EMBEDDING}"]
    if wrong:
        raise CheckpointError(f"the model does not fit its configuration: {'; '.join(wrong)}")
    return tensors


def equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have equal dtypes, shapes and values. NaN is equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _empty(config: GPTConfig) -> GPT:
    """Build a model without allocating its weights and without drawing random numbers."""
    with torch.device("meta"):
        return GPT(config)


def mismatches(config: GPTConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """List the differences between these tensors and the weights that the configuration needs.

    Each entry describes the problem with one tensor. The list is empty if all tensors fit.
    """
    expected = {name: t.shape for name, t in _empty(config).state_dict().items() if name != HEAD}
    wrong = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    wrong += [
        f"{name} is not part of the model" for name in sorted(tensors.keys() - expected.keys())
    ]
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(shape)}")
        elif tensor.dtype not in DTYPES:
            wrong.append(f"{name} is {tensor.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    if not wrong:
        main = tensors[EMBEDDING].dtype
        wrong = [
            f"{name} is {tensor.dtype}, but {EMBEDDING} is {main}"
            for name, tensor in tensors.items()
            if tensor.dtype != main
        ]
    return wrong


def assemble(config: GPTConfig, tensors: Mapping[str, Tensor]) -> GPT:
    """Build a model in evaluation mode from tensors that fit `config`, without copying them."""
    model = _empty(config)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def _read_config(path: Path) -> GPTConfig:
    """Read a configuration from a JSON file, or raise a CheckpointError that names the file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError(f"it holds a {type(settings).__name__} instead of an object")
        return GPTConfig.from_dict(settings)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a model configuration: {error}") from error
