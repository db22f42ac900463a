"""Compute causal self-attention in blocks of matrix products, on a CPU.

PyTorch's flash attention for CPUs is much slower than PyTorch's matrix products. This module cuts
the queries into blocks. It multiplies each block of queries only with the keys up to the end of
that block. It therefore computes little more than the causal half of the attention matrix.

The forward pass stores the attention weights, and the backward pass reuses them. In fp32, the
attention weights of one layer take about 2 * B * n_head * T^2 bytes. This memory grows with T^2, so
sequences of more than 512 tokens use PyTorch's flash attention instead.

In bf16, the attention weights and the scores before the softmax are rounded to bf16, as they are in
any attention that consists of matrix products. Flash attention keeps the scores in fp32.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gpt_core.runtime import has_bf16

# Queries in a block. At T = 256 and head size 64, these are faster than half and twice as many.
BLOCK, BF16_BLOCK = 64, 128
MAX_LENGTH = 512  # tokens


def _blocks(length: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Return the start and the end of each block."""
    size = BF16_BLOCK if dtype == torch.bfloat16 else BLOCK
    return [(start, min(start + size, length)) for start in range(0, length, size)]


class _BlockedCausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        D = C // n_head
        heads = qkv.view(B, T, 3, n_head, D).permute(2, 0, 3, 1, 4).reshape(3, B * n_head, T, D)
        q, k, v = heads  # each (B n_head, T, D)
        blocks = _blocks(T, qkv.dtype)
        longest = blocks[0][1]
        future = qkv.new_full((longest, longest), -math.inf).triu_(1)
        y = qkv.new_empty(B, T, n_head, D)
        rows = y.transpose(1, 2)  # (B, n_head, T, D)
        weights = []
        for start, end in blocks:
            mask = qkv.new_zeros(end - start, end)
            mask[:, start:] = future[: end - start, : end - start]
            p = torch.baddbmm(mask, q[:, start:end], k[:, :end].mT, alpha=1 / math.sqrt(D))
            torch.softmax(p, -1, out=p)  # (B n_head, end - start, end)
            rows[:, :, start:end] = torch.bmm(p, v[:, :end]).view(B, n_head, -1, D)
            weights.append(p)
        ctx.save_for_backward(heads, *weights)
        ctx.shape = B, T, n_head, D
        return y.view(B, T, C)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Grad mode is on here only with create_graph=True. Autograd would then treat the
        # saved tensors as constants, and a second derivative would be wrong.
        if torch.is_grad_enabled():
            raise RuntimeError("blocked attention has no second derivative")
        heads, *weights = ctx.saved_tensors
        B, T, n_head, D = ctx.shape
        q, k, v = heads
        scale = 1 / math.sqrt(D)
        grad = grad.view(B, T, n_head, D).transpose(1, 2).reshape(B * n_head, T, D)
        out = grad.new_empty(B, T, 3, n_head, D)
        dq, dk, dv = out.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, D)
        # For each block of keys, `sums` holds two contiguous tensors: the gradients of its keys and
        # of its values. The block of queries at the same positions creates both tensors. Each later
        # block of queries adds its part to them.
        sums: list[tuple[Tensor, Tensor]] = []
        blocks = _blocks(T, q.dtype)
        for (start, end), p in zip(blocks, weights, strict=True):
            g, queries = grad[:, start:end], q[:, start:end]
            dp = torch.bmm(g, v[:, :end].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
            dq[:, :, start:end] = torch.bmm(ds, k[:, :end]).view(B, n_head, -1, D)
            for (first, last), (key_sum, value_sum) in zip(blocks, sums, strict=False):
                key_sum.baddbmm_(ds[:, :, first:last].mT, queries)
                value_sum.baddbmm_(p[:, :, first:last].mT, g)
            sums.append((torch.bmm(ds[:, :, start:].mT, queries), torch.bmm(p[:, :, start:].mT, g)))
        for (start, end), (key_sum, value_sum) in zip(blocks, sums, strict=True):
            dk[:, :, start:end] = key_sum.view(B, n_head, -1, D)
            dv[:, :, start:end] = value_sum.view(B, n_head, -1, D)
        return out.view(B, T, 3 * n_head * D), None


def blocked_causal_attention(qkv: Tensor, n_head: int) -> Tensor:
    """Compute causal self-attention in blocks of matrix products.

    Args:
        qkv: (B, T, 3 C), contiguous, in any floating dtype. The last dimension holds queries, keys
            and values. Each of these has n_head heads with C / n_head channels.
        n_head: number of heads. It must divide C.

    Returns:
        (B, T, C), in the dtype of `qkv`. The result can be differentiated once, but not twice.
    """
    attended: Tensor = _BlockedCausalAttention.apply(qkv, n_head)  # type: ignore[no-untyped-call]
    return attended


def blocked_is_faster(qkv: Tensor) -> bool:
    """Return whether `blocked_causal_attention` should be used for `qkv`, (B, T, 3 C).

    `blocked_causal_attention` is faster than PyTorch's attention on a CPU, with 2 to 512 tokens, in
    fp32, float64, or bf16 that the hardware has. It is never used under torch.compile or
    torch.func.
    """
    return (
        qkv.device.type == "cpu"
        and (
            qkv.dtype in (torch.float32, torch.float64)
            or (qkv.dtype == torch.bfloat16 and has_bf16(qkv.device))
        )
        and 1 < qkv.size(1) <= MAX_LENGTH
        and not torch.compiler.is_compiling()
        # torch.func transforms do not accept an autograd function without `setup_context`
        and not torch._C._are_functorch_transforms_active()
    )
