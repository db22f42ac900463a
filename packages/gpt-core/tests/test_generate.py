import pytest
import torch

from gpt_core import GPT, generate, stream


def recompute(model: GPT, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding that passes the whole sequence through the model for each token."""
    idx = prompt
    for _ in range(count):
        idx = torch.cat((idx, model(idx).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.parametrize("length", [1, 3, 7])
def test_greedy_text_equals_full_recomputation_up_to_the_block(model: GPT, length: int) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that the likeliest token varies
    prompt = torch.randint(11, (5, length))
    written = generate(model, prompt, 9 - length, temperature=0.0)
    assert torch.equal(written, recompute(model.eval(), prompt, 9 - length))
    assert written[:, length:].unique().numel() > 1


def test_past_the_block_the_newest_half_is_the_context(model: GPT) -> None:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    prompt = torch.randint(11, (2, 8))
    written = generate(model, prompt, 12, temperature=0.0)
    assert written.shape == (2, 20)
    # the block of 8 is full with the prompt; the 10th token is the first after a move
    window = written[:, 5:9]
    assert torch.equal(written[:, 5:14], recompute(model, window, 5))


def test_a_prompt_longer_than_the_block_keeps_its_end(model: GPT) -> None:
    prompt = torch.randint(11, (1, 30))
    long = generate(model, prompt, 5, seed=1)
    short = generate(model, prompt[:, -8:], 5, seed=1)
    assert torch.equal(long[:, 30:], short[:, 8:])


def test_equal_seeds_write_equal_text(model: GPT) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    first = generate(model, prompt, 40, seed=7)
    assert torch.equal(first, generate(model, prompt, 40, seed=7))
    assert not torch.equal(first, generate(model, prompt, 40, seed=8))


def test_draws_follow_the_softmax_at_the_temperature(model: GPT) -> None:
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    expected = (model.eval()(prompt).logits[0, -1] / 0.5).softmax(-1)
    drawn = generate(model, prompt.expand(40_000, 1), 1, temperature=0.5, seed=0)[:, 1]
    frequency = drawn.bincount(minlength=11) / 40_000
    torch.testing.assert_close(frequency, expected, atol=0.015, rtol=0)


def test_a_tiny_temperature_takes_the_likeliest(model: GPT) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    cold = generate(model, prompt, 7, temperature=1e-40, seed=0)
    assert torch.equal(cold, generate(model, prompt, 7, temperature=0.0))


def test_top_k_draws_only_the_likeliest(model: GPT) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    likeliest = model.eval()(prompt).logits[0, -1].topk(3).indices
    drawn = generate(model, prompt.expand(2_000, 1), 1, top_k=3, seed=0)[:, 1]
    assert set(drawn.tolist()) == set(likeliest.tolist())


def test_streamed_tokens_are_the_generated_ones(model: GPT) -> None:
    prompt = torch.zeros(2, 1, dtype=torch.int64)
    streamed = torch.cat(list(stream(model, prompt, 20, seed=3)), dim=1)
    assert torch.equal(streamed, generate(model, prompt, 20, seed=3)[:, 1:])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, "T >= 1 is needed"),
    ],
)
def test_a_bad_setting_is_named(model: GPT, settings: dict[str, object], named: str) -> None:
    arguments = {"prompt": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": 1, **settings}
    with pytest.raises(ValueError, match=named):
        stream(model, **arguments)  # at once, not with the first token
