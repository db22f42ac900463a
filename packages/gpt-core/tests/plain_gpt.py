"""GPT-2 as plain formulas, for comparison: no modules, and softmax and GELU written out."""

import math

import torch
from torch import Tensor

from gpt_core import GPTConfig


def plain_forward(weights: dict[str, Tensor], config: GPTConfig, idx: Tensor) -> Tensor:
    """Compute logits (B, T, vocab_size) from the weights and idx, int64 (B, T)."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    T, size = idx.size(1), config.n_embd // config.n_head
    x = weights["transformer.wte.weight"][idx] + weights["transformer.wpe.weight"][:T]
    future = torch.ones(T, T).triu(1).bool()
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, -1)
        heads = []
        for h in range(config.n_head):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ k[..., part].mT / math.sqrt(size)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"{name}.attn.c_proj")
        hidden = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        if config.gelu_approximate == "none":
            half = torch.erf(hidden / math.sqrt(2))
        else:
            half = torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))
        x = x + linear(hidden * 0.5 * (1 + half), f"{name}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean negative log-likelihood of the targets (B, T) that are not -1."""
    log_likelihood = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -log_likelihood[targets >= 0].mean()
