"""int8 weights for faster generation on a CPU.

To generate one token, the CPU must read every weight once, so the speed of memory sets the limit.
int8 weights need a quarter of the bytes of fp32. Those of a small GPT also fit into the CPU's last
cache.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_core.model import GPT, MLP, CausalSelfAttention, uncompiled

# With more rows than this, PyTorch's int8 kernel for CPUs is slower than a product in fp32.
KERNEL_ROWS = 16
# The kernel reads several channels at once (8 with AVX2, more with AVX512). If that number does not
# divide in_features, the kernel reads beyond the end of the weight.
KERNEL_CHANNELS = 32


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight and one scale per output channel.

    It takes (..., in_features) of any floating dtype. With at most 16 rows on a CPU, it rounds the
    input to bf16 and calls PyTorch's int8 kernel. The output is then bf16, or fp16 for an fp16
    input. With more rows, on other devices, and if 32 does not divide in_features, it converts the
    weight to the dtype of the input.
    """

    weight: Tensor  # int8 (out_features, in_features)
    scale: Tensor  # bf16 (out_features,), the dtype that the kernel needs
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        smallest = torch.finfo(torch.bfloat16).tiny  # avoids 0 / 0 in a channel of zeros
        scale = (weight.abs().amax(1) / 127).clamp(min=smallest).bfloat16()
        # Divide by the scale after its rounding to bf16, so that this rounding adds no error. If it
        # was rounded down, the largest weight exceeds 127 and is clamped.
        rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        bias = linear.bias.detach().clone() if linear.bias is not None else None
        self.kernel_rows = KERNEL_ROWS if linear.in_features % KERNEL_CHANNELS == 0 else 0
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        if 0 < rows <= self.kernel_rows and x.device.type == "cpu":
            return self.int8_product(x.reshape(rows, -1)).view(*x.shape[:-1], -1)
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def int8_product(self, x: Tensor) -> Tensor:
        """Multiply x, (rows, in_features), in PyTorch's int8 kernel for CPUs.

        Returns:
            (rows, out_features) in bf16, or in fp16 if x is fp16.
        """
        y = torch._weight_int8pack_mm(x.to(torch.bfloat16), self.weight, self.scale)
        if x.dtype == torch.float16:
            y = y.to(torch.float16)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}"


def int8_weights(model: GPT) -> GPT:
    """Copy the model with int8 weights in its blocks, for generation.

    Embeddings, norms and head keep their dtype, because rounding does most harm in the head. With
    at most 16 rows on a CPU, the inputs of the rounded layers are also rounded to bf16.

    Args:
        model: the model to copy. It stays as it is.

    Returns:
        A model in evaluation mode for `generate` and `stream`. It cannot be trained or saved.
    """
    quantized = copy.deepcopy(uncompiled(model)).eval().requires_grad_(False)
    for module in list(quantized.modules()):
        if isinstance(module, CausalSelfAttention | MLP):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))
    return quantized
