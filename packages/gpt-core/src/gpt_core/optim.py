"""Build optimizers and compute learning-rate schedules.

`Muon` orthogonalises the momentum of hidden matrices with a Newton-Schulz iteration (Jordan et al.
2024, https://kellerjordan.github.io/posts/muon/). It scales its updates to the usual size
of AdamW's updates (Liu et al. 2025, arXiv 2502.16982), so that Muon and AdamW can use the same
learning rate.

`Muon` differs from `torch.optim.Muon` in two ways. First, on a CPU, its iteration runs in the dtype
of the parameters. `torch.optim.Muon` always iterates in bf16, and a CPU without bf16 in hardware
emulates bf16 at about a fortieth of the speed of fp32. Second, gpt-core's `Muon` can treat a fused
QKV matrix as three matrices.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gpt_core.config import ConfigError

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine", "warmup-stable-decay")

# Jordan's coefficients for the quintic polynomial. They make small singular values grow as fast as
# possible, while all values still end near 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrix: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Move all singular values of a matrix (m, n) close to 1, by a Newton-Schulz iteration.

    The result approximates U V^T, where U and V come from the singular value decomposition of the
    matrix. The singular values of the result lie between about 0.7 and 1.2.

    Args:
        matrix: (m, n), in any floating dtype.
        dtype: dtype of the iteration. None takes the dtype of `matrix`.

    Returns:
        (m, n), in the dtype of `matrix`.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrix.to(dtype or matrix.dtype)
    tall = x.size(0) > x.size(1)
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """Muon for matrices and AdamW for all other parameters, in one optimizer.

    Args:
        matrices: 2-D parameters, which Muon updates.
        others: all other parameters, which AdamW updates without weight decay.
        lr: learning rate for Muon and AdamW. Muon's update of an (m, n) matrix is multiplied by
            0.2 sqrt(max(m, n)). The update then has the usual size of an AdamW update.
        weight_decay: weight decay of the matrices, decoupled as in AdamW.
        momentum: Muon's momentum, in Nesterov's form.
        betas: AdamW's decay rates for the running means of the gradient and the squared gradient.
        eps: AdamW's constant in the denominator.
        parts: a function that takes a matrix and returns a number, for example 3 for a fused QKV
            matrix. The rows of the matrix are cut into this number of equal parts, and each part
            is orthogonalised separately.
        dtype: dtype of Muon's iteration. None takes bf16 on CUDA, and the dtype of the parameter on
            other devices.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        parts: Callable[[nn.Parameter], int] = lambda _: 1,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._dtype = dtype
        shared = {"lr": lr, "weight_decay": weight_decay}
        by_parts: dict[int, list[nn.Parameter]] = {1: []}
        for matrix in matrices:
            by_parts.setdefault(parts(matrix), []).append(matrix)
        groups: list[dict[str, Any]] = [
            {"params": group, "muon": True, "momentum": momentum, "parts": count, **shared}
            for count, group in by_parts.items()
        ]
        groups.append({"params": list(others), "muon": False, **shared, "weight_decay": 0.0})
        super().__init__(groups, {"betas": betas, "eps": eps, "momentum": momentum})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_dtype": self._dtype}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: a function that computes the gradients and returns the loss.

        Returns:
            The result of `closure`, or None if there is no closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon_update if group["muon"] else self._adam_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, group)
        return loss

    def _muon_update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        nesterov = grad.lerp(buffer, group["momentum"])
        dtype = self._dtype or (torch.bfloat16 if parameter.is_cuda else None)
        parts = group["parts"]
        for rows, direction in zip(parameter.chunk(parts), nesterov.chunk(parts), strict=True):
            size = 0.2 * math.sqrt(max(rows.shape))
            rows.add_(orthogonalise(direction, dtype=dtype), alpha=-group["lr"] * size)

    def _adam_update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        deviation = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, deviation, value=-group["lr"] / (1 - beta1 ** state["step"]))


def build_optimizer(
    model: nn.Module, name: str = "adamw", *, learning_rate: float, weight_decay: float = 0.1
) -> Optimizer:
    """Build an optimizer for a GPT.

    Args:
        model: the model to optimize.
        name: "adamw" or "muon". "adamw" is AdamW with nanoGPT's settings: betas (0.9, 0.99), and
            weight decay for matrices and embeddings only. "muon" uses `Muon` for the matrices in
            the blocks, and treats each fused QKV matrix as three matrices. It uses AdamW without
            weight decay for embeddings, norms, biases and the head.
        learning_rate: a finite number above 0.
        weight_decay: a finite number of at least 0.

    Raises:
        ConfigError: if the name is unknown, or if the learning rate or the weight decay is out of
            range.
    """
    if not 0 < learning_rate < math.inf:
        raise ConfigError(
            f"learning_rate is {learning_rate!r}; it must be greater than 0 and finite"
        )
    if not 0 <= weight_decay < math.inf:
        raise ConfigError(f"weight_decay is {weight_decay!r}; it must be at least 0 and finite")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if name == "adamw":
        decayed = [p for _, p in named if p.dim() >= 2]
        others = [p for _, p in named if p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)
    if name == "muon":
        hidden = {n: p for n, p in named if p.dim() == 2 and ".h." in n}
        fused_qkv = {id(p) for n, p in hidden.items() if n.endswith("c_attn.weight")}
        return Muon(
            hidden.values(),
            [p for n, p in named if n not in hidden],
            lr=learning_rate,
            weight_decay=weight_decay,
            parts=lambda parameter: 3 if id(parameter) in fused_qkv else 1,
        )
    raise ConfigError(f"optimizer is {name!r}; allowed are {', '.join(OPTIMIZERS)}")


def learning_rate_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int = 0,
    schedule: str = "constant",
    total_steps: int | None = None,
    decay_steps: int | None = None,
    floor: float = 0.0,
) -> float:
    """Compute the learning rate of one optimizer step. A linear warm-up precedes the schedule.

    A warm-up is needed because Adam's first updates have full length, although their direction
    comes from only a few gradients. Without a warm-up, a GPT with GPT-2's small initial weights can
    lose its progress one or more times during the first dozens of steps.

    Args:
        step: number of the step, counted from 1.
        peak: the highest rate. The warm-up reaches it at step `warmup_steps`.
        warmup_steps: number of steps in the warm-up. 0 means no warm-up.
        schedule: the course of the rate after the warm-up. "constant" stays at `peak`. "linear"
            and "cosine" (half a period, arXiv 1608.03983) fall to `floor` at `total_steps`.
            "warmup-stable-decay" stays at `peak`, and then falls linearly to `floor` over the last
            `decay_steps` steps (arXiv 2404.06395).
        total_steps: number of the last step. "constant" does not need it.
        decay_steps: number of steps over which "warmup-stable-decay" falls. None takes a fifth of
            `total_steps`.
        floor: the rate at step `total_steps` and at all later steps. "constant" does not use it.

    Raises:
        ConfigError: if the schedule is unknown, a value is out of range, or warm-up and decay
            together are longer than `total_steps`.
    """
    if step < 1:
        raise ConfigError(f"step is {step!r}; steps count from 1")
    if not 0.0 < peak < math.inf:
        raise ConfigError(f"peak is {peak!r}; it must be above 0 and finite")
    if warmup_steps < 0:
        raise ConfigError(f"warmup_steps is {warmup_steps!r}; it must be at least 0")
    if not 0.0 <= floor <= peak:
        raise ConfigError(f"floor is {floor!r}; it must be at least 0 and at most peak, {peak!r}")
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule is {schedule!r}; allowed are {', '.join(SCHEDULES)}")
    decay_start = warmup_steps
    if schedule != "constant":
        if total_steps is None:
            raise ConfigError(f"total_steps is None; the schedule {schedule!r} needs it")
        if schedule == "warmup-stable-decay":
            decay_start = total_steps - (
                max(1, total_steps // 5) if decay_steps is None else decay_steps
            )
        if not warmup_steps <= decay_start <= total_steps or total_steps < 1:
            decay = max(0, total_steps - decay_start)
            raise ConfigError(
                f"total_steps is {total_steps}; it must be at least 1 and have room for "
                f"{warmup_steps} steps of warm-up and {decay} steps of decay"
            )
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant" or total_steps is None or step <= decay_start:
        return peak
    if step >= total_steps:
        return floor
    left = 1.0 - (step - decay_start) / (total_steps - decay_start)
    if schedule == "cosine":
        left = 0.5 * (1.0 - math.cos(math.pi * left))
    return floor + (peak - floor) * left
