"""Store weights in int8, for faster generation on a CPU.

To generate one token, the CPU must read every weight once. The speed of memory therefore limits the
speed of generation. int8 weights need a quarter of the bytes that fp32 weights need. The int8
weights of a small GPT also fit into the CPU's last-level cache.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_core.model import GPT, MLP, CausalSelfAttention, uncompiled

# Above this number of rows, PyTorch's int8 kernel for CPUs is slower than a product in fp32.
KERNEL_ROWS = 16
# The kernel reads several channels at once (8 with AVX2, more with AVX512). If in_features is not a
# multiple of that number, the kernel reads beyond the end of the weight.
KERNEL_CHANNELS = 32


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight and one scale per output channel.

    The input has shape (..., in_features) and any floating dtype. For at most 16 rows on a CPU, the
    layer rounds the input to bf16 and calls PyTorch's int8 kernel. The output is then bf16, or fp16
    for an fp16 input. In three other cases, the layer converts the weight to the dtype of the input
    and computes an ordinary product: for more rows, on other devices, and if in_features is not a
    multiple of 32.
    """

    weight: Tensor  # int8 (out_features, in_features)
    scale: Tensor  # bf16 (out_features,), because the kernel needs bf16
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        smallest = torch.finfo(torch.bfloat16).tiny  # avoids 0 / 0 if a channel is all zeros
        scale = (weight.abs().amax(1) / 127).clamp(min=smallest).bfloat16()
        # Divide by the scale that was already rounded to bf16, so that this rounding adds no error.
        # If the scale was rounded down, the largest quotient exceeds 127 and is clamped.
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
        """Compute the output of the layer with PyTorch's int8 kernel for CPUs.

        Args:
            x: (rows, in_features), in any floating dtype. It is rounded to bf16.

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
    """Copy the model for generation, with int8 weights in the linear layers of its blocks.

    Embeddings, norms and the head keep their dtype. int8 weights in the head would harm the
    predictions most, and the head shares its weights with the token embedding. For at most 16 rows
    on a CPU, the inputs of the int8 layers are also rounded to bf16.

    Args:
        model: the model to copy. It is not changed.

    Returns:
        A model in evaluation mode, for `generate` and `stream`. It cannot be trained or saved.
    """
    quantized = copy.deepcopy(uncompiled(model)).eval().requires_grad_(False)
    for module in list(quantized.modules()):
        if isinstance(module, CausalSelfAttention | MLP):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))
    return quantized
