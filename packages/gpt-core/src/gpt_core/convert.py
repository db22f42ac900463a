"""Convert between `GPT` and the checkpoints of nanoGPT and Hugging Face's GPT-2.

Both formats use the same tensor names as `GPT`. Hugging Face's GPT-2 always has biases. It stores
the four matrices of each block transposed, with shape (in_features, out_features).
"""

import pickle
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt_core.checkpoint import (
    EMBEDDING,
    HEAD,
    CheckpointError,
    assemble,
    equal,
    mismatches,
    weights_of,
)
from gpt_core.config import ConfigError, GPTConfig
from gpt_core.model import GPT, uncompiled

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # saved by older releases of `transformers`
_WRAPPERS = ("module.", "_orig_mod.")  # from DistributedDataParallel and torch.compile
_GELUS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
# Settings in GPT-2's configuration for which `GPT` supports only a single value.
_FIXED_SETTINGS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}

# Errors that `torch.load` raised for missing, truncated and randomly changed files in our trials.
_LOAD_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    struct.error,
    pickle.UnpicklingError,
)


class HFGPT2(NamedTuple):
    """A state dict and a configuration for a `GPT2LMHeadModel`.

    Build the model with `GPT2LMHeadModel(GPT2Config(**config))`, and then load the state dict into
    the model.
    """

    state_dict: dict[str, Tensor]
    config: dict[str, Any]


def from_hf_gpt2(
    source: nn.Module | Mapping[str, Tensor], config: Any = None, *, dropout: float | None = None
) -> GPT:
    """Convert a `GPT2LMHeadModel` from Hugging Face `transformers` to a `GPT`.

    Args:
        source: the `GPT2LMHeadModel`, or its state dict. The keys of the state dict may start with
            the prefix `transformer.`, but need not. Files on the Hugging Face hub have no prefix.
        config: the `GPT2Config`, or the content of `config.json` as a dictionary. It is required
            if `source` is a state dict, because a state dict does not contain the number of heads.
        dropout: dropout rate to use instead of the configuration's `resid_pdrop` and `embd_pdrop`.
            It is required if these two rates have different values, because `GPT` has only one
            setting for both.

    Returns:
        A model in evaluation mode, with copies of the weights in the dtype of the source.

    Raises:
        CheckpointError: if a tensor is missing, is unknown or has the wrong shape, or if `GPT`
            does not support a setting in the configuration. The message names each such tensor or
            setting.
    """
    tensors: Mapping[str, Tensor]
    if isinstance(source, nn.Module):
        tensors = source.state_dict()
        config = getattr(source, "config", None) if config is None else config
    else:
        tensors = source
    if config is None:
        raise CheckpointError(
            "config is None; a state dict needs its GPT2Config or the content of its config.json"
        )
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise CheckpointError(
            f"config is a {type(config).__name__}; it must be a GPT2Config or the content of a "
            "config.json"
        )
    settings = dict(config if isinstance(config, Mapping) else config.to_dict())
    own_config = _from_hf_config(settings, dropout)
    own: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _without_wrappers(key)
        if name.endswith(_MASK_BUFFERS):
            continue
        if name != HEAD and not name.startswith("transformer."):
            name = f"transformer.{name}"
        # decide by name: the shape of a square matrix does not show whether it is transposed
        matrix = tensor.t() if name.endswith(_TRANSPOSED) and tensor.dim() == 2 else tensor
        own[name] = matrix.detach().clone(memory_format=torch.contiguous_format)
    return _build_model("the state dict", own_config, own)


def to_hf_gpt2(model: GPT) -> HFGPT2:
    """Convert a `GPT` to a state dict and a configuration for `transformers`.

    If the model has no biases, the state dict contains biases of zero.

    Returns:
        Copies of the tensors, and the configuration as a dictionary.

    Raises:
        CheckpointError: if the model's tensors no longer match its configuration (for example, with
            int8 weights).
    """
    model = uncompiled(model)
    config = model.config
    own = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in weights_of(model).items()
    }
    for name in list(own):
        if name.endswith(_TRANSPOSED):
            own[name] = own[name].t().contiguous()
        bias = name.removesuffix("weight") + "bias"
        biased = name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight"))
        if biased and bias not in own:
            own[bias] = own[name].new_zeros(own[name].size(-1))
    own[HEAD] = own[EMBEDDING]
    hf_config = {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu" if config.gelu_approximate == "none" else "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "layer_norm_epsilon": 1e-5,
        # GPT-2's default, 50256, may be outside this vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return HFGPT2(own, hf_config)


def from_nanogpt_checkpoint(path: str | Path) -> GPT:
    """Load a model from a `ckpt.pt` that nanoGPT's `train.py` wrote.

    The file is read with `torch.load(weights_only=True)`, which runs no code from the file.

    Returns:
        The model on the CPU, in evaluation mode. Its `dropout` and its `attention_dropout` are both
        set to the checkpoint's `dropout`, because nanoGPT has only one dropout rate.

    Raises:
        CheckpointError: if the file cannot be read, if a setting is missing or out of range, or if
            a tensor is missing, is unknown or has the wrong shape. The message says what is wrong.
    """
    path = Path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for key in ("model", "model_args"):
        if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get(key), Mapping):
            raise CheckpointError(f"{path} is not a nanoGPT checkpoint: it has no {key!r}")
    arguments = dict(checkpoint["model_args"])
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    missing = [name for name in names if name not in arguments]
    if missing:
        raise CheckpointError(f"{path}: model_args has no {', '.join(missing)}")
    dropout = arguments.get("dropout", 0.0)
    try:
        config = GPTConfig(
            **{name: arguments[name] for name in names},
            dropout=dropout,
            attention_dropout=dropout,
            bias=arguments.get("bias", True),  # older checkpoints do not contain `bias`
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: model_args: {error}") from error
    for key, tensor in checkpoint["model"].items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {key!r} in model is not a tensor with a string as name")
    tensors = {_without_wrappers(key): tensor for key, tensor in checkpoint["model"].items()}
    own = {name: t for name, t in tensors.items() if not name.endswith(_MASK_BUFFERS)}
    return _build_model(str(path), config, own)


def to_nanogpt_checkpoint(model: GPT, path: str | Path) -> None:
    """Save the model as a checkpoint that nanoGPT's `sample.py` can read.

    The file is written to a temporary directory and moved to `path` when it is complete. nanoGPT
    has only one dropout rate. The file therefore contains the model's `dropout`, but not its
    `attention_dropout`.

    Args:
        model: the model. If it is compiled, the original model inside the wrapper is saved.
        path: the file to write. nanoGPT expects the file name `ckpt.pt`. Missing directories are
            created.

    Raises:
        CheckpointError: if the file cannot be written, if the model's tensors no longer match its
            configuration, or if `gelu_approximate` is "tanh", because nanoGPT does not support
            this form of GELU.
    """
    path, model = Path(path), uncompiled(model)
    config = model.config
    if config.gelu_approximate != "none":
        raise CheckpointError("gelu_approximate is 'tanh'; nanoGPT has only the exact GELU, 'none'")
    tensors = {name: tensor.cpu() for name, tensor in weights_of(model).items()}
    arguments = {
        name: getattr(config, name)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    }
    content = {
        "model": {**tensors, HEAD: tensors[EMBEDDING]},
        "model_args": arguments,
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as temporary:
            written = Path(temporary) / path.name
            torch.save(content, written)
            written.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _without_wrappers(key: str) -> str:
    """Remove the prefixes that DistributedDataParallel and torch.compile add to a key."""
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def _build_model(source: str, config: GPTConfig, tensors: dict[str, Tensor]) -> GPT:
    """Build the model, or raise a CheckpointError about `source` if the tensors do not fit."""
    head = tensors.pop(HEAD, None)
    wrong = mismatches(config, tensors)
    if wrong:
        raise CheckpointError(f"{source} does not fit: {'; '.join(wrong)}")
    if head is not None and not equal(head, tensors[EMBEDDING]):
        raise CheckpointError(
            f"{source} does not fit: {HEAD} differs from {EMBEDDING}; GPT has one matrix for both"
        )
    return assemble(config, tensors)


def _from_hf_config(settings: Mapping[str, Any], dropout: float | None) -> GPTConfig:
    """Convert the settings of a GPT2Config, or raise a CheckpointError for unsupported ones."""
    names = {
        "vocab_size": "vocab_size",
        "n_positions": "block_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
    }
    wrong = [f"{name} is missing" for name in names if name not in settings]
    wrong += [
        f"{name} is {settings[name]!r}; GPT supports only {value!r}"
        for name, value in _FIXED_SETTINGS.items()
        if settings.get(name, value) != value
    ]
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _GELUS:
        wrong.append(f"activation_function is {activation!r}; allowed are {', '.join(_GELUS)}")
    width, inner = settings.get("n_embd", 0), settings.get("n_inner")
    if inner is not None and inner != 4 * width:
        wrong.append(f"n_inner is {inner}; GPT supports only 4 n_embd, which is {4 * width}")
    rates = {settings.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop")}
    if dropout is None and len(rates) > 1:
        wrong.append("resid_pdrop and embd_pdrop differ; give the rate to use as `dropout`")
    if wrong:
        raise CheckpointError(f"the configuration does not fit: {'; '.join(wrong)}")
    try:
        return GPTConfig(
            **{own: settings[theirs] for theirs, own in names.items()},
            dropout=rates.pop() if dropout is None else dropout,
            attention_dropout=settings.get("attn_pdrop", 0.1),
            bias=True,
            gelu_approximate=_GELUS[activation],
        )
    except ConfigError as error:
        raise CheckpointError(f"the configuration does not fit: {error}") from error
