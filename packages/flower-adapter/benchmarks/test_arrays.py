"""Convert two GPTs to Flower arrays and back, compared with Flower's own functions."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from torch import nn

from flower_adapter import load_arrays, restore_state, save_state, to_arrays

Compare = Callable[..., None]


class GPTShaped(nn.Module):
    """A module with the weight matrices of a GPT and its tied embedding."""

    def __init__(self, layers: int, width: int, vocab_size: int) -> None:
        super().__init__()
        shapes = [(3, 1), (1, 1), (4, 1), (1, 4)] * layers
        self.layers = nn.ModuleList(nn.Linear(i * width, o * width, bias=False) for o, i in shapes)
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight


SIZES = {"10.6M": (6, 384, 65), "124M": (12, 768, 50257)}


@pytest.fixture(params=SIZES, scope="module")
def module(request: pytest.FixtureRequest) -> GPTShaped:
    return GPTShaped(*SIZES[request.param])


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_module_to_arrays(compare: Compare, module: GPTShaped) -> None:
    compare(
        lambda: to_arrays(module),
        lambda: ArrayRecord(dict(module.state_dict())),
        reference_name="ArrayRecord(state_dict)",
        amount=num_parameters(module),
        unit="parameters",
        rounds=9,
    )


def test_arrays_to_module(compare: Compare, module: GPTShaped) -> None:
    target = copy.deepcopy(module)
    ours, reference = to_arrays(module), ArrayRecord(dict(module.state_dict()))
    compare(
        lambda: load_arrays(target, ours),
        lambda: target.load_state_dict(reference.to_torch_state_dict()),
        reference_name="to_torch_state_dict and load_state_dict",
        amount=num_parameters(module),
        unit="parameters",
        rounds=9,
    )


def test_optimizer_state_there_and_back(compare: Compare) -> None:
    module = nn.Linear(1024, 1024)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(2, 1024)).sum().backward()
    optimizer.step()
    context = Context(1, 2, {}, RecordDict(), {})

    def ours() -> Any:
        save_state(context, optimizer=optimizer)
        return restore_state(context)

    def reference() -> Any:
        state = optimizer.state_dict()["state"]
        for index, tensors in state.items():
            context.state[f"plain.{index}"] = ArrayRecord(dict(tensors))
        return {i: context.state[f"plain.{i}"].to_torch_state_dict() for i in state}

    compare(
        ours,
        reference,
        reference_name="one ArrayRecord for each parameter, tensors only",
        amount=2 * num_parameters(module),
        unit="values",
        rounds=9,
    )
