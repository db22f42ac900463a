"""The training loop and the evaluation pass, over any iterable of `(x, y)`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_core.runtime import Runtime

Batch = tuple[Tensor, Tensor]  # x and y, both int64 (B, T)


class TrainingDiverged(ArithmeticError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Progress:
    """One line of news from a loop that is under way."""

    step: int
    steps: int
    loss: float  # nats a token, mean since the last news
    tokens_per_second: float  # since the start
    seconds_left: float

    def __str__(self) -> str:
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.3f}  "
            f"{self.tokens_per_second:,.0f} tokens/s  {self.seconds_left:.0f} s left"
        )


@dataclass(frozen=True)
class TrainResult:
    """What `train_steps` did."""

    loss: float  # nats a token, mean over all steps
    steps: int
    tokens: int
    seconds: float


def train_steps(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    *,
    steps: int,
    runtime: Runtime,
    grad_clip: float = 1.0,
    learning_rate: Callable[[int], float] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    progress_seconds: float = 5.0,
) -> TrainResult:
    """Take `steps` optimizer steps, one a batch.

    Args:
        model: called as `model(x, y)`, returning `(logits, loss)`; on the device of `runtime`
            (`runtime.prepare(model)` puts it there); left in training mode.
        batches: at least `steps` pairs of int64 (B, T).
        grad_clip: largest norm of the gradient over all parameters; 0 for no limit.
        learning_rate: of a step, counted from 1; None leaves the optimizer's own.
        on_progress: told of the first step, the last, and one every `progress_seconds` between.

    Raises:
        ValueError: if `batches` ends early or `steps` is below 1.
        TrainingDiverged: at a loss that is NaN or infinite, before it reaches the weights.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    model.train()
    start = reported = monotonic()
    total = since = 0.0
    tokens = news = 0
    iterator = iter(batches)
    for step in range(1, steps + 1):
        batch = next(iterator, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step - 1} of {steps} steps")
        x, y = (part.to(runtime.device) for part in batch)
        with runtime.autocast():
            loss = model(x, y)[1]
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the loss is {value} at step {step} of {steps}; a lower learning rate may help"
            )
        loss.backward()
        if grad_clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += x.numel()
        total, since, news = total + value, since + value, news + 1
        now = monotonic()
        if on_progress and (step in (1, steps) or now - reported >= progress_seconds):
            rate = tokens / (now - start)
            left = (now - start) / step * (steps - step)
            on_progress(Progress(step, steps, since / news, rate, left))
            reported, since, news = now, 0.0, 0
    return TrainResult(total / steps, steps, tokens, monotonic() - start)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, runtime: Runtime) -> float:
    """Mean loss in nats a token over all targets of all batches; the model's mode is restored.

    Every target counts once, so the result does not depend on how the windows are batched.

    Raises:
        ValueError: if there is nothing to evaluate.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in batches:
            x, y = (part.to(runtime.device) for part in batch)
            with runtime.autocast():
                loss = model(x, y)[1]
            total += loss.item() * y.numel()
            count += y.numel()
    finally:
        model.train(training)
    if count == 0:
        raise ValueError("there is no batch to evaluate")
    return total / count
