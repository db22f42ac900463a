"""Define the GPT model, with nanoGPT's architecture and parameter names.

- Position embeddings are learned. Blocks are pre-norm and use GELU. The input and the output share
  one embedding matrix.
- Initial weights follow GPT-2: residual projections are scaled by 1/sqrt(2 n_layer).
- Attention runs in PyTorch's fused kernels, or in blocks of matrix products where the blocks are
  faster. On a CPU, neither the fused kernels nor the blocks can apply dropout inside attention.
  This dropout therefore has its own setting, `attention_dropout`, which is 0 by default.
- With a key-value cache, `forward` computes only the new tokens of a sequence.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_core.attention import blocked_causal_attention, blocked_is_faster
from gpt_core.config import GPTConfig
from gpt_core.loss import IGNORED, at_least_fp32, chunked_cross_entropy


class KVCache:
    """The keys and values of earlier tokens, in memory allocated once for `block_size` tokens.

    `keys` and `values` have shape (n_layer, B, n_head, block_size, head_size). They have the dtype
    and the device of the argument `like`. Row b of the batch holds `lengths[b]` tokens. The entries
    after these tokens are zero or left over from removed tokens. Code that reads these entries must
    mask them.
    """

    def __init__(self, config: GPTConfig, batch_size: int, *, like: Tensor) -> None:
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, head_size)
        # not torch.empty: attention multiplies masked values by 0, and 0 * NaN is NaN
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self._lengths = [0] * batch_size

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens in each row."""
        return tuple(self._lengths)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of one layer. All rows must have equal length.

        Call `advance` after all layers have stored their keys and values.

        Args:
            layer: index of the layer.
            k, v: (B, n_head, T, head_size), keys and values of T new tokens.

        Returns:
            The keys and the values of old and new tokens, each (B, n_head, length + T, head_size).
        """
        start = self._lengths[0]
        end = start + k.size(2)
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Increase the length of every row by `count`, after all layers have stored the tokens."""
        self._lengths = [length + count for length in self._lengths]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Keep at most the first `lengths[b]` tokens of each row b."""
        self._lengths = [min(pair) for pair in zip(self._lengths, lengths, strict=True)]

    def replace_rows(self, rows: Sequence[int], source: "KVCache") -> None:
        """Replace row `rows[i]` by row i of `source`, for every row of `source`."""
        filled = slice(max(source.lengths))
        self.keys[:, rows, :, filled] = source.keys[:, :, :, filled]
        self.values[:, rows, :, filled] = source.values[:, :, :, filled]
        for row, length in zip(rows, source.lengths, strict=True):
            self._lengths[row] = length


class _MaskedScale(torch.autograd.Function):
    """An autograd function that computes x * mask * scale.

    For the backward pass, it stores only the mask, with one byte per element.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (grad * mask).mul_(ctx.scale), None, None


class Dropout(nn.Module):
    """A dropout layer that is fast on a CPU.

    On a CPU, PyTorch draws one Bernoulli number per element, on one thread. This layer draws one
    64-bit random number for four elements, cuts the number into four 16-bit numbers, and compares
    each of these with a threshold. The dropout rate is therefore exact to 1/65536.
    `torch.manual_seed` makes the mask reproducible. On other devices, and under torch.compile or
    torch.func, the layer calls `F.dropout`.
    """

    LEVELS = 1 << 16  # number of values that 16 bits can hold

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.threshold = min(round(p * self.LEVELS), self.LEVELS - 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.threshold == 0:
            return x
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if x.device.type != "cpu" or traced:
            return F.dropout(x, self.p, training=True)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
        words.random_(-(1 << 63), None)
        numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = numbers >= self.threshold - self.LEVELS // 2  # int16 is centred on zero
        scale = self.LEVELS / (self.LEVELS - self.threshold)
        dropped: Tensor = _MaskedScale.apply(x, keep, scale)  # type: ignore[no-untyped-call]
        return dropped

    def extra_repr(self) -> str:
        return f"p={self.p}"


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention. It maps (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.attention_dropout = config.attention_dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3 C)
        dropout = self.attention_dropout if self.training else 0.0
        if cache is None and dropout == 0.0 and blocked_is_faster(qkv):
            y = blocked_causal_attention(qkv, self.n_head)
        else:
            y = self._fused(qkv, cache, dropout)
        out: Tensor = self.resid_dropout(self.c_proj(y))
        return out

    def _fused(self, qkv: Tensor, cache: KVCache | None, dropout: float) -> Tensor:
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        heads = qkv.view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, n_head, T, head_size)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            q = q.to(k.dtype)
        # a single new token may see all tokens of the cache, so it needs no mask
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=dropout)
        return y.transpose(1, 2).reshape(B, T, C)


class MLP(nn.Module):
    """Two linear layers with a GELU between them. They map (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)
        self.approximate = config.gelu_approximate

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4 C)
        out: Tensor = self.dropout(self.c_proj(hidden))
        return out


class Block(nn.Module):
    """A pre-norm transformer block: attention, then MLP, each with a residual connection."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """All layers except the head, with GPT-2's names. They map int64 (B, T) to (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        start = cache.lengths[0] if cache is not None else 0
        positions = self.wpe.weight[start : start + idx.size(1)]  # (T, C)
        x = self.drop(self.wte(idx) + positions)  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.advance(idx.size(1))
        out: Tensor = self.ln_f(x)
        return out


class GPTOutput(NamedTuple):
    """The result of `GPT.forward`."""

    logits: Tensor | None  # (B, T, vocab_size); None if loss is computed in chunks
    loss: Tensor | None  # mean in nats, a scalar; None without targets


class GPT(nn.Module):
    """A GPT language model: GPT-2 (Radford et al. 2019), as implemented in Karpathy's nanoGPT.

    The initial weights are drawn from torch's global generator. To make the weights reproducible,
    call `torch.manual_seed` before you build the model.

    Attributes:
        config: the settings of this model.
        loss_chunk: number of positions in one chunk. The default, 0, computes the loss of all
            positions at once. With a number above 0, the loss is computed chunk by chunk. Memory
            then never holds all logits (B, T, vocab_size) or their gradient, and `forward` with
            targets returns no logits. This saves memory if the vocabulary is large.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.loss_chunk = 0
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)

    def num_parameters(self, *, positions: bool = False) -> int:
        """Count the parameters. The shared embedding is counted only once, as in nanoGPT.

        Args:
            positions: whether to count the position embeddings too.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        return total if positions else total - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> int:
        """Estimate the floating-point operations per token in one training step.

        The formula is from appendix B of PaLM (arXiv 2204.02311): 6 operations for each parameter
        that is not a position embedding, and 12 n_layer n_embd block_size operations for attention.
        The formula assumes sequences of `block_size` tokens. It counts the whole attention matrix,
        although only its causal half is needed.
        """
        config = self.config
        attention = 12 * config.n_layer * config.n_embd * config.block_size
        return 6 * self.num_parameters() + attention

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None
    ) -> GPTOutput:
        """Compute the logits of the next token at every position, and the loss.

        Args:
            idx: int64 (B, T) token ids. T plus the number of tokens in the cache must be at most
                `block_size`.
            targets: int64 (B, T), the correct next tokens. Targets of -1 do not count.
            cache: keys and values of earlier tokens. `idx` continues these tokens. The call adds
                the new keys and values to the cache.

        Returns:
            `logits`, (B, T, vocab_size), and `loss`, the mean cross-entropy in nats. The loss is
            float64 for a float64 model and fp32 otherwise. The loss is None without targets. The
            logits are None if `loss_chunk` is above 0 and targets are given.

        Raises:
            ValueError: if the sequence is longer than `block_size`, if the rows of the cache have
                different lengths, or if the cache is not empty and T is more than 1.
        """
        T = idx.size(1)
        end = T
        if cache is not None:
            end += max(cache.lengths)
            if end > T > 1:
                raise ValueError(
                    f"idx has {T} tokens; a cache that is not empty takes one token at a time"
                )
            if min(cache.lengths) != max(cache.lengths):
                raise ValueError(
                    f"the cache's rows have lengths {cache.lengths}; forward needs rows of equal "
                    "length, use `Decoder` for others"
                )
        if end > self.config.block_size:
            raise ValueError(
                f"the sequence has {end} tokens; block_size allows {self.config.block_size}"
            )
        x = self.transformer(idx, cache)  # (B, T, C)
        if targets is not None and self.loss_chunk > 0:
            weight = self.lm_head.weight
            loss = chunked_cross_entropy(
                x.flatten(0, 1), weight, targets.flatten(), self.loss_chunk
            )
            return GPTOutput(None, loss)
        logits = self.lm_head(x)
        if targets is None:
            return GPTOutput(logits, None)
        loss = F.cross_entropy(
            at_least_fp32(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        return GPTOutput(logits, loss)

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0
    ) -> Tensor:
        """Sample tokens one by one, and recompute the whole window for each new token.

        This is the simple reference implementation. `gpt_core.generate` with `window="exact"` draws
        from the same distribution, but it caches keys and values. Call `eval()` first. Otherwise,
        dropout is active.

        Args:
            idx: int64 (B, T) prompts of at least one token.
            max_new_tokens: number of tokens to append to each row.
            temperature: a number above 0 that divides the logits.
            top_k: draw only from the k most likely tokens. 0 means all tokens.

        Returns:
            int64 (B, T + max_new_tokens), the prompts and the sampled tokens.
        """
        for _ in range(max_new_tokens):
            window = idx[:, -self.config.block_size :]  # (B, at most block_size)
            logits = self(window).logits[:, -1] / temperature  # (B, vocab_size)
            if top_k > 0:
                kth_largest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth_largest, -math.inf)
            drawn = torch.multinomial(logits.softmax(-1), num_samples=1)  # (B, 1)
            idx = torch.cat((idx, drawn), dim=1)
        return idx


def uncompiled(model: GPT) -> GPT:
    """Return the original model if `model` is a `torch.compile` wrapper, and `model` if not."""
    inner: GPT = getattr(model, "_orig_mod", model)
    return inner
