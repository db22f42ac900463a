"""Compute the forward pass for one new token per row, without the overhead of modules."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_core.model import GPT, Block, KVCache
from gpt_core.quantize import Int8Linear

Layer = Callable[[Tensor], Tensor]  # (rows, channels) to (rows, channels)


def _as_function(module: nn.Module, rows: int) -> Layer:
    """Return a function that computes the module's result without the overhead of a module call.

    If there is no such function for this module, return the module itself.
    """
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
        return module.int8_product
    return module


class _BlockFunctions:
    """The layers of one transformer block, stored as functions."""

    def __init__(self, block: Block, rows: int) -> None:
        self.ln_1 = _as_function(block.ln_1, rows)
        self.c_attn = _as_function(block.attn.c_attn, rows)
        self.attn_proj = _as_function(block.attn.c_proj, rows)
        self.ln_2 = _as_function(block.ln_2, rows)
        self.c_fc = _as_function(block.mlp.c_fc, rows)
        self.approximate = block.mlp.approximate
        self.mlp_proj = _as_function(block.mlp.c_proj, rows)


class Decoder:
    """A fast forward pass for one new token per row, with a key-value cache.

    The rows of the cache may have different lengths. If all rows have equal length, the decoder
    computes the same logits as `GPT.forward` with the same cache, in evaluation mode.

    For a single token, a small model spends most of its time on module calls and views. The decoder
    therefore prepares a function for each layer when it is created. It makes the views of the cache
    once per token, not once per layer.

    Args:
        model: the model, which must not be compiled. Its layers are looked up only once, when the
            decoder is created.
        cache: keys and values of the earlier tokens in B rows. Each call adds one token per row.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.cache = cache
        self.n_head = model.config.n_head
        self.wte, self.wpe = model.transformer.wte.weight, model.transformer.wpe.weight
        rows = len(cache.lengths)
        self.layers = [_BlockFunctions(cast(Block, block), rows) for block in model.transformer.h]
        self.ln_f = _as_function(model.transformer.ln_f, rows)
        self.lm_head = _as_function(model.lm_head, rows)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Add one token per row to the cache and compute the logits of the next token.

        Args:
            tokens: int64 (B,), one token id for each row.

        Returns:
            (B, vocab_size), in the dtype of the model.

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
            mask = None  # if rows have equal length, each row sees all its tokens
            positions = self.wpe[end - 1]  # (C,)
            new_keys, new_values = (
                part[..., end - 1, :].unbind(0) for part in (cache.keys, cache.values)
            )
        else:
            rows = torch.arange(len(lengths), device=tokens.device)
            ends = torch.tensor(lengths, device=tokens.device)  # position of each new token
            seen = torch.arange(end, device=tokens.device) <= ends[:, None]  # (B, end)
            mask = seen[:, None, None]
            positions = self.wpe[ends]  # (B, C)

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
                keys[rows, :, ends] = k.to(keys.dtype)
                values[rows, :, ends] = v.to(values.dtype)
            y = F.scaled_dot_product_attention(
                q.to(keys.dtype).unsqueeze(2), keys, values, attn_mask=mask
            )  # (B, n_head, 1, head_size)
            x = x + layer.attn_proj(y.reshape(B, C))
            hidden = F.gelu(layer.c_fc(layer.ln_2(x)), approximate=layer.approximate)
            x = x + layer.mlp_proj(hidden)
        cache.advance(1)
        return self.lm_head(self.ln_f(x))
