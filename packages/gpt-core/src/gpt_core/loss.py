"""Compute the cross-entropy for a large vocabulary without holding all logits in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1  # targets with this value do not count


def at_least_fp32(logits: Tensor) -> Tensor:
    """Convert logits to fp32 for the loss, but leave float64 logits unchanged."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """A loss whose gradients are computed chunk by chunk, during the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        count = (targets != IGNORED).sum()
        dx = torch.empty_like(x)
        dweight = at_least_fp32(torch.zeros_like(weight))
        total = dweight.new_zeros(())
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            rows, chunk_targets = x[part], targets[part]
            product = F.linear(rows, weight)  # (chunk, vocab_size), in autocast's dtype
            logits = at_least_fp32(product)
            total += F.cross_entropy(logits, chunk_targets, ignore_index=IGNORED, reduction="sum")
            dlogits = logits.softmax(-1)
            counts = chunk_targets != IGNORED
            at = chunk_targets.clamp(min=0)[:, None]
            dlogits.scatter_add_(-1, at, -torch.ones_like(dlogits[:, :1]))
            dlogits = (dlogits * (counts[:, None] / count)).to(product.dtype)
            dx[part] = dlogits @ weight.to(product.dtype)
            dweight += dlogits.mT @ rows.to(product.dtype)
        ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # Grad mode is on here only with create_graph=True. Autograd would then treat the
        # saved tensors as constants, and a second derivative would be wrong.
        if torch.is_grad_enabled():
            raise RuntimeError("a chunked loss has no second derivative")
        dx, dweight = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dweight * grad.to(dweight.dtype), None, None


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Compute the mean cross-entropy of `x @ weight.T`, `chunk` positions at a time.

    The idea comes from Liger Kernel's fused linear cross-entropy (arXiv 2410.10989).

    Args:
        x: (N, C), in any floating dtype.
        weight: (vocab_size, C).
        targets: int64 (N,). Targets of -1 do not count.
        chunk: number of positions whose logits are in memory at once.

    Returns:
        The mean in nats, as a scalar. It is float64 if `weight` is float64, and fp32 otherwise. It
        can be differentiated once, but not twice. The mean is NaN if all targets are -1.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, targets, chunk
    )
    return loss
