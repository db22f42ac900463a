"""One more token for each row, straight through the weights."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_core.model import GPT, Block, KVCache
from gpt_core.quantize import Int8Linear

Function = Callable[[Tensor], Tensor]


def _function(module: nn.Module, rows: int) -> Function:
    """What the module computes for (rows, channels), without the price of calling a module."""
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.LayerNorm:
        shape = list(module.normalized_shape)
        return partial(
            torch.layer_norm,
            normalized_shape=shape,
            weight=module.weight,
            bias=module.bias,
            eps=module.eps,
        )
    if (
        type(module) is Int8Linear
        and rows <= module.kernel_rows
        and module.weight.device.type == "cpu"
    ):
        return module.few_rows
    return module


class _Layer:
    def __init__(self, block: Block, rows: int) -> None:
        self.ln_1 = _function(block.ln_1, rows)
        self.c_attn = _function(block.attn.c_attn, rows)
        self.attn_proj = _function(block.attn.c_proj, rows)
        self.ln_2 = _function(block.ln_2, rows)
        self.c_fc = _function(block.mlp.c_fc, rows)
        self.approximate = block.mlp.approximate
        self.mlp_proj = _function(block.mlp.c_proj, rows)


class Decoder:
    """The forward pass of a single token, continuing the rows of a cache, each at its own length.

    It computes what `GPT.forward` computes with that cache. On one token a small model's time goes
    to calling modules and making views, so here there are none that could be made once.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.cache = cache
        self.n_head = model.config.n_head
        self.wte, self.wpe = model.transformer.wte.weight, model.transformer.wpe.weight
        rows = len(cache.lengths)
        self.layers = [_Layer(cast(Block, block), rows) for block in model.transformer.h]
        self.ln_f = _function(model.transformer.ln_f, rows)
        self.lm_head = _function(model.lm_head, rows)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, vocab_size) after tokens, int64 (B,), which the cache then holds too.

        Raises:
            ValueError: if a row of the cache is full.
        """
        cache, lengths = self.cache, self.cache.lengths
        end = max(lengths) + 1
        block_size = cache.keys.size(3)
        if end > block_size:
            raise ValueError(f"the sequence has {end} tokens; block_size allows {block_size}")
        seen_keys, seen_values = (
            part[..., :end, :].unbind(0) for part in (cache.keys, cache.values)
        )
        if min(lengths) + 1 == end:
            mask = None  # rows of one length need none
            positions = self.wpe[end - 1]  # (C,)
            new_keys, new_values = (
                part[..., end - 1, :].unbind(0) for part in (cache.keys, cache.values)
            )
        else:
            rows = torch.arange(len(lengths), device=tokens.device)
            places = torch.tensor(lengths, device=tokens.device)
            mask = (torch.arange(end, device=tokens.device) <= places[:, None])[:, None, None]
            positions = self.wpe[places]  # (B, C)

        x = F.embedding(tokens, self.wte) + positions  # (B, C)
        B, C = x.shape
        heads = (B, 3, self.n_head, C // self.n_head)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.c_attn(layer.ln_1(x)).view(heads).unbind(1)  # (B, n_head, head_size)
            keys, values = seen_keys[i], seen_values[i]
            if mask is None:
                new_keys[i].copy_(k)
                new_values[i].copy_(v)
            else:
                keys[rows, :, places] = k.to(keys.dtype)
                values[rows, :, places] = v.to(values.dtype)
            y = F.scaled_dot_product_attention(
                q.to(keys.dtype).unsqueeze(2), keys, values, attn_mask=mask
            )  # (B, n_head, 1, head_size)
            x = x + layer.attn_proj(y.reshape(B, C))
            hidden = F.gelu(layer.c_fc(layer.ln_2(x)), approximate=layer.approximate)
            x = x + layer.mlp_proj(hidden)
        cache.advance(1)
        return self.lm_head(self.ln_f(x))
