"""Train and evaluate a model on any iterable of batches `(x, y)`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt_core.loss import IGNORED
from gpt_core.runtime import Runtime

Batch = tuple[Tensor, Tensor]  # tokens x and targets y, both int64 (B, T)


class TrainingDiverged(ArithmeticError):
    """An error that stops training because the loss or its gradient is NaN or infinite."""


@dataclass(frozen=True)
class Progress:
    """A report from a training loop that is still running."""

    step: int
    steps: int
    loss: float  # mean since the last report, in nats per token
    tokens_per_second: float  # mean since the start
    seconds_left: float  # an estimate

    def __str__(self) -> str:
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.3f}  "
            f"{self.tokens_per_second:,.0f} tokens/s  {self.seconds_left:.0f} s left"
        )


@dataclass(frozen=True)
class TrainResult:
    """The result of `train_steps`."""

    loss: float  # mean over all steps, in nats per token
    steps: int
    tokens: int  # number of elements of x in all batches
    seconds: float  # wall-clock time of the whole loop


def _slices(batch: Batch, runtime: Runtime) -> list[Batch]:
    """Cut the batch into slices of whole rows, with nearly equal numbers of rows.

    A slice has at most `runtime.micro_batch_tokens` tokens. If one row has more tokens than this,
    each slice has one row.
    """
    x, y = batch
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} rows and y has {len(y)}; they must be equal")
    if runtime.micro_batch_tokens == 0 or x.numel() <= runtime.micro_batch_tokens:
        return [batch]
    rows = max(1, runtime.micro_batch_tokens // x[0].numel())
    parts = math.ceil(len(x) / rows)
    return list(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True))


def _backward(model: nn.Module, batch: Batch, runtime: Runtime) -> Tensor:
    """Add the gradient of the batch's mean loss to the `grad` of each parameter.

    Returns:
        The mean loss of the batch, as a scalar.
    """
    slices = _slices(batch, runtime)
    if len(slices) == 1:
        with runtime.autocast():
            loss: Tensor = model(*batch)[1]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()
    counts = [int((y != IGNORED).sum()) for _, y in slices]
    if sum(counts) == 0:
        return torch.tensor(math.nan)  # the mean of no values; a batch of one slice gives NaN too
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
    """Train the model for `steps` optimizer steps, with one batch per step.

    Args:
        model: the model, on the device of `runtime` (see `Runtime.prepare`). `model(x, y)` must
            return `(logits, loss)`, and the loss must be the mean over all targets that are not
            -1. The model is left in training mode.
        batches: pairs `(x, y)` of int64 (B, T). The loop takes exactly `steps` batches and moves
            each batch to the device. A batch passes through the model in slices of at most
            `runtime.micro_batch_tokens` tokens.
        optimizer: an optimizer for the model's parameters.
        steps: number of steps, at least 1.
        runtime: device, precision and slices.
        grad_clip: largest allowed norm of the gradient over all parameters. A longer gradient is
            scaled down to this norm. 0 means no limit.
        learning_rate: a function that takes the number of a step, counted from 1, and returns the
            learning rate for this step. None keeps the optimizer's own rate.
        on_progress: a function that receives a report after the first step, after the last step,
            and about every `progress_seconds` between these steps.
        progress_seconds: seconds between two reports.

    Raises:
        ValueError: if `batches` ends early, `steps` is below 1, `grad_clip` is below 0, all targets
            of a batch are -1, or x and y have different numbers of rows.
        TrainingDiverged: if a loss or a gradient is NaN or infinite. The step in which this happens
            does not change the weights.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if not grad_clip >= 0:
        raise ValueError(f"grad_clip is {grad_clip}; it must be at least 0 (0 means no limit)")
    model.train()
    start = last_report = monotonic()
    total_loss = recent_loss = 0.0  # sums over all steps, and since the last report
    tokens = recent_steps = 0
    iterator = iter(batches)
    for step in range(1, steps + 1):
        batch = next(iterator, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step - 1} of {steps} steps")
        x, y = (part.to(runtime.device) for part in batch)
        loss = _backward(model, (x, y), runtime)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        loss_value, norm_value = loss.item(), norm.item()
        if not math.isfinite(loss_value) or not math.isfinite(norm_value):
            optimizer.zero_grad(set_to_none=True)
            if not (y != IGNORED).any():
                raise ValueError(
                    f"at step {step} of {steps} all targets are {IGNORED}, so none counts"
                )
            raise TrainingDiverged(
                f"the loss is {loss_value} and the gradient's norm is {norm_value} at step {step} "
                f"of {steps}; a lower learning rate may help"
            )
        if grad_clip > 0:
            nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += x.numel()
        total_loss += loss_value
        recent_loss += loss_value
        recent_steps += 1
        now = monotonic()
        if on_progress and (step in (1, steps) or now - last_report >= progress_seconds):
            rate = tokens / (now - start)
            left = (now - start) / step * (steps - step)
            on_progress(Progress(step, steps, recent_loss / recent_steps, rate, left))
            last_report, recent_loss, recent_steps = now, 0.0, 0
    return TrainResult(total_loss / steps, steps, tokens, monotonic() - start)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, runtime: Runtime) -> float:
    """Compute the mean loss over all targets of all batches, without gradients.

    Each target that is not -1 counts once. The result therefore does not depend on the batch size,
    apart from rounding errors in the sums.

    Args:
        model: the model, as in `train_steps`. It is put into evaluation mode, and its earlier mode
            is restored afterwards.
        batches: pairs `(x, y)` of int64 (B, T). Each batch is moved to the device.
        runtime: device, precision and slices.

    Returns:
        The mean loss in nats per token.

    Raises:
        ValueError: if there are no batches, or if all targets are -1.
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
        raise ValueError(
            f"there is nothing to evaluate: no batch has a target other than {IGNORED}"
        )
    return total / count
