import pytest
import torch

from gpt_core import GPT, GPTConfig, Runtime


@pytest.fixture
def tiny() -> GPTConfig:
    return GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0)


@pytest.fixture
def model(tiny: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(tiny)


@pytest.fixture
def cpu() -> Runtime:
    return Runtime.resolve(device="cpu", precision="fp32", compile="off")
