"""Cross-entropy of a large vocabulary without its logits in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1  # a target that does not count


def at_least_fp32(logits: Tensor) -> Tensor:
    """A loss is summed in fp32, or in float64 where that is what came."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss, chunk by chunk, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        count = (targets != IGNORED).sum()
        dx = torch.empty_like(x)
        dweight = at_least_fp32(torch.zeros_like(weight))
        total = dweight.new_zeros(())
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            rows, chosen = x[part], targets[part]
            product = F.linear(rows, weight)  # (chunk, vocab_size), in autocast's dtype
            logits = at_least_fp32(product)
            total += F.cross_entropy(logits, chosen, ignore_index=IGNORED, reduction="sum")
            dlogits = logits.softmax(-1)
            seen = chosen != IGNORED
            dlogits.scatter_add_(-1, chosen.clamp(min=0)[:, None], -torch.ones_like(dlogits[:, :1]))
            dlogits = (dlogits * (seen[:, None] / count)).to(product.dtype)
            dx[part] = dlogits @ weight.to(product.dtype)
            dweight += dlogits.mT @ rows.to(product.dtype)
        ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph: what follows would be taken for a constant
            raise RuntimeError("a chunked loss has no second derivative")
        dx, dweight = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dweight * grad.to(dweight.dtype), None, None


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Mean cross-entropy of `x @ weight.T`, computed for `chunk` positions at a time.

    The idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989).

    Args:
        x: (N, C), any floating dtype.
        weight: (vocab_size, C).
        targets: int64 (N,); -1 does not count.

    Returns:
        The mean in nats, at least fp32, differentiable once; NaN if no target counts.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, targets, chunk
    )
    return loss
