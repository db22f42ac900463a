"""Weights in int8, for generation on a CPU.

Writing one token reads every weight once, so that its time is that of the memory. At a quarter of
fp32's bytes the weights of a small GPT also fit into the last cache.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_core.model import GPT, MLP, CausalSelfAttention, uncompiled

# Above so many rows PyTorch's int8 kernel for CPUs is slower than fp32 products.
KERNEL_ROWS = 16
# The kernel reads several channels at once (8 with AVX2, more with AVX512) and, in a width that
# they do not divide, beyond the end of the weight.
KERNEL_CHANNELS = 32


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with one scale for each output channel.

    Its forward pass takes (..., in_features). A few rows meet the int8 weight in PyTorch's kernel,
    their activations rounded to bf16, and come out as bf16 (fp16 as fp16). More rows, and widths
    that 32 does not divide, meet the weight turned back into their own dtype.
    """

    weight: Tensor  # int8 (out_features, in_features)
    scale: Tensor  # bf16 (out_features,), as the kernel takes it
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        smallest = torch.finfo(torch.bfloat16).tiny  # of a channel of zeros
        scale = (weight.abs().amax(1) / 127).clamp(min=smallest).bfloat16()
        # divided by the scale as rounded, so that its rounding adds no error; that of a scale
        # rounded down is cut off at 127
        rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        bias = linear.bias.detach().clone() if linear.bias is not None else None
        self.kernel_rows = KERNEL_ROWS if linear.in_features % KERNEL_CHANNELS == 0 else 0
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        if 0 < rows <= self.kernel_rows and x.device.type == "cpu":
            return self.few_rows(x.reshape(rows, -1)).view(*x.shape[:-1], -1)
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def few_rows(self, x: Tensor) -> Tensor:
        """bf16 (rows, out_features) from (rows, in_features), by the int8 kernel for CPUs."""
        y = torch._weight_int8pack_mm(x.to(torch.bfloat16), self.weight, self.scale)
        if x.dtype == torch.float16:
            y = y.to(torch.float16)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}"


def int8_weights(model: GPT) -> GPT:
    """A copy of the model for generation: the matrices of its blocks are `Int8Linear`.

    Embeddings, norms and head keep their dtype: rounding shows most in the head. Of up to 16 rows
    at a time the activations are rounded to bf16 as well. The copy is in evaluation mode and cannot
    be trained or saved; `generate` and `stream` take it like any other.
    """
    quantized = copy.deepcopy(uncompiled(model)).eval().requires_grad_(False)
    for module in list(quantized.modules()):
        if isinstance(module, CausalSelfAttention | MLP):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))
    return quantized
