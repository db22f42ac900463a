import dataclasses
import itertools
import sys

import pytest
import torch
from plain_gpt import plain_forward

from gpt_core import GPT, Decoder, GPTConfig, KVCache, generate, stream
from gpt_core.generate import _Sampler


def with_large_weights(model: GPT) -> GPT:
    """Give the model weights so large that its most likely token varies, in evaluation mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("length", [1, 3, 7])
def test_greedy_text_equals_naive_generation_up_to_the_block(model: GPT, length: int) -> None:
    with_large_weights(model)
    prompt = torch.randint(11, (5, length))
    written = generate(model, prompt, 9 - length, temperature=0.0)
    assert torch.equal(written, model.generate(prompt, 9 - length, top_k=1))
    assert written[:, length:].unique().numel() > 1


def test_past_the_block_the_newest_half_is_the_context(model: GPT) -> None:
    with_large_weights(model)
    prompt = torch.randint(11, (2, 8))
    written = generate(model, prompt, 12, temperature=0.0)
    assert written.shape == (2, 20)
    # The prompt fills the block of 8. The 10th token is the first one after a shift.
    window = written[:, 5:9]
    assert torch.equal(written[:, 5:14], model.generate(window, 5, top_k=1))


def test_an_exact_window_writes_what_naive_generation_writes(model: GPT) -> None:
    with_large_weights(model)
    prompt = torch.randint(11, (3, 4))
    written = generate(model, prompt, 30, temperature=0.0, window="exact")
    assert torch.equal(written, model.generate(prompt, 30, top_k=1))


@pytest.mark.parametrize("top_k", [0, 4])
def test_sampled_text_has_the_distribution_of_naive_generation(model: GPT, top_k: int) -> None:
    """Compare the frequencies of all pairs of tokens that follow one prompt."""
    torch.nn.init.normal_(model.lm_head.weight, std=0.7)
    prompt = torch.tensor([[1, 2]]).expand(40_000, 2)
    settings = {"temperature": 0.8, "top_k": top_k}
    torch.manual_seed(1)
    frequencies = [
        (rows[:, 2] * 11 + rows[:, 3]).bincount(minlength=121) / 40_000
        for rows in (
            generate(model, prompt, 2, seed=0, **settings),
            model.eval().generate(prompt, 2, **settings),
        )
    ]
    # A difference of two frequencies of 40,000 draws has a deviation of at most 0.0036.
    torch.testing.assert_close(*frequencies, atol=0.015, rtol=0)


def test_naive_generation_draws_from_the_softmax_of_the_plain_formula(model: GPT) -> None:
    with_large_weights(model)
    prompt = torch.randint(11, (1, 11))
    logits = plain_forward(model.state_dict(), model.config, prompt[:, -8:])[0, -1]
    kept = logits.topk(5).indices
    expected = torch.zeros(11).index_put_((kept,), (logits[kept] / 2).softmax(-1))
    rows = model.generate(prompt.expand(40_000, 11), 1, temperature=2.0, top_k=5)
    assert torch.equal(rows[:, :11], prompt.expand(40_000, 11))
    frequency = rows[:, 11].bincount(minlength=11) / 40_000
    torch.testing.assert_close(frequency, expected.detach(), atol=0.015, rtol=0)
    assert (frequency[expected == 0] == 0).all()


@pytest.mark.parametrize("window", ["shift", "exact"])
def test_prompts_of_different_lengths_give_the_same_rows_as_alone(model: GPT, window: str) -> None:
    with_large_weights(model)
    prompts = [torch.randint(11, (length,)) for length in (3, 1, 20, 8, 3, 7)]
    together = generate(model, prompts, 25, temperature=0.0, window=window)
    assert [len(row) for row in together] == [len(prompt) + 25 for prompt in prompts]
    for prompt, row in zip(prompts, together, strict=True):
        alone = generate(model, prompt[None], 25, temperature=0.0, window=window)
        assert torch.equal(row, alone[0])


def test_prompts_of_different_lengths_read_no_uninitialised_memory(model: GPT) -> None:
    with_large_weights(model)
    prompts = [torch.randint(11, (length,)) for length in (3, 1, 7)]
    expected = generate(model, prompts, 25, temperature=0.0)
    torch.use_deterministic_algorithms(True)  # new memory is then filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        written = generate(model, prompts, 25, temperature=0.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*rows) for rows in zip(written, expected, strict=True))


@pytest.mark.parametrize("window", ["shift", "exact"])
def test_a_model_with_a_block_of_one_token_can_write(tiny: GPTConfig, window: str) -> None:
    model = with_large_weights(GPT(dataclasses.replace(tiny, block_size=1)))
    prompt = torch.randint(11, (2, 1))
    written = generate(model, prompt, 6, temperature=0.0, window=window)
    assert torch.equal(written, model.generate(prompt, 6, top_k=1))


@pytest.mark.parametrize("lengths", [[5, 5], [2, 5, 3]])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_the_decoder_gives_the_logits_of_the_forward_pass(
    tiny: GPTConfig, lengths: list[int], gelu: str
) -> None:
    model = with_large_weights(
        GPT(dataclasses.replace(tiny, gelu_approximate=gelu, bias=True))
    ).double()
    idx = torch.randint(11, (len(lengths), 8))
    cache = KVCache(model.config, len(lengths), like=model.lm_head.weight)
    with torch.no_grad():
        model(idx[:, : max(lengths)], cache=cache)
        cache.truncate(lengths)
        decoder = Decoder(model, cache)
        for step in range(3):
            columns = [length + step for length in lengths]
            rows = list(range(len(lengths)))
            logits = decoder(idx[rows, columns])
            for row, column in zip(rows, columns, strict=True):
                alone = model(idx[row : row + 1, : column + 1]).logits[0, -1]
                torch.testing.assert_close(logits[row], alone, rtol=1e-10, atol=1e-10)
    assert cache.lengths == tuple(length + 3 for length in lengths)


def test_a_full_cache_takes_no_further_token(model: GPT) -> None:
    cache = KVCache(model.config, 1, like=model.lm_head.weight)
    model(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="9 tokens; block_size allows 8"):
        Decoder(model, cache)(torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes_can_write(model: GPT, dtype: torch.dtype) -> None:
    with_large_weights(model).to(dtype)
    prompt = torch.randint(11, (2, 3))
    written = generate(model, prompt, 5, temperature=0.0)
    if dtype == torch.float64:
        assert torch.equal(written, model.generate(prompt, 5, top_k=1))
    assert written.shape == (2, 8)


def test_generation_with_a_compiled_model_compiles_nothing(model: GPT) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    compiled = torch.compile(model, backend="eager")
    with torch.compiler.set_stance("fail_on_recompile"):  # any compilation is an error
        written = generate(compiled, prompt, 12, seed=0)
    assert torch.equal(written, generate(model, prompt, 12, seed=0))


def test_only_the_end_of_a_long_prompt_counts(model: GPT) -> None:
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


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-46])
def test_a_tiny_temperature_takes_the_likeliest(model: GPT, temperature: float) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    cold = generate(model, prompt, 7, temperature=temperature, seed=0)
    assert torch.equal(cold, generate(model, prompt, 7, temperature=0.0))


def test_top_k_draws_only_the_likeliest(model: GPT) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    likeliest = model.eval()(prompt).logits[0, -1].topk(3).indices
    drawn = generate(model, prompt.expand(2_000, 1), 1, top_k=3, seed=0)[:, 1]
    assert set(drawn.tolist()) == set(likeliest.tolist())


def drawn_from(probabilities: list[float], **settings: object) -> torch.Tensor:
    """Return the relative frequency of each token in 40,000 draws."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings}
    sampler = _Sampler(generator=torch.Generator().manual_seed(0), **settings)
    tokens = sampler(torch.tensor(probabilities).log().expand(40_000, -1))
    return tokens.bincount(minlength=len(probabilities)) / 40_000


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 9}, [0.1, 0.4, 0.05, 0.25, 0.2]),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.84}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"min_p": 0.3}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        # after top_k, the most likely token has probability 0.4 / 0.65 = 0.615
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.01, 0.16, 0.0025, 0.0625, 0.04]),
    ],
)
def test_draws_follow_the_filtered_distribution(
    settings: dict[str, object], expected: list[float]
) -> None:
    frequency = drawn_from([0.1, 0.4, 0.05, 0.25, 0.2], **settings)
    wanted = torch.tensor(expected) / sum(expected)
    # Four standard deviations of a frequency of 40,000 draws are at most 0.01.
    torch.testing.assert_close(frequency, wanted, atol=0.01, rtol=0)
    assert (frequency[wanted == 0] == 0).all()


def with_prediction(model: GPT, chain: dict[int, int]) -> GPT:
    """Make the model write the token `chain[t]` after token t.

    The blocks add nothing to the embeddings, so only the newest token decides.
    """
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    for block in model.transformer.h:
        torch.nn.init.zeros_(block.attn.c_proj.weight)
        torch.nn.init.zeros_(block.mlp.c_proj.weight)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(11, 16))
    embedding = torch.nn.Parameter(torch.eye(11, 16))
    model.transformer.wte.weight = embedding
    with torch.no_grad():
        for token, following in chain.items():
            model.lm_head.weight[following] += 9 * embedding[token]
    return model.eval()


COUNTING = {i: (i + 1) % 11 for i in range(11)}


@pytest.mark.parametrize(
    ("stop", "length"),
    [
        ([6], 3),
        (6, 3),
        ([[5, 6]], 3),
        ([[6, 5], 9], 6),
        ([[3, 4]], 12),  # the prompt's 3 does not count; the next 3 is written eleven tokens later
        (["fg"], 3),
        ("g", 3),
        (["zz", [8]], 5),
        ([], 14),
    ],
)
def test_a_row_ends_after_its_stop(model: GPT, stop: object, length: int) -> None:
    with_prediction(model, COUNTING)
    written = generate(
        model,
        torch.tensor([[3]]),
        14,
        temperature=0.0,
        stop=stop,
        decode=lambda ids: "".join("abcdefghijk"[i] for i in ids),
    )
    assert written.tolist() == [[(3 + i) % 11 for i in range(length + 1)]]


def test_each_row_ends_independently(model: GPT) -> None:
    with_prediction(model, COUNTING)
    settings = {"temperature": 0.0, "stop": [6]}
    rectangle = generate(model, torch.tensor([[5], [2], [9]]), 5, **settings)
    assert rectangle.tolist() == [
        [5, 6, -1, -1, -1, -1],
        [2, 3, 4, 5, 6, -1],
        [9, 10, 0, 1, 2, 3],
    ]
    rows = generate(
        model, [torch.tensor([5]), torch.tensor([1, 2]), torch.tensor([4])], 9, **settings
    )
    assert [row.tolist() for row in rows] == [[5, 6], [1, 2, 3, 4, 5, 6], [4, 5, 6]]
    assert len(list(stream(model, torch.tensor([[5], [2]]), 50, **settings))) == 4


def test_an_endless_stream_can_be_abandoned(model: GPT) -> None:
    tokens = stream(model, torch.zeros(1, 1, dtype=torch.int64), sys.maxsize, seed=0)
    assert len(list(itertools.islice(tokens, 30))) == 30


def test_zero_new_tokens_return_the_prompts(model: GPT) -> None:
    assert generate(model, torch.tensor([[1, 2]]), 0).tolist() == [[1, 2]]
    assert [
        row.tolist() for row in generate(model, [torch.tensor([1]), torch.tensor([2, 3])], 0)
    ] == [
        [1],
        [2, 3],
    ]


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
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"window": "slide"}, "window is 'slide'; allowed are shift, exact"),
        ({"stop": ["end"]}, "stop holds the string 'end', which needs `decode`"),
        ({"stop": [[]]}, "may not hold an empty string or sequence"),
        ({"stop": ""}, "may not hold an empty string or sequence"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, "it must be \\(T,\\), T >= 1"),
        (
            {"prompt": torch.zeros(3, dtype=torch.int64)},
            r"shape \(3,\); it must be \(B, T\) with T >= 1",
        ),
        ({"prompt": torch.zeros(0, 3, dtype=torch.int64)}, "there is no prompt"),
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": [[1, 2]]}, "prompt 0 is a list; it must be a tensor of ids"),
        ({"prompt": torch.zeros(1, 3)}, "prompt 0 is torch.float32; ids must be whole numbers"),
        ({"prompt": torch.tensor([[1], [11]])}, "prompt 1 holds the id 11; allowed are 0 to 10"),
        (
            {"prompt": [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]},
            "prompt 1 has shape",
        ),
    ],
)
def test_a_bad_setting_is_named(model: GPT, settings: dict[str, object], named: str) -> None:
    arguments = {"prompt": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": 1, **settings}
    with pytest.raises(ValueError, match=named):
        stream(model, **arguments)  # raised by the call, before the first token
