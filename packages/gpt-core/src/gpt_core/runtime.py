"""Choose the device, precision, compilation, batch slices and number of threads."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gpt_core.config import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "on", "off")

# The activations of this number of tokens stay in a CPU's caches from one operation to the next.
# The activations of a whole batch go through main memory, in pages that the operating system
# allocates again for each operation.
_CACHED_TOKENS = 2048

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")

Module = TypeVar("Module", bound=nn.Module)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 in hardware. Emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", None)  # missing in older releases
        if capabilities is not None:
            found = capabilities()
            return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False


def _allowed_cpus() -> int:
    """Count the CPUs that the process's affinity and its container's quota allow."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    if _CGROUP_QUOTA.is_file():
        quota, period = _CGROUP_QUOTA.read_text(encoding="ascii").split()
        if quota != "max":
            allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed


@dataclass(frozen=True)
class Runtime:
    """The settings for computing on this machine. `resolve` chooses them and gives its reasons."""

    device: torch.device
    precision: str  # "fp32", or "bf16" for bf16 autocast with fp32 weights
    compile: bool
    reasons: tuple[str, ...] = ()  # reasons for the automatic choices
    micro_batch_tokens: int = 0  # tokens in one forward and backward pass; 0 for the whole batch
    threads: int = 0  # CPU threads per operation; 0 for PyTorch's own number

    @classmethod
    def resolve(
        cls,
        *,
        device: str = "auto",
        precision: str = "auto",
        compile: str = "auto",
        micro_batch_tokens: int | None = None,
        threads: int | None = None,
    ) -> "Runtime":
        """Replace every "auto" and every None by the best choice for this machine.

        Args:
            device: "auto", "cpu", "cuda", "cuda:1" and so on, or "mps". "auto" takes CUDA if there
                is a GPU, then MPS, then the CPU.
            precision: "auto", "fp32" or "bf16". "auto" takes bf16 if the device has bf16
                in hardware, and fp32 otherwise.
            compile: "auto", "on" or "off". "auto" means "off", because in a short run, compiling
                takes more time than it saves.
            micro_batch_tokens: largest number of tokens that pass through the model at once.
                Larger batches are cut into slices, and the gradients of all slices are added. 0
                means no slices. None takes 2048 on a CPU without compilation, because the
                activations of 2048 tokens stay in the CPU's caches. Otherwise, None takes 0.
            threads: number of CPU threads. None takes PyTorch's own number of threads, but at most
                the number of CPUs that the affinity of the process and the quota of its container
                allow. If several processes share a machine, give each process a part of the CPUs.

        Raises:
            ConfigError: if a value is not allowed, or if PyTorch does not find the device.
        """
        reasons = []
        chosen = device
        if device == "auto":
            chosen = "cuda" if torch.cuda.is_available() else "cpu"
            if chosen == "cpu" and torch.backends.mps.is_available():
                chosen = "mps"
            reasons.append(f"device {chosen}: the fastest that PyTorch finds")
        resolved = _device(chosen)

        if precision == "auto":
            supported = has_bf16(resolved)
            precision = "bf16" if supported else "fp32"
            found = "found" if supported else "not found"
            reasons.append(f"precision {precision}: {resolved.type} hardware with bf16 {found}")
        elif precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; allowed are {', '.join(PRECISIONS)}")

        if compile not in COMPILE:
            raise ConfigError(f"compile is {compile!r}; allowed are {', '.join(COMPILE)}")
        compiled = compile == "on"
        if compile == "auto":
            reasons.append("compile off: compiling takes longer than a short run gains")

        for name, value, least in (
            ("micro_batch_tokens", micro_batch_tokens, 0),
            ("threads", threads, 1),
        ):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole or value < least):
                raise ConfigError(
                    f"{name} is {value!r}; it must be a whole number of at least {least}"
                )
        if micro_batch_tokens is None:
            sliced = resolved.type == "cpu" and not compiled
            micro_batch_tokens = _CACHED_TOKENS if sliced else 0
            if sliced:
                reasons.append(f"slices of {_CACHED_TOKENS} tokens: they fit the CPU's caches")
        if threads is None:
            threads = min(torch.get_num_threads(), _allowed_cpus())
            if threads < torch.get_num_threads():
                reasons.append(f"{threads} threads: this process may use no more CPUs")
        return cls(resolved, precision, compiled, tuple(reasons), micro_batch_tokens, threads)

    def prepare(self, model: Module) -> Module:
        """Move the model to the device, and compile it if compilation is on.

        This method also sets the number of threads for the whole process. On CUDA, it allows TF32.
        The model is compiled as one graph with fixed shapes. If code in the model breaks the graph,
        the first call of the compiled model raises an error.

        Returns:
            The model itself, or its compiled wrapper.
        """
        model = model.to(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for products that stay in fp32
        if not self.compile:
            return model
        return torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[return-value]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context manager for forward passes. It does nothing if precision is fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings and the reasons for them as a dictionary that JSON can hold."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            "device": str(self.device),
            "device_name": name,
            "precision": self.precision,
            "compile": self.compile,
            "micro_batch_tokens": self.micro_batch_tokens,
            "threads": self.threads or torch.get_num_threads(),
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        compiled = "compiled" if self.compile else "not compiled"
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"{self.device}, {self.precision}, {compiled}{why}"


def _device(name: str) -> torch.device:
    """Return the device with this name, or raise a ConfigError if it cannot be used."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; allowed are {', '.join(DEVICES)}") from error
    if device.type not in DEVICES:
        raise ConfigError(f"device is {name!r}; allowed are {', '.join(DEVICES)}")
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device.type]:
        raise ConfigError(f"device is {name!r}, but PyTorch finds no such device; try 'auto'")
    return device
