"""Test that gpt-core and GPT-2 in `transformers` give equal logits, gradients and text."""

import itertools
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList
from transformers.generation import logits_process

from gpt_core import GPT, GPTConfig, from_hf_gpt2, generate, to_hf_gpt2
from gpt_core.generate import _Sampler

SHAPES = [(1, 1, 4), (2, 4, 16), (3, 2, 12), (2, 3, 96), (6, 6, 384)]  # n_layer, n_head, n_embd
GELUS = ["gelu", "gelu_new"]
ATTENTIONS = ["eager", "sdpa"]
# Logits are up to about 10. Summing a few hundred fp32 terms in another order than the reference
# changes them by a few 1e-6.
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-12}
CONFIGURATIONS = list(itertools.product(SHAPES, GELUS, ATTENTIONS, TOLERANCE))


def transformers_model(
    shape: tuple[int, int, int], activation: str, attention: str, **changes: Any
) -> Any:
    """Build a GPT2LMHeadModel whose weights, biases and norms are random."""
    n_layer, n_head, n_embd = shape
    config = GPT2Config(
        vocab_size=65,
        n_positions=80,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        activation_function=activation,
        attn_implementation=attention,
        bos_token_id=None,
        eos_token_id=None,
        **changes,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.mark.parametrize(("shape", "activation", "attention", "dtype"), CONFIGURATIONS)
def test_logits_loss_and_gradients_match_transformers(
    shape: tuple[int, int, int],
    activation: str,
    attention: str,
    dtype: torch.dtype,
    record_property: Any,
) -> None:
    torch.manual_seed(0)
    reference = transformers_model(
        shape, activation, attention, attn_pdrop=0.0, resid_pdrop=0, embd_pdrop=0
    )
    reference.to(dtype)
    model = from_hf_gpt2(reference)
    idx = torch.randint(65, (3, 80))
    targets = torch.cat((idx[:, 1:], torch.full((3, 1), -1)), dim=1)
    expected = reference(idx, labels=idx)  # transformers shifts the labels itself
    for training in (False, True):  # first the fused kernel, then blocked attention
        with torch.set_grad_enabled(training):
            logits, loss = model.train(training)(idx, targets)
        difference = (logits - expected.logits).abs().max().item()
        assert difference < TOLERANCE[dtype]
        record_property(f"largest difference of a logit, {dtype}", difference)
        assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    loss.backward()
    expected.loss.backward()
    gradients = to_hf_gpt2(with_gradients_as_weights(model)).state_dict
    for name, parameter in reference.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        # A bias of the keys adds the same number to all scores of a query. Its true gradient is 0.
        if not name.endswith("c_attn.bias"):
            assert error < 2e-5, name


def with_gradients_as_weights(model: GPT) -> GPT:
    holder = GPT(model.config)
    for into, parameter in zip(holder.parameters(), model.parameters(), strict=True):
        into.data = parameter.grad
    return holder


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_transformers_loads_an_exported_model(bias: bool, gelu: str) -> None:
    torch.manual_seed(1)
    model = GPT(GPTConfig(31, 20, 2, 3, 12, bias=bias, gelu_approximate=gelu)).eval()
    state_dict, config = to_hf_gpt2(model)
    reference = GPT2LMHeadModel(GPT2Config(**config)).eval()
    reference.load_state_dict(state_dict)
    idx = torch.randint(31, (3, 20))
    torch.testing.assert_close(reference(idx).logits, model(idx).logits, rtol=1e-5, atol=1e-5)


def test_files_saved_by_transformers_can_be_read(tmp_path: Any) -> None:
    import json

    from safetensors.torch import load_file

    torch.manual_seed(2)
    reference = transformers_model((2, 4, 16), "gelu_new", "sdpa")
    reference.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    model = from_hf_gpt2(found, json.loads((tmp_path / "config.json").read_text()))
    idx = torch.randint(65, (3, 20))
    torch.testing.assert_close(reference(idx).logits, model(idx).logits, rtol=1e-5, atol=1e-5)


def test_greedy_text_matches_transformers() -> None:
    torch.manual_seed(3)
    reference = transformers_model((3, 2, 12), "gelu_new", "sdpa")
    prompt = torch.randint(65, (4, 5))
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=60,
        pad_token_id=0,
    )
    assert torch.equal(generate(from_hf_gpt2(reference), prompt, 60, temperature=0.0), expected)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.1), (9, 0.7, 0.05)]
)
def test_tokens_are_drawn_from_the_filtered_distribution_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    torch.manual_seed(4)
    logits = 2 * torch.randn(1, 65)
    warpers = LogitsProcessorList([logits_process.TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(logits_process.MinPLogitsWarper(min_p))
    expected = warpers(torch.zeros(1, 1).long(), logits).softmax(-1)[0]
    sampler = _Sampler(temperature, top_k, top_p, min_p, torch.Generator().manual_seed(0))
    drawn = sampler(logits.expand(40_000, -1)).bincount(minlength=65) / 40_000
    assert set(drawn.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    torch.testing.assert_close(drawn, expected, atol=0.011, rtol=0)
