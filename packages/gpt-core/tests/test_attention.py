import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt_core import GPT, GPTConfig
from gpt_core.attention import BF16_BLOCK, BLOCK, blocked_causal_attention


def plain_attention(qkv: Tensor, n_head: int) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v, one head after the other."""
    q, k, v = (part.chunk(n_head, -1) for part in qkv.chunk(3, -1))
    future = torch.ones(qkv.size(1), qkv.size(1)).triu(1).bool()
    heads = []
    for qh, kh, vh in zip(q, k, v, strict=True):
        scores = qh @ kh.mT / math.sqrt(qh.size(-1))
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ vh)
    return torch.cat(heads, -1)


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 17])
@pytest.mark.parametrize(("rows", "n_head", "width"), [(1, 1, 1), (3, 2, 10), (2, 6, 24)])
def test_values_and_gradients_match_the_plain_formula(
    length: int, rows: int, n_head: int, width: int
) -> None:
    torch.manual_seed(0)
    ours = torch.randn(rows, length, 3 * width, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    weights = torch.randn(rows, length, width, dtype=torch.float64)
    mine, expected = blocked_causal_attention(ours, n_head), plain_attention(theirs, n_head)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    (mine * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [7, BF16_BLOCK, 2 * BF16_BLOCK + 17])
def test_bf16_rounds_no_more_than_the_plain_formula_in_bf16(length: int) -> None:
    torch.manual_seed(2)
    qkv = torch.randn(2, length, 3 * 64, dtype=torch.bfloat16)
    weights = torch.randn(2, length, 64, dtype=torch.bfloat16)

    def run(attention: Callable[[Tensor, int], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaf = qkv.to(dtype, copy=True).requires_grad_()
        y = attention(leaf, 2)
        y.backward(weights.to(dtype))
        assert y.dtype == leaf.grad.dtype == dtype
        return [y.detach().double(), leaf.grad.double()]

    exact = run(plain_attention, torch.float64)
    plain, ours = (
        run(attention, torch.bfloat16) for attention in (plain_attention, blocked_causal_attention)
    )
    for value, of_plain, expected in zip(ours, plain, exact, strict=True):
        assert (value - expected).norm() < 1.2 * (of_plain - expected).norm()


def test_gradients_match_finite_differences() -> None:
    qkv = torch.randn(1, BLOCK + 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda qkv: blocked_causal_attention(qkv, 2), (qkv,), fast_mode=True
    )


def test_large_scores_do_not_overflow() -> None:
    qkv = (1e3 * torch.randn(1, 70, 12)).requires_grad_()
    y = blocked_causal_attention(qkv, 2)
    y.sum().backward()
    torch.testing.assert_close(y, plain_attention(qkv.detach(), 2), rtol=1e-4, atol=1e-2)
    assert qkv.grad.isfinite().all()


def test_blocked_attention_gives_the_logits_of_pytorchs_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    model = GPT(GPTConfig(11, 100, 2, 2, 16, dropout=0.0))
    idx = torch.randint(11, (2, 100))
    trained = model.train()(idx).logits
    assert "_BlockedCausalAttention" in graph_of(trained)
    with torch.no_grad():
        evaluated = model.eval()(idx).logits
    monkeypatch.setattr("gpt_core.model.blocked_is_faster", lambda _: False)
    of_kernel = model(idx).logits
    assert "_BlockedCausalAttention" not in graph_of(of_kernel)
    assert torch.equal(trained, evaluated)
    torch.testing.assert_close(trained, of_kernel, rtol=1e-5, atol=1e-6)


def test_long_sequences_use_the_flash_kernel() -> None:
    model = GPT(GPTConfig(11, 513, 1, 1, 8, dropout=0.0))
    assert "_BlockedCausalAttention" not in graph_of(model(torch.zeros(1, 513).long()).logits)


def graph_of(result: Tensor) -> str:
    """List the names of all nodes in the autograd graph of a tensor."""
    names, pending, seen = [], [result.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        pending += [parent for parent, _ in node.next_functions]
    return " ".join(names)
