"""Measure training and generation of the baby GPT against simple references.

The model has 6 layers, 6 heads, 384 channels, a block of 256 tokens and dropout 0.2. A batch has 64
rows. The references are the model in `plain.py` and `GPT.generate`.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from plain import PlainGPT, eager_step

from gpt_core import (
    GPT,
    GPTConfig,
    Runtime,
    build_optimizer,
    generate,
    int8_weights,
    train_steps,
)

CONFIG = GPTConfig()


def test_training_step(compare: Callable[..., None]) -> None:
    x, y = torch.randint(CONFIG.vocab_size, (2, 64, CONFIG.block_size))
    runtime = Runtime.resolve(device="cpu")
    ours = runtime.prepare(GPT(CONFIG))
    optimizer = build_optimizer(ours, learning_rate=1e-3)
    batch = itertools.repeat((x, y))

    plain = PlainGPT(CONFIG, dropout=0.2)

    compare(
        lambda: train_steps(ours, batch, optimizer, steps=1, runtime=runtime),
        eager_step(plain, lambda: plain(x, y)[1]),
        reference_name="plain model, eager fp32, with attention dropout",
        amount=x.numel(),
        unit="tokens",
        rounds=3,
    )


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_generation_of_256_tokens(compare: Callable[..., None], weights: str) -> None:
    prompt = torch.zeros(1, 16, dtype=torch.int64)
    model = GPT(CONFIG).eval()
    ours = int8_weights(model) if weights == "int8" else model
    compare(
        lambda: generate(ours, prompt, 256),
        lambda: model.generate(prompt, 256),
        reference_name="GPT.generate, no cache, fp32",
        amount=256,
        unit="tokens",
    )
