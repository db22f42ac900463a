"""Build optimizers and compute learning-rate schedules.

`Muon` orthogonalises the momentum of hidden matrices with a Newton-Schulz iteration (Jordan et al.
2024, https://kellerjordan.github.io/posts/muon/). It scales its updates to the usual size
of AdamW's updates (Liu et al. 2025, arXiv 2502.16982), so that Muon and AdamW can use the same
learning rate.

`Muon` differs from `torch.optim.Muon` in three ways, because on a CPU `torch.optim.Muon` takes
almost as long as the rest of a training step:

- It can cut a matrix into blocks, for example into the heads of an attention layer, and
  orthogonalise each block alone. All blocks of one shape go through the same batched products.
- It iterates four times instead of five, with the polynomials of Polar Express (Amsel et al. 2025,
  arXiv 2505.16932), and ends closer to an orthogonal matrix.
- It iterates in bf16 only where the hardware has bf16. Elsewhere, a CPU emulates bf16 at about a
  fortieth of the speed of fp32.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gpt_core.config import ConfigError
from gpt_core.model import CausalSelfAttention
from gpt_core.runtime import has_bf16

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine", "warmup-stable-decay")

# The polynomials a x + b x^3 + c x^5 of Polar Express (arXiv 2505.16932), one for each iteration.
# Each moves the singular values that the one before it leaves as close to 1 as it can, beginning
# with values between `SMALLEST` and 1. A test checks that.
SMALLEST = 0.003
POLYNOMIALS = (
    (8.251042098374375, -23.662592329384452, 17.386797743600724),
    (4.019267114927549, -2.954318684816347, 0.5563800825883425),
    (3.5190251191662867, -2.6364899536560387, 0.5268364772966416),
    (2.5060695816638088, -1.8478249605898889, 0.438324068564947),
)
# Rounding in bf16 can lift a singular value above the interval of the next polynomial, which grows
# steeply there. Each polynomial therefore gets its input this much smaller, as in the paper.
_MARGIN = 1.01


def orthogonalise(matrices: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Move all singular values of each matrix close to 1, by a Newton-Schulz iteration.

    The result approximates U V^T, where U and V come from the singular value decomposition of a
    matrix. Its singular values lie between 0.75 and 1.25, if those of the matrix are at least 0.003
    times its Frobenius norm. Smaller ones grow
    about 250-fold.

    Args:
        matrices: (N, m, n), in any floating dtype. A stack of many small matrices is much faster
            than the same matrices one by one.
        dtype: dtype of the iteration. None takes the dtype of `matrices`.

    Returns:
        (N, m, n), in the dtype of `matrices`.
    """
    x = matrices.to(dtype or matrices.dtype)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_(min=1e-7)
    # All polynomials but the first one can be computed from the small matrix x x^T alone. Rounding
    # errors in its small eigenvalues grow there, in bf16 too much to apply more than two at once.
    together = 1 if x.size(2) < 2 * x.size(1) else 2 if x.element_size() < 4 else 4
    for first in range(0, len(POLYNOMIALS), together):
        gram = torch.bmm(x, x.mT)
        product = None
        for i, (a, b, c) in enumerate(POLYNOMIALS[first : first + together], start=1):
            a, b, c = a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # x becomes (a + factor) x
            if together == 1:
                x = torch.baddbmm(x, factor, x, beta=a)
                continue
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else torch.bmm(factor, product)
            if i < together:
                gram = torch.bmm(factor, torch.bmm(factor, gram))
        x = x if product is None else torch.bmm(product, x)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Muon for matrices and AdamW for all other parameters, in one optimizer.

    Args:
        matrices: 2-D parameters, which Muon updates.
        others: all other parameters, which AdamW updates without weight decay.
        lr: learning rate for Muon and AdamW. Muon's update of a block (m, n) is multiplied by
            0.2 sqrt(max(m, n)). The update then has the usual size of an AdamW update.
        weight_decay: weight decay of the matrices, decoupled as in AdamW.
        momentum: Muon's momentum, in Nesterov's form.
        betas: AdamW's decay rates for the running means of the gradient and the squared gradient.
        eps: AdamW's constant in the denominator.
        others_rate: learning rate of AdamW, as a multiple of `lr`.
        blocks: a function that takes a matrix and returns into how many blocks its rows and its
            columns are cut, for example (3, 1) for a fused QKV matrix. Each block is orthogonalised
            alone.
        dtype: dtype of Muon's iteration. None takes bf16 if the device of the matrices has bf16 in
            hardware, and the dtype of the matrices otherwise.
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
        others_rate: float = 1.0,
        blocks: Callable[[nn.Parameter], tuple[int, int]] = lambda _: (1, 1),
        dtype: torch.dtype | None = None,
    ) -> None:
        self._dtype = dtype
        shared = {"lr": lr, "weight_decay": weight_decay}
        by_blocks: dict[tuple[int, int], list[nn.Parameter]] = {(1, 1): []}
        for matrix in matrices:
            by_blocks.setdefault(blocks(matrix), []).append(matrix)
        groups: list[dict[str, Any]] = [
            {"params": group, "muon": True, "momentum": momentum, "blocks": counts, **shared}
            for counts, group in by_blocks.items()
        ]
        adamw = {"muon": False, "rate": others_rate, **shared, "weight_decay": 0.0}
        groups.append({"params": list(others), **adamw})
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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    if not group["muon"]:
                        self._adam_update(parameter, parameter.grad, group)
        self._muon_updates([group for group in self.param_groups if group["muon"]])
        return loss

    def _muon_updates(self, groups: list[dict[str, Any]]) -> None:
        """Update all matrices. Blocks of one shape are orthogonalised together."""
        stacks: dict[Any, list[tuple[Tensor, Tensor, float]]] = {}
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = self._direction(parameter, parameter.grad, group["momentum"])
                target, blocks = (_wide_blocks(x, *group["blocks"]) for x in (parameter, direction))
                rate = group["lr"] * 0.2 * math.sqrt(blocks.size(-1))
                kind = (*blocks.shape[-2:], blocks.device, blocks.dtype)
                stacks.setdefault(kind, []).append((target, blocks, rate))
        for (m, n, device, dtype), members in stacks.items():
            counts = [blocks.size(0) * blocks.size(1) for _, blocks, _ in members]
            iterated = self._dtype or (torch.bfloat16 if has_bf16(device) else dtype)
            stack = torch.empty(sum(counts), m, n, dtype=iterated, device=device)
            parts = torch.split(stack, counts)
            for (_, blocks, _), part in zip(members, parts, strict=True):
                part.view(blocks.shape).copy_(blocks)
            updates = torch.split(orthogonalise(stack), counts)
            for (target, _, rate), update in zip(members, updates, strict=True):
                target.sub_(update.view(target.shape), alpha=rate)

    def _direction(self, parameter: Tensor, grad: Tensor, momentum: float) -> Tensor:
        """Update the momentum and return the matrix that is orthogonalised."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum)

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
        rate = group["lr"] * group["rate"]
        parameter.addcdiv_(mean, deviation, value=-rate / (1 - beta1 ** state["step"]))


def _wide_blocks(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return a view of the blocks of a matrix. A block that is taller than wide is transposed.

    Args:
        matrix: (m, n). `rows` must divide m, and `columns` must divide n.

    Returns:
        (rows, columns, a, b), where a is at most b.
    """
    m, n = matrix.shape
    blocks = matrix.view(rows, m // rows, columns, n // columns).transpose(1, 2)
    return blocks.mT if blocks.size(2) > blocks.size(3) else blocks


def _blocks_of(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Return into how many blocks of rows and columns Muon cuts each matrix, by the matrix's id."""
    blocks = {}
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            blocks[id(module.c_attn.weight)] = 3 * module.n_head, 1
            blocks[id(module.c_proj.weight)] = 1, module.n_head
    return blocks


def build_optimizer(
    model: nn.Module,
    name: str = "adamw",
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    embedding_rate: float = 1.0,
) -> Optimizer:
    """Build an optimizer for a GPT.

    Args:
        model: the model to optimize.
        name: "adamw" or "muon". "adamw" is AdamW with nanoGPT's settings: betas (0.9, 0.99), and
            weight decay for matrices and embeddings only. "muon" uses `Muon` for the matrices in
            the blocks, and cuts the matrices of attention into heads. It uses AdamW without
            weight decay for embeddings, norms, biases and the head.
        learning_rate: a finite number above 0.
        weight_decay: a finite number of at least 0.
        momentum: Muon's momentum, at least 0 and less than 1. "adamw" does not use it.
        embedding_rate: with "muon", the learning rate of all parameters that AdamW trains, as a
            multiple of `learning_rate`. It must be finite and above 0. "adamw" does not use it.

    Raises:
        ConfigError: if the name is unknown, or if a number is out of range.
    """
    if not 0 < learning_rate < math.inf:
        raise ConfigError(
            f"learning_rate is {learning_rate!r}; it must be greater than 0 and finite"
        )
    if not 0 <= weight_decay < math.inf:
        raise ConfigError(f"weight_decay is {weight_decay!r}; it must be at least 0 and finite")
    if not 0 <= momentum < 1:
        raise ConfigError(f"momentum is {momentum!r}; it must be at least 0 and less than 1")
    if not 0 < embedding_rate < math.inf:
        raise ConfigError(
            f"embedding_rate is {embedding_rate!r}; it must be greater than 0 and finite"
        )
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
        blocks = _blocks_of(model)
        return Muon(
            hidden.values(),
            [p for n, p in named if n not in hidden],
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=momentum,
            others_rate=embedding_rate,
            blocks=lambda parameter: blocks.get(id(parameter), (1, 1)),
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
