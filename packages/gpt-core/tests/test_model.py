import math

import pytest
import torch
from plain_gpt import plain_forward, plain_loss
from torch import Tensor

from gpt_core import GPT, GPTConfig, KVCache
from gpt_core.model import Dropout


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize(("n_layer", "n_head", "n_embd"), [(1, 1, 4), (2, 4, 16), (3, 2, 12)])
def test_logits_and_loss_match_the_plain_formula(
    bias: bool, gelu: str, n_layer: int, n_head: int, n_embd: int
) -> None:
    torch.manual_seed(1)
    config = GPTConfig(13, 9, n_layer, n_head, n_embd, bias=bias, gelu_approximate=gelu)
    model = GPT(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    idx, targets = torch.randint(13, (2, 3, 9))
    logits, loss = model(idx, targets)
    expected = plain_forward(model.state_dict(), config, idx)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, plain_loss(expected, targets), rtol=1e-12, atol=1e-12)


def test_the_baby_gpt_has_the_parameter_count_of_nanogpts() -> None:
    model = GPT(GPTConfig())
    assert f"{model.num_parameters() / 1e6:.2f}M" == "10.65M"
    assert model.num_parameters(positions=True) - model.num_parameters() == 256 * 384


def test_initial_weights_have_the_standard_deviations_of_gpt_2() -> None:
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


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("loss_chunk", [0, 3])
def test_gradients_match_finite_differences(gelu: str, loss_chunk: int) -> None:
    """Check the whole model in float64 and training mode, with blocked attention."""
    torch.manual_seed(2)
    model = GPT(GPTConfig(5, 4, 1, 2, 4, bias=True, dropout=0.0, gelu_approximate=gelu)).double()
    model.loss_chunk = loss_chunk
    idx, targets = torch.randint(5, (2, 2, 4))
    targets[0, 1] = -1
    names = [name for name, _ in model.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, given, (idx, targets)).loss

    values = [torch.randn_like(p).requires_grad_() for p in model.parameters()]
    # Central differences with a step of 1e-6 have an error of about 1e-12 times the third
    # derivative, and rounding adds about 1e-10.
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("loss_chunk", [0, 3])
def test_a_second_derivative_is_an_error(model: GPT, loss_chunk: int) -> None:
    model.loss_chunk = loss_chunk
    idx = torch.randint(11, (2, 8))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(model(idx, idx).loss, list(model.parameters()), create_graph=True)


def test_per_sample_gradients_of_torch_func_match_single_rows(model: GPT) -> None:
    idx = torch.randint(11, (3, 8))
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (row[None], row[None])).loss

    detached = {name: p.detach() for name, p in parameters.items()}
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, idx)
    for row in range(3):
        alone = torch.autograd.grad(
            model(idx[row : row + 1], idx[row : row + 1]).loss, [*parameters.values()]
        )
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(each[name][row], gradient, rtol=1e-4, atol=1e-6)


def test_flops_match_the_formula_of_palm() -> None:
    model = GPT(GPTConfig(50304, 1024, 12, 12, 768))
    assert model.flops_per_token() == 6 * model.num_parameters() + 12 * 12 * 768 * 1024


def test_a_cache_continues_a_sequence(model: GPT) -> None:
    model.eval()
    idx = torch.randint(11, (3, 8))
    cache = KVCache(model.config, 3, like=model.lm_head.weight)
    pieces = [model(idx[:, :5], cache=cache).logits]
    pieces += [model(idx[:, i : i + 1], cache=cache).logits for i in range(5, 8)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(idx).logits)
    assert cache.lengths == (8, 8, 8)
    with pytest.raises(ValueError, match="9 tokens; block_size allows 8"):
        model(idx[:, :1], cache=cache)


def test_a_cache_that_cannot_be_continued_is_an_error_that_says_why(model: GPT) -> None:
    cache = KVCache(model.config, 2, like=model.lm_head.weight)
    model(torch.zeros(2, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="idx has 2 tokens; a cache that is not empty takes one"):
        model(torch.zeros(2, 2, dtype=torch.int64), cache=cache)
    cache.truncate([1, 3])
    with pytest.raises(ValueError, match=r"lengths \(1, 3\); forward needs rows of equal length"):
        model(torch.zeros(2, 1, dtype=torch.int64), cache=cache)


def test_a_cache_keeps_its_own_lengths(model: GPT) -> None:
    cache = KVCache(model.config, 3, like=model.lm_head.weight)
    model(torch.zeros(3, 5, dtype=torch.int64), cache=cache)
    cache.truncate([2, 9, 5])  # a row is never made longer
    assert cache.lengths == (2, 5, 5)
    other = KVCache(model.config, 2, like=model.lm_head.weight)
    model(torch.ones(2, 4, dtype=torch.int64), cache=other)
    cache.replace_rows([2, 0], other)
    assert cache.lengths == (4, 5, 4)
    assert torch.equal(cache.keys[:, [2, 0], :, :4], other.keys[..., :4, :])
    assert torch.equal(cache.values[:, [2, 0], :, :4], other.values[..., :4, :])
    with pytest.raises(AttributeError):
        cache.lengths = (1, 1, 1)  # type: ignore[misc]


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(3)
    x = torch.ones(2_000_003)  # not a multiple of the four numbers in a word
    y = Dropout(p)(x)
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * deviation + 1e-5)
    assert y[y != 0].unique().item() == pytest.approx(1 / (1 - p), rel=1e-4)


def test_a_rate_near_one_keeps_one_in_65536() -> None:
    torch.manual_seed(3)
    y = Dropout(0.999999)(torch.ones(4_000_000))
    assert 0 < (y != 0).sum() < 200


def test_dropout_of_neighbours_is_independent() -> None:
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


def test_dropout_is_reproducible_and_is_off_in_evaluation() -> None:
    layer, x = Dropout(0.3), torch.randn(50, 3)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), x)
