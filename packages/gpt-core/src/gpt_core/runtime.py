"""Where and how to compute, decided once from "auto" and printable."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from gpt_core.config import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "on", "off")

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


@dataclass(frozen=True)
class Runtime:
    """Device, precision and compilation, none of them "auto" any more, each with its reason."""

    device: torch.device
    precision: str  # "fp32" or "bf16": bf16 autocast over fp32 weights
    compile: bool
    reasons: tuple[str, ...] = ()

    @classmethod
    def resolve(
        cls, *, device: str = "auto", precision: str = "auto", compile: str = "auto"
    ) -> "Runtime":
        """Take what this machine does best for every "auto".

        Args:
            device: "auto", "cpu", "cuda" (or "cuda:1"), "mps".
            precision: "auto" is bf16 where CPU or GPU has it in hardware, else fp32.
            compile: "auto" is off: compiling takes longer than a short run gains.

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
        return cls(resolved, precision, compiled, tuple(reasons))

    def prepare(self, model: Module) -> Module:
        """The model on the device, compiled where that was chosen."""
        model = model.to(self.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        return torch.compile(model) if self.compile else model  # type: ignore[return-value]

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
            "threads": torch.get_num_threads(),
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
