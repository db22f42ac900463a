"""Modules of many kinds by name. Each call of `build` makes a new one with random weights."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune


class Holder(nn.Module):
    """A module that holds the given parameters, buffers and modules under the given names."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)


class LowRank(nn.Module):
    """A frozen linear layer and a trained update of low rank (LoRA, arXiv 2106.09685)."""

    def __init__(self, num_inputs: int = 24, num_outputs: int = 16, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(num_inputs, num_outputs).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, num_inputs))
        self.lora_B = nn.Parameter(torch.randn(num_outputs, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + inputs @ self.lora_A.T @ self.lora_B.T


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight


class Quantized(nn.Module):
    """int8 and uint8 codes with float scales, as weight-only quantization stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-127, 128, (6, 10)).to(torch.int8))
        self.register_buffer("scales", torch.rand(6, 1) + 0.1)
        self.register_buffer("packed", torch.randint(0, 256, (6, 5)).to(torch.uint8))
        self.bias = nn.Parameter(torch.randn(6))


class ExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: object) -> None:
        del state


class TensorExtraState(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.ones(2)

    def set_extra_state(self, state: object) -> None:
        del state


def small(inputs: int = 12, outputs: int = 7) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 10), nn.GELU(), nn.Linear(10, outputs))


def batch_norm() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten())
    with torch.no_grad():
        module[1].running_mean.normal_()
        module[1].running_var.uniform_(0.5, 2)
        module[1].num_batches_tracked.random_(0, 1000)
    return module


def shared_submodule() -> nn.Module:
    layer = nn.Linear(6, 6)
    return Holder(first=layer, layers=nn.ModuleList([layer, nn.Linear(6, 3), layer]))


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def partly_compiled() -> nn.Module:
    return nn.Sequential(compiled(nn.Linear(5, 5)), nn.Sequential(compiled(nn.Linear(5, 2))))


def _quietly(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return build()

    return built


def transformer() -> nn.Module:
    return nn.Transformer(
        d_model=8,
        nhead=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dim_feedforward=16,
        batch_first=True,
    )


ZOO: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 7),
    "nested": lambda: nn.Sequential(small(), Holder(inner=Holder(deep=small(3, 4)))),
    "tied embeddings": TiedLanguageModel,
    "shared submodule": shared_submodule,
    "batch norm": batch_norm,
    "batch norm without statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "batch norm without weights": lambda: nn.BatchNorm1d(6, affine=False),
    "layer norm and embedding bag": lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.LayerNorm(4)),
    "low rank": LowRank,
    "frozen": lambda: small().requires_grad_(False),
    "bfloat16": lambda: small().bfloat16(),
    "float16": lambda: small().half(),
    "float64": lambda: small().double(),
    "mixed precision": lambda: nn.Sequential(nn.Linear(6, 5).bfloat16(), nn.LayerNorm(5)),
    "float8 buffers": lambda: Holder(
        e4m3=torch.randn(4, 6).to(torch.float8_e4m3fn),
        e5m2=torch.randn(4, 6).to(torch.float8_e5m2),
        bias=nn.Parameter(torch.randn(4)),
    ),
    "complex": lambda: Holder(
        phase=nn.Parameter(torch.randn(4, 3, dtype=torch.complex64)),
        conjugated=torch.randn(4, 3, dtype=torch.complex128).conj(),
    ),
    "compiled": lambda: compiled(small()),
    "partly compiled": partly_compiled,
    "compiled and copied": lambda: copy.deepcopy(compiled(small())),
    "compiled and wrapped": lambda: Holder(module=compiled(small())),
    "wrapped": lambda: Holder(module=small()),
    "data parallel": lambda: nn.DataParallel(compiled(small())),
    "wrapped twice": lambda: Holder(module=Holder(module=small())),
    "one child called module": lambda: Holder(module=nn.Linear(4, 3), head=nn.Linear(3, 2)),
    "quantized": Quantized,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 4)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(6, 4), "weight", 0.5),
    "no parameters": lambda: nn.Sequential(nn.ReLU(), nn.Dropout()),
    "scalar": lambda: Holder(scale=nn.Parameter(torch.randn(())), steps=torch.tensor(7)),
    "empty": lambda: Holder(
        none=nn.Parameter(torch.empty(0, 3)), also=torch.empty(0, 3), one=nn.Linear(2, 2)
    ),
    "transformer": _quietly(transformer),
    "lstm": lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True),
    "gru with projection": lambda: nn.Sequential(nn.GRU(5, 6), nn.LSTM(6, 6, proj_size=3)),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True),
    "transposed": lambda: Holder(weight=nn.Parameter(torch.randn(5, 9).t()), one=nn.Linear(2, 2)),
    "strided buffer": lambda: Holder(every_other=torch.randn(6, 8)[:, ::2]),
    "channels last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "mask": lambda: Holder(mask=torch.rand(5, 5) > 0.5, weight=nn.Parameter(torch.randn(5, 5))),
    "integers": lambda: Holder(
        **{
            str(dtype).removeprefix("torch."): torch.randint(0, 100, (3, 4)).to(dtype)
            for dtype in (torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)
        },
        uint64=torch.randint(0, 100, (3, 4)).to(torch.uint64),
    ),
    "non-persistent buffer": lambda: _with_cache(),
    "parameter lists": lambda: Holder(
        many=nn.ParameterList([torch.randn(3, 4), torch.randn(2)]),
        named=nn.ParameterDict({"a": torch.randn(2, 2), "b": torch.randn(3)}),
        modules_by_name=nn.ModuleDict({"weight": nn.Linear(2, 2), "0": nn.Linear(2, 1)}),
    ),
    "initialised lazy": lambda: _initialised(nn.LazyLinear(3)),
    "bilinear and transposed convolution": lambda: nn.Sequential(
        nn.Bilinear(3, 4, 5), nn.ConvTranspose3d(2, 3, 2)
    ),
    "instance and group norm": lambda: nn.Sequential(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.GroupNorm(2, 4)
    ),
    "uninitialised lazy": _quietly(lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))),
    "sparse buffer": lambda: Holder(adjacency=torch.eye(3).to_sparse(), one=nn.Linear(2, 2)),
    "extra state": lambda: nn.Sequential(nn.Linear(2, 2), ExtraState(3, 2)),
    "extra state of a tensor": lambda: TensorExtraState(3, 2),
    "meta": lambda: nn.Linear(4, 3, device="meta"),
    "quantized tensor": _quietly(
        lambda: Holder(
            codes=torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8),
        )
    ),
    "complex32": _quietly(lambda: Holder(phase=torch.zeros(3, dtype=torch.complex32))),
    "names that collide": lambda: Holder(
        weight=nn.Parameter(torch.randn(2, 2)), _orig_mod=nn.Linear(2, 2)
    ),
}


def _with_cache() -> nn.Module:
    module = small()
    module.register_buffer("cache", torch.randn(3), persistent=False)
    return module


def _initialised(lazy: Any) -> nn.Module:
    lazy(torch.randn(2, 5))
    return lazy


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from `seed`, and restore their state afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed also formats a stack for each accelerator, which takes milliseconds.
        torch.default_generator.manual_seed(seed)
        yield


def build(name: str, seed: int) -> nn.Module:
    """Return the module of that name. The same seed gives the same weights."""
    with seeded(seed):
        return ZOO[name]()
