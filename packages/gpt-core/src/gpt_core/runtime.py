"""Where and how to compute, decided once from "auto" and printable."""

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

# Activations of so many tokens stay in a CPU's caches between one operation and the next; those of
# a whole batch come and go through memory, in pages that the system hands out anew each time.
_CACHED_TOKENS = 2048

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")

Module = TypeVar("Module", bound=nn.Module)


def _has_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 run in hardware (emulated ones are slower than fp32)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", None)
        if capabilities is not None:
            found = capabilities()
            return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False


def _allowed_cpus() -> int:
    """CPUs that this process may use: its affinity and its container's quota may be fewer."""
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
    """Device, precision and the rest, none of them "auto" any more, each with its reason."""

    device: torch.device
    precision: str  # "fp32" or "bf16": bf16 autocast over fp32 weights
    compile: bool
    reasons: tuple[str, ...] = ()
    micro_batch_tokens: int = 0  # of one forward and backward pass; 0 for the whole batch
    threads: int = 0  # that share one operation on the CPU; 0 for PyTorch's own choice

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
        """Take what this machine does best for every "auto".

        Args:
            device: "auto", "cpu", "cuda" (or "cuda:1"), "mps".
            precision: "auto" is bf16 where CPU or GPU has it in hardware, else fp32.
            compile: "auto" is off: compiling takes longer than a short run gains.
            micro_batch_tokens: a batch passes through the model in slices of at most so many
                tokens, whose gradients add up; 0 for the whole at once. None is 2048 on a CPU,
                where the activations then stay in the caches, and 0 elsewhere.
            threads: None is PyTorch's own choice, or fewer where affinity or a container's quota
                allows fewer CPUs. Where several clients share a machine, give each its share.

        Raises:
            ConfigError: for an unknown choice, or a device that is not here.
        """
        reasons = []
        chosen = device
        if device == "auto":
            chosen = "cuda" if torch.cuda.is_available() else "cpu"
            if chosen == "cpu" and torch.backends.mps.is_available():
                chosen = "mps"
            reasons.append(f"device {chosen}: the fastest that PyTorch finds here")
        resolved = _device(chosen)

        has_bf16 = _has_bf16(resolved)
        if precision == "auto":
            precision = "bf16" if has_bf16 else "fp32"
            found = "found" if has_bf16 else "not found"
            reasons.append(f"precision {precision}: bf16 in {resolved.type} hardware {found}")
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
                reasons.append(f"{_CACHED_TOKENS} tokens at a time: they stay in a CPU's caches")
        if threads is None:
            threads = min(torch.get_num_threads(), _allowed_cpus())
            if threads < torch.get_num_threads():
                reasons.append(f"{threads} threads: this process may use no more CPUs")
        return cls(resolved, precision, compiled, tuple(reasons), micro_batch_tokens, threads)

    def prepare(self, model: Module) -> Module:
        """The model on the device, compiled where that was chosen; sets the thread count.

        A model is compiled for fixed shapes and as one graph: what would break the graph is an
        error of `torch.compile`.
        """
        model = model.to(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        if not self.compile:
            return model
        return torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[return-value]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which forward passes run."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def to_dict(self) -> dict[str, Any]:
        """What was chosen, ready for JSON."""
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
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; allowed are {', '.join(DEVICES)}") from error
    if device.type not in DEVICES:
        raise ConfigError(f"device is {name!r}; allowed are {', '.join(DEVICES)}")
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here[device.type]:
        raise ConfigError(f"device is {name!r}, but PyTorch finds no such device here; try 'auto'")
    return device
