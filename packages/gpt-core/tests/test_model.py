import math

import pytest
import torch
from torch import Tensor

from gpt_core import GPT, GPTConfig
from gpt_core.model import Dropout


def plain_forward(weights: dict[str, Tensor], config: GPTConfig, idx: Tensor) -> Tensor:
    """GPT-2's forward pass from its weights alone: no modules, explicit softmax."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    T, size = idx.size(1), config.n_embd // config.n_head
    x = weights["transformer.wte.weight"][idx] + weights["transformer.wpe.weight"][:T]
    future = torch.ones(T, T).triu(1).bool()
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").chunk(3, -1)
        heads = []
        for h in range(config.n_head):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ k[..., part].mT / math.sqrt(size)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"{name}.attn.c_proj")
        hidden = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(gelu, f"{name}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ weights["transformer.wte.weight"].T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_layer", "n_head", "n_embd"), [(1, 1, 4), (2, 4, 16), (3, 2, 12)])
def test_logits_and_loss_are_those_of_the_plain_formula(
    bias: bool, n_layer: int, n_head: int, n_embd: int
) -> None:
    torch.manual_seed(1)
    config = GPTConfig(13, 9, n_layer, n_head, n_embd, bias=bias)
    model = GPT(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    idx, targets = torch.randint(13, (2, 3, 9))
    logits, loss = model(idx, targets)
    expected = plain_forward(model.state_dict(), config, idx)
    chosen = expected.log_softmax(-1).gather(-1, targets[..., None])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    # the loss is computed in fp32 whatever the model's dtype
    torch.testing.assert_close(loss, -chosen.mean().float(), rtol=1e-6, atol=1e-6)


def test_the_baby_gpt_has_as_many_parameters_as_nanogpts() -> None:
    model = GPT(GPTConfig())
    assert f"{model.num_parameters() / 1e6:.2f}M" == "10.65M"
    assert model.num_parameters(positions=True) - model.num_parameters() == 256 * 384


def test_initial_weights_are_spread_as_gpt_2s() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.02)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
        else:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]


def test_no_position_sees_a_later_one(model: GPT) -> None:
    idx = torch.randint(11, (1, 8))
    later = idx.clone()
    later[0, 5:] = (later[0, 5:] + 1) % 11
    assert torch.equal(model(idx).logits[0, :5], model(later).logits[0, :5])
    assert not torch.equal(model(idx).logits[0, 5:], model(later).logits[0, 5:])


def test_targets_of_minus_one_do_not_count(model: GPT) -> None:
    idx, targets = torch.randint(11, (2, 2, 8))
    half = targets.clone()
    half[:, 4:] = -1
    assert model(idx, half).loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(
            model(idx).logits[:, :4].flatten(0, 1), targets[:, :4].flatten()
        ).item()
    )


def test_a_sequence_longer_than_the_block_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="9 tokens; block_size allows 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(2)
    model = GPT(GPTConfig(5, 4, 1, 2, 4, bias=True, dropout=0.0)).double()
    idx = torch.randint(5, (2, 4))
    names = [name for name, _ in model.named_parameters()]

    def logits(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, given, (idx,)).logits

    values = [torch.randn_like(p).requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(logits, values, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(3)
    x = torch.ones(2_000_003)  # not a multiple of the lanes in a word
    y = Dropout(p)(x)
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * deviation + 1e-5)
    assert y[y != 0].unique().item() == pytest.approx(1 / (1 - p), rel=1e-4)


def test_dropout_neighbours_are_independent() -> None:
    torch.manual_seed(4)
    kept = (Dropout(0.5)(torch.ones(4_000_000)) != 0).double() - 0.5
    for distance in (1, 2, 3, 4, 8):
        correlation = (kept[:-distance] * kept[distance:]).mean().item() / 0.25
        assert abs(correlation) < 5 / math.sqrt(kept.numel())


def test_dropout_passes_gradients_through_the_same_mask() -> None:
    x = torch.randn(7, 11, requires_grad=True)
    y = Dropout(0.4)(x)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, y.detach() / x.detach())


def test_dropout_follows_the_seed_and_rests_in_evaluation() -> None:
    layer, x = Dropout(0.3), torch.randn(50, 3)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), x)


def test_bf16_autocast_stays_near_fp32(model: GPT) -> None:
    idx, targets = torch.randint(11, (4, 8)), torch.randint(11, (4, 8))
    exact = model(idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(idx, targets)
    # bf16 keeps 8 bits: each of a few roundings moves a value by at most 2^-9 of it
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), abs=0.01)
    assert rounded.loss.dtype == torch.float32
