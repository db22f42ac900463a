"""A model on disk: `config.json` and `model.safetensors`."""

import json
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
TIED = "lm_head.weight"  # the same tensor as transformer.wte.weight, stored once


class CheckpointError(ValueError):
    """A model that cannot be loaded or written; the message names the file and what is wrong."""


def save_pretrained(model: GPT, directory: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, each beside its place and then moved into it.

    A model that `torch.compile` wraps is written as the model that it wraps.

    Raises:
        CheckpointError: if the directory cannot be written, or the model is no longer the one of
            its configuration (int8 weights, say); what was in the directory is still there.
    """
    directory = Path(directory)
    model = uncompiled(model)
    tensors = {name: t.to("cpu").contiguous() for name, t in weights_of(model).items()}
    settings = json.dumps(model.config.to_dict(), indent=2) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as beside:
            weights, config = Path(beside) / WEIGHTS_FILE, Path(beside) / CONFIG_FILE
            save_file(tensors, weights, metadata={"format": "pt"})
            config.write_text(settings, encoding="utf-8")
            # safetensors lets nobody but the owner read; the user's umask decides
            weights.chmod(config.stat().st_mode)
            for written in (weights, config):
                written.replace(directory / written.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from error


def from_pretrained(directory: str | Path) -> GPT:
    """The model that `save_pretrained` wrote, in its dtype, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: for a missing or unreadable file, an unknown setting, or tensors whose
            names, shapes or kinds do not fit the configuration (each is named).
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE)
    weights = directory / WEIGHTS_FILE
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights} cannot be read: {error}") from error
    wrong = misfits(config, tensors)
    if wrong:
        raise CheckpointError(f"{weights} does not fit {CONFIG_FILE}: {'; '.join(wrong)}")
    return assemble(config, tensors)


def weights_of(model: GPT) -> dict[str, Tensor]:
    """The model's tensors under their names, tied ones once, sharing its memory.

    Raises:
        CheckpointError: for a model that is no longer the one of its configuration.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    head = tensors.pop(TIED, None)
    wrong = misfits(model.config, tensors)
    if not wrong and head is not None and not same(head, tensors["transformer.wte.weight"]):
        wrong = [f"{TIED} differs from transformer.wte.weight"]
    if wrong:
        raise CheckpointError(f"the model is not that of its configuration: {'; '.join(wrong)}")
    return tensors


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or equal, a NaN being equal to a NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _empty(config: GPTConfig) -> GPT:
    """The model without memory for its weights, and without a draw from any generator."""
    with torch.device("meta"):
        return GPT(config)


def misfits(config: GPTConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """What keeps these tensors from being the weights of a model, in words, one entry a tensor."""
    expected = {name: t.shape for name, t in _empty(config).state_dict().items() if name != TIED}
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
        main = tensors["transformer.wte.weight"].dtype
        wrong = [
            f"{name} is {tensor.dtype}, transformer.wte.weight {main}"
            for name, tensor in tensors.items()
            if tensor.dtype != main
        ]
    return wrong


def assemble(config: GPTConfig, tensors: Mapping[str, Tensor]) -> GPT:
    """The model that consists of these tensors (not copies), which fit, in evaluation mode."""
    model = _empty(config)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def _read_config(path: Path) -> GPTConfig:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError(f"it holds a {type(settings).__name__} instead of an object")
        return GPTConfig.from_dict(settings)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is not a model configuration: {error}") from error
