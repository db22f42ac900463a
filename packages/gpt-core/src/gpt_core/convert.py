"""To and from the checkpoints of nanoGPT and of Hugging Face's GPT-2.

Both hold the tensors of `GPT` under its names. Hugging Face keeps the four matrices of a block
transposed, (in_features, out_features), and always has biases.
"""

import pickle
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt_core.checkpoint import TIED, CheckpointError, assemble, misfits, same, weights_of
from gpt_core.config import ConfigError, GPTConfig
from gpt_core.model import GPT, uncompiled

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of older releases, no weights
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
_GELUS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
# what GPT-2's configuration may ask for and this model does not have, with what it does have
_ONLY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}


# what `torch.load` was seen to raise for files with bytes changed at random, cut, or not there
_UNREADABLE = (
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
    """A model for `transformers`: `GPT2LMHeadModel(GPT2Config(**config))` takes the state dict."""

    state_dict: dict[str, Tensor]
    config: dict[str, Any]


def from_hf_gpt2(
    source: nn.Module | Mapping[str, Tensor], config: Any = None, *, dropout: float | None = None
) -> GPT:
    """The model of Hugging Face `transformers`' `GPT2LMHeadModel`, in evaluation mode.

    Args:
        source: the model, or its state dict (with or without the prefix `transformer.`, as
            `model.safetensors` on the hub has it).
        config: with a state dict, its `GPT2Config` or the content of its `config.json`; a state
            dict does not say how many heads there are.
        dropout: in place of the configuration's; needed where `resid_pdrop` and `embd_pdrop`
            differ, for which this model has one setting.

    Returns:
        A model with weights of its own, in the dtype of the source.

    Raises:
        CheckpointError: for a key that is missing, unknown or of another shape, and for a
            configuration that this model does not have; each is named.
    """
    tensors: Mapping[str, Tensor]
    if isinstance(source, nn.Module):
        tensors = source.state_dict()
        config = getattr(source, "config", None) if config is None else config
    else:
        tensors = source
    if config is None:
        raise CheckpointError(
            "a state dict needs `config`, its GPT2Config or the content of its config.json"
        )
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise CheckpointError(
            f"config is a {type(config).__name__}; a GPT2Config or the content of a config.json "
            "is needed"
        )
    settings = dict(config if isinstance(config, Mapping) else config.to_dict())
    shape = _from_hf_config(settings, dropout)
    own: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _stripped(key)
        if name.endswith(_CAUSAL_MASKS):
            continue
        if name != TIED and not name.startswith("transformer."):
            name = f"transformer.{name}"
        # not by its shape: a square one is transposed as well
        turned = tensor.t() if name.endswith(_TRANSPOSED) and tensor.dim() == 2 else tensor
        own[name] = turned.detach().clone(memory_format=torch.contiguous_format)
    return _tied("the state dict", shape, own)


def to_hf_gpt2(model: GPT) -> HFGPT2:
    """State dict and configuration of the same model for `transformers`; biases it lacks are 0.

    The tensors are copies.

    Raises:
        CheckpointError: for a model that is no longer the one of its configuration (int8 weights).
    """
    model = uncompiled(model)
    shape = model.config
    own = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in weights_of(model).items()
    }
    for name in list(own):
        if name.endswith(_TRANSPOSED):
            own[name] = own[name].t().contiguous()
        bias = name.removesuffix("weight") + "bias"
        biased = name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight", TIED))
        if biased and bias not in own:
            own[bias] = own[name].new_zeros(own[name].size(-1))
    own[TIED] = own["transformer.wte.weight"]
    config = {
        "vocab_size": shape.vocab_size,
        "n_positions": shape.block_size,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "activation_function": "gelu" if shape.gelu_approximate == "none" else "gelu_new",
        "resid_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "attn_pdrop": shape.attention_dropout,
        "layer_norm_epsilon": 1e-5,
        # GPT-2's own, 50256, need not be in this vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return HFGPT2(own, config)


def from_nanogpt_checkpoint(path: str | Path) -> GPT:
    """The model in a `ckpt.pt` that nanoGPT's `train.py` wrote, on the CPU, in evaluation mode.

    It is read with `torch.load(weights_only=True)`, which runs no code of the file. The model drops
    inside attention as nanoGPT does: `attention_dropout` is the checkpoint's `dropout`.

    Raises:
        CheckpointError: for a file that cannot be read, settings that are missing, and a key that
            is missing, unknown or of another shape; each is named.
    """
    path = Path(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for key in ("model", "model_args"):
        if not isinstance(found, Mapping) or not isinstance(found.get(key), Mapping):
            raise CheckpointError(f"{path} is no checkpoint of nanoGPT: it has no {key!r}")
    arguments = dict(found["model_args"])
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
    missing = [name for name in names if name not in arguments]
    if missing:
        raise CheckpointError(f"{path}: model_args lacks {', '.join(missing)}")
    dropout = arguments.get("dropout", 0.0)
    try:
        shape = GPTConfig(
            **{name: arguments[name] for name in names},
            dropout=dropout,
            attention_dropout=dropout,
            bias=arguments.get("bias", True),  # older checkpoints, which had no choice
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: model_args: {error}") from error
    for key, tensor in found["model"].items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {key!r} in model is no tensor under a name")
    tensors = {_stripped(key): tensor for key, tensor in found["model"].items()}
    own = {name: t for name, t in tensors.items() if not name.endswith(_CAUSAL_MASKS)}
    return _tied(str(path), shape, own)


def to_nanogpt_checkpoint(model: GPT, path: str | Path) -> None:
    """Write what nanoGPT's `sample.py` reads as `ckpt.pt`, beside its place and then moved into it.

    nanoGPT has one dropout; the file holds the model's `dropout`.

    Raises:
        CheckpointError: for GELU's approximation by tanh, which nanoGPT does not have, a model that
            is no longer the one of its configuration, or a place that cannot be written.
    """
    path, model = Path(path), uncompiled(model)
    shape = model.config
    if shape.gelu_approximate != "none":
        raise CheckpointError("gelu_approximate is 'tanh'; nanoGPT has only the exact GELU, 'none'")
    tensors = {name: tensor.cpu() for name, tensor in weights_of(model).items()}
    arguments = {
        name: getattr(shape, name)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    }
    content = {
        "model": {**tensors, TIED: tensors["transformer.wte.weight"]},
        "model_args": arguments,
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as beside:
            written = Path(beside) / path.name
            torch.save(content, written)
            written.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _stripped(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def _tied(source: str, shape: GPTConfig, tensors: dict[str, Tensor]) -> GPT:
    head, embedding = tensors.pop(TIED, None), tensors.get("transformer.wte.weight")
    wrong = misfits(shape, tensors)
    if wrong:
        raise CheckpointError(f"{source} does not fit: {'; '.join(wrong)}")
    if head is not None and embedding is not None and not same(head, embedding):
        raise CheckpointError(
            f"{source} does not fit: {TIED} differs from transformer.wte.weight; "
            "this model has one matrix for both"
        )
    return assemble(shape, tensors)


def _from_hf_config(settings: Mapping[str, Any], dropout: float | None) -> GPTConfig:
    names = {
        "vocab_size": "vocab_size",
        "n_positions": "block_size",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
    }
    wrong = [f"{name} is missing" for name in names if name not in settings]
    wrong += [
        f"{name} is {settings[name]!r}; this model has {only!r}"
        for name, only in _ONLY.items()
        if settings.get(name, only) != only
    ]
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _GELUS:
        wrong.append(f"activation_function is {activation!r}; allowed are {', '.join(_GELUS)}")
    width, inner = settings.get("n_embd"), settings.get("n_inner")
    if inner is not None and inner != 4 * (width or 0):
        wrong.append(f"n_inner is {inner}; this model has 4 n_embd")
    rates = {settings.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop")}
    if dropout is None and len(rates) > 1:
        wrong.append("resid_pdrop and embd_pdrop differ; choose with `dropout`")
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
