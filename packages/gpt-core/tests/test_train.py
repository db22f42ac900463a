import itertools
import math

import pytest
import torch

from gpt_core import GPT, GPTConfig, Progress, Runtime, TrainingDiverged, build_optimizer, evaluate
from gpt_core.train import Batch, train_steps


def batches(count: int, rows: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(11, (count, rows, 9), generator=generator)
    return [(window[:, :-1], window[:, 1:]) for window in drawn]


def test_steps_equal_a_loop_written_by_hand(model: GPT, tiny: GPTConfig, cpu: Runtime) -> None:
    by_hand = GPT(tiny)
    by_hand.load_state_dict(model.state_dict())
    data = batches(7)
    optimizer = build_optimizer(by_hand, learning_rate=0.01)
    losses = []
    for x, y in data:
        loss = by_hand(x, y).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    reports: list[Progress] = []
    result = train_steps(
        model,
        data,
        build_optimizer(model, learning_rate=0.01),
        steps=7,
        runtime=cpu,
        grad_clip=0.5,
        on_progress=reports.append,
        progress_seconds=0.0,
    )
    assert [report.loss for report in reports] == pytest.approx(losses)
    assert reports[-1].tokens_per_second == pytest.approx(result.tokens / result.seconds, rel=0.1)
    assert result.loss == pytest.approx(sum(losses) / 7)
    assert (result.steps, result.tokens) == (7, 7 * 4 * 8)
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_small_text_is_learned_by_heart(model: GPT, cpu: Runtime) -> None:
    optimizer = build_optimizer(model, learning_rate=0.01)
    data = itertools.repeat(batches(1)[0])
    train_steps(model, data, optimizer, steps=200, runtime=cpu)
    assert evaluate(model, batches(1), runtime=cpu) < 0.5


def test_each_step_takes_its_learning_rate(model: GPT, cpu: Runtime) -> None:
    """Plain gradient descent moves a parameter by exactly the rate times its gradient."""
    weight = torch.nn.Parameter(torch.tensor(0.0))

    class Slope(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[None, torch.Tensor]:
            return None, -weight

    optimizer = torch.optim.SGD([weight], lr=100.0)
    rates = [0.0, 0.5, 0.25, 0.125]
    train_steps(
        Slope(),
        batches(3),
        optimizer,
        steps=3,
        runtime=cpu,
        grad_clip=0.0,
        learning_rate=rates.__getitem__,
    )
    assert weight.item() == 0.5 + 0.25 + 0.125


def test_progress_is_reported_after_the_first_and_the_last_step(model: GPT, cpu: Runtime) -> None:
    reports: list[Progress] = []
    optimizer = build_optimizer(model, learning_rate=0.01)
    train_steps(model, batches(5), optimizer, steps=5, runtime=cpu, on_progress=reports.append)
    assert [report.step for report in reports] == [1, 5]
    assert reports[-1].seconds_left == 0
    assert "step 5/5  loss" in str(reports[-1])


def test_a_loss_of_nan_stops_the_training(model: GPT, cpu: Runtime) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    optimizer = build_optimizer(model, learning_rate=0.01)
    others = [p.detach().clone() for p in model.parameters() if p is not model.lm_head.weight]
    with pytest.raises(TrainingDiverged, match="nan at step 1 of 3"):
        train_steps(model, batches(3), optimizer, steps=3, runtime=cpu)
    assert all(p.grad is None for p in model.parameters())
    after = [p for p in model.parameters() if p is not model.lm_head.weight]
    assert all(torch.equal(one, other) for one, other in zip(others, after, strict=True))


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_an_infinite_gradient_stops_the_training(
    model: GPT, cpu: Runtime, grad_clip: float
) -> None:
    model.transformer.wpe.weight.register_hook(lambda grad: grad * math.inf)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, learning_rate=0.01)
    with pytest.raises(TrainingDiverged, match=r"norm is (nan|inf) at step 1 of 3"):
        train_steps(model, batches(3), optimizer, steps=3, runtime=cpu, grad_clip=grad_clip)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("tokens", [0, 8])
def test_a_batch_without_use_is_an_error_that_says_why(model: GPT, tokens: int) -> None:
    runtime = Runtime.resolve(device="cpu", precision="fp32", micro_batch_tokens=tokens)
    optimizer = build_optimizer(model, learning_rate=0.01)
    x, y = batches(1)[0]
    nothing = [(x, torch.full_like(y, -1))]
    with pytest.raises(ValueError, match="at step 1 of 1 all targets are -1"):
        train_steps(model, nothing, optimizer, steps=1, runtime=runtime)
    for use in (
        lambda: train_steps(model, [(x, y[:3])], optimizer, steps=1, runtime=runtime),
        lambda: evaluate(model, [(x, y[:3])], runtime=runtime),
    ):
        with pytest.raises(ValueError, match="x has 4 rows and y has 3"):
            use()
    with pytest.raises(ValueError, match="grad_clip is -1"):
        train_steps(model, [(x, y)], optimizer, steps=1, runtime=runtime, grad_clip=-1)


def test_too_few_batches_are_an_error(model: GPT, cpu: Runtime) -> None:
    optimizer = build_optimizer(model, learning_rate=0.01)
    with pytest.raises(ValueError, match="ended after 2 of 3 steps"):
        train_steps(model, batches(2), optimizer, steps=3, runtime=cpu)
    with pytest.raises(ValueError, match="steps is 0"):
        train_steps(model, batches(2), optimizer, steps=0, runtime=cpu)


def test_evaluation_does_not_depend_on_the_batch_size(model: GPT, cpu: Runtime) -> None:
    rows = batches(1, rows=12)[0]
    by_size = [
        evaluate(model, zip(*(part.split(size) for part in rows), strict=True), runtime=cpu)
        for size in (1, 5, 12)
    ]
    assert by_size == pytest.approx([model(*rows).loss.item()] * 3, rel=1e-6)


def test_evaluation_counts_each_target_once(model: GPT) -> None:
    """Rows with few targets or none weigh less, in slices and batches of every size."""
    x, y = batches(1, rows=12)[0]
    y = y.clone()
    y[3, 2:], y[7], y[8, :5] = -1, -1, -1
    whole = model.eval()(x, y).loss.item()
    for size in (1, 5, 12):
        for tokens in (0, 8, 20, 40):
            runtime = Runtime.resolve(device="cpu", precision="fp32", micro_batch_tokens=tokens)
            parts = zip(x.split(size), y.split(size), strict=True)
            assert evaluate(model, parts, runtime=runtime) == pytest.approx(whole, rel=1e-6)


def test_slices_give_the_same_steps_as_whole_batches(tiny: GPTConfig) -> None:
    data = [(x, y.clone()) for x, y in batches(3, rows=7)]
    data[1][1][2:4] = -1
    stepped = []
    for tokens in (0, 8, 24):
        torch.manual_seed(0)
        model = GPT(tiny)
        runtime = Runtime.resolve(device="cpu", precision="fp32", micro_batch_tokens=tokens)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        result = train_steps(model, data, optimizer, steps=3, runtime=runtime)
        stepped.append((result, model))
    (whole, reference), *others = stepped
    for result, model in others:
        assert result.loss == pytest.approx(whole.loss, rel=1e-5)
        assert result.tokens == whole.tokens
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_more_batches_are_drawn_than_needed(model: GPT, cpu: Runtime) -> None:
    iterator = iter(batches(5))
    optimizer = build_optimizer(model, learning_rate=0.01)
    train_steps(model, iterator, optimizer, steps=3, runtime=cpu)
    assert len(list(iterator)) == 2


def test_evaluation_restores_the_mode_of_the_model(model: GPT, cpu: Runtime) -> None:
    for training in (True, False):
        model.train(training)
        evaluate(model, batches(1), runtime=cpu)
        assert model.training is training


def test_nothing_to_evaluate_is_an_error(model: GPT, cpu: Runtime) -> None:
    x, y = batches(1)[0]
    for nothing in ([], [(x, torch.full_like(y, -1))]):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate(model, nothing, runtime=cpu)
