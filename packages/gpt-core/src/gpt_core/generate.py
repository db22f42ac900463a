"""Sampling from a GPT without recomputing the past."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpt_core.model import GPT, KVCache


def _pick(
    logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None
) -> Tensor:
    """One token (B, 1) from logits (B, vocab_size)."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float()
    # the likeliest at zero, so that a tiny temperature divides nothing into infinity
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def stream(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """New tokens, int64 (B, 1), one at a time.

    The prompt passes through the model once; each further token costs one column. When the window
    of `block_size` tokens is full, its newest half is passed through again and goes on from there.

    Args:
        model: in evaluation or training mode; it is put into evaluation mode.
        prompt: int64 (B, T) with T >= 1; only its newest `block_size` tokens are seen.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest only; 0 draws from all.
        seed: of the draws; None uses torch's global generator.

    Raises:
        ValueError: for an empty prompt or a value out of range.
    """
    if prompt.dim() != 2 or prompt.size(1) == 0:
        raise ValueError(
            f"the prompt has shape {tuple(prompt.shape)}; (B, T) with T >= 1 is needed"
        )
    if not temperature >= 0.0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be at least 0")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
    return _stream(model.eval(), prompt, max_new_tokens, temperature, top_k, seed)


@torch.inference_mode()
def _stream(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int | None,
) -> Iterator[Tensor]:
    weight = model.lm_head.weight
    block_size = model.config.block_size
    generator = None
    if seed is not None:
        generator = torch.Generator(weight.device).manual_seed(seed)
    cache = KVCache(model.config, prompt.size(0), like=weight)
    window = prompt.to(weight.device)[:, -block_size:]
    pending = window
    for _ in range(max_new_tokens):
        if cache.length == block_size:
            cache.length = 0
            pending = window = window[:, -max(1, block_size // 2) :]
        logits = model(pending, cache=cache).logits[:, -1]
        pending = _pick(logits, temperature, top_k, generator)
        window = torch.cat((window, pending), dim=1)
        yield pending


def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> Tensor:
    """The prompt and `max_new_tokens` tokens after it, int64 (B, T + max_new_tokens).

    The settings and errors are those of `stream`.
    """
    new = stream(model, prompt, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    return torch.cat((prompt.to(model.lm_head.weight.device), *new), dim=1)
