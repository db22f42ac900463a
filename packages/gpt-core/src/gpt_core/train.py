"""The training loop and the evaluation pass, over any iterable of `(x, y)`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_core.loss import IGNORED
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


def _slices(batch: Batch, runtime: Runtime) -> list[Batch]:
    """The batch in slices of whole rows, as equal as can be, of at most `micro_batch_tokens`."""
    x, y = batch
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y {len(y)}")
    if runtime.micro_batch_tokens == 0 or x.numel() <= runtime.micro_batch_tokens:
        return [batch]
    rows = max(1, runtime.micro_batch_tokens // x[0].numel())
    parts = math.ceil(len(x) / rows)
    return list(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True))


def _backward(model: nn.Module, batch: Batch, runtime: Runtime) -> Tensor:
    """Add the gradient of the batch's mean loss; return that loss, a scalar."""
    slices = _slices(batch, runtime)
    if len(slices) == 1:
        with runtime.autocast():
            loss: Tensor = model(*batch)[1]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    counts = [int((y != IGNORED).sum()) for _, y in slices]
    if sum(counts) == 0:
        return torch.tensor(math.nan)  # as the mean of no targets is
    total = torch.zeros((), device=runtime.device)
    for (x, y), count in zip(slices, counts, strict=True):
        if count == 0:
            continue
        with runtime.autocast():
            loss = model(x, y)[1] * (count / sum(counts))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


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
        model: called as `model(x, y)`, returning `(logits, loss)`, the loss a mean over the targets
            that are not -1; on the device of `runtime` (`runtime.prepare(model)` puts it there);
            left in training mode.
        batches: at least `steps` pairs of int64 (B, T), of which `steps` are taken. Each passes
            through the model in slices of `runtime.micro_batch_tokens`.
        grad_clip: largest norm of the gradient over all parameters; 0 for no limit.
        learning_rate: of a step, counted from 1; None leaves the optimizer's own.
        on_progress: told of the first step, the last, and one every `progress_seconds` between.

    Raises:
        ValueError: if `batches` ends early, `steps` is below 1, `grad_clip` below 0, a batch has
            rows of x without y, or none of its targets counts.
        TrainingDiverged: at a loss or a gradient that is NaN or infinite, before it reaches the
            weights.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if not grad_clip >= 0:
        raise ValueError(f"grad_clip is {grad_clip}; it must be at least 0, which is no limit")
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
        loss = _backward(model, (x, y), runtime)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        value, size = loss.item(), norm.item()
        if not math.isfinite(value) or not math.isfinite(size):
            optimizer.zero_grad(set_to_none=True)
            if not (y != IGNORED).any():
                raise ValueError(f"no target counts at step {step} of {steps}: all are {IGNORED}")
            raise TrainingDiverged(
                f"the loss is {value} and its gradient's norm {size} at step {step} of "
                f"{steps}; a lower learning rate may help"
            )
        if grad_clip > 0:
            nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
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

    Every target that is not -1 counts once, so the result does not depend on how the windows are
    batched, beyond the rounding of floating-point sums.

    Raises:
        ValueError: if there is nothing to evaluate.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in batches:
            whole = batch[0].to(runtime.device), batch[1].to(runtime.device)
            for x, y in _slices(whole, runtime):
                targets = int((y != IGNORED).sum())
                if targets == 0:
                    continue
                with runtime.autocast():
                    loss = model(x, y)[1]
                total += loss.item() * targets
                count += targets
    finally:
        model.train(training)
    if count == 0:
        raise ValueError("there is no target to evaluate")
    return total / count
