"""Compare each fast path of a training step with the plain formula in fp32."""

from collections.abc import Callable

import pytest
import torch
from plain_gpt import plain_forward, plain_loss
from torch import Tensor

from gpt_core import GPT, GPTConfig, Runtime
from gpt_core.train import _backward

CONFIG = GPTConfig(31, 72, 3, 4, 32, bias=True, dropout=0.0)
Batch = tuple[Tensor, Tensor]


def plain_loss_and_gradients(model: GPT, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    loss = plain_loss(
        plain_forward(dict(zip(names, values, strict=True)), CONFIG, batch[0]), batch[1]
    )
    gradients = torch.autograd.grad(loss, values)
    return loss.detach(), dict(zip(names, gradients, strict=True))


def loss_of_step(model: torch.nn.Module, batch: Batch, **choices: object) -> Tensor:
    runtime = Runtime.resolve(
        device="cpu", **{"precision": "fp32", "compile": "off", "micro_batch_tokens": 0, **choices}
    )
    return _backward(model, batch, runtime)


def blocked(model: GPT, batch: Batch) -> Tensor:
    return loss_of_step(model.train(), batch)


def fused(model: GPT, batch: Batch) -> Tensor:
    """Replace blocked attention by `scaled_dot_product_attention`."""
    for block in model.transformer.h:
        block.attn.forward = lambda x, cache=None, attn=block.attn: attn.c_proj(
            attn._fused(attn.c_attn(x), None, 0.0)
        )
    return loss_of_step(model.train(), batch)


def accumulated(model: GPT, batch: Batch) -> Tensor:
    """Cut the batch into slices of 2, 2 and 1 rows, with different numbers of targets."""
    return loss_of_step(model.train(), batch, micro_batch_tokens=2 * CONFIG.block_size)


def chunked(model: GPT, batch: Batch) -> Tensor:
    model.loss_chunk = 50
    return loss_of_step(model.train(), batch)


def compiled(model: GPT, batch: Batch) -> Tensor:
    traced = torch.compile(model.train(), fullgraph=True, dynamic=False, backend="aot_eager")
    return loss_of_step(traced, batch)


def compiled_chunked(model: GPT, batch: Batch) -> Tensor:
    model.loss_chunk = 50
    return compiled(model, batch)


def bf16(model: GPT, batch: Batch) -> Tensor:
    return loss_of_step(model.train(), batch, precision="bf16")


def bf16_chunked(model: GPT, batch: Batch) -> Tensor:
    model.loss_chunk = 50
    return bf16(model, batch)


# fp32 has a precision of 24 bits. Sums of some hundred terms in another order differ by a relative
# error of a few 1e-6. bf16 has a precision of 8 bits. Each rounding changes a value by at most
# 2^-9, or 0.2 %. A gradient is rounded about a dozen times. Most of these errors average out, and a
# few per cent of the norm remain.
@pytest.mark.parametrize(
    ("path", "loss_tolerance", "gradient_tolerance"),
    [
        (blocked, 1e-6, 1e-5),
        (fused, 1e-6, 1e-5),
        (accumulated, 1e-6, 1e-5),
        (chunked, 1e-6, 1e-5),
        (compiled, 1e-6, 1e-5),
        (compiled_chunked, 1e-6, 1e-5),
        (bf16, 2e-3, 3e-2),
        (bf16_chunked, 2e-3, 3e-2),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_loss_and_gradients_match_the_plain_formula(
    path: Callable[[GPT, Batch], Tensor], loss_tolerance: float, gradient_tolerance: float
) -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, y = torch.randint(CONFIG.vocab_size, (2, 5, CONFIG.block_size))
    y[0, :60] = -1
    y[4] = -1
    expected_loss, expected = plain_loss_and_gradients(model, (x, y))
    loss = path(model, (x, y))
    assert loss.item() == pytest.approx(expected_loss.item(), rel=loss_tolerance)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < gradient_tolerance, name


def test_a_compiled_step_is_not_compiled_again() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, 8, 2, 2, 16, dropout=0.2))
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    x, y = torch.randint(11, (2, 4, 8))
    step(x, y).loss.backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            x, y = torch.randint(11, (2, 4, 8))
            step(x, y).loss.backward()
