import copy
import math
import pickle

import pytest
import torch
from torch import nn

from gpt_core import GPT, ConfigError, Muon, build_optimizer, learning_rate_at
from gpt_core.optim import POLYNOMIALS, SMALLEST, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    in_its_basis = u.mT @ orthogonalise(matrices) @ vh.mT
    singular = in_its_basis.diagonal(dim1=1, dim2=2)
    assert (in_its_basis - singular.diag_embed()).abs().max() < 1e-9
    assert singular.min() > 0.75
    assert singular.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_over_three_decades_end_near_1(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    singular = torch.logspace(0, math.log10(0.0031), 64, dtype=torch.float64)
    matrix = left @ (singular / singular.norm()).diag() @ right
    for scale in (1e-3, 1.0, 1e3):
        found = torch.linalg.svdvals(orthogonalise(scale * matrix[None], dtype=dtype))
        assert found.min() > 0.2 if dtype == torch.bfloat16 else 0.75
        assert found.max() < 1.25


def test_a_matrix_of_rank_one_does_not_grow() -> None:
    """Rounding in bf16 must not push the only singular value to where the iteration diverges."""
    torch.manual_seed(2)
    for _ in range(50):
        matrix = torch.outer(torch.randn(64), torch.randn(96))
        largest = torch.linalg.svdvals(orthogonalise(matrix[None], dtype=torch.bfloat16)).max()
        assert 0.7 < largest < 1.3


def test_the_polynomials_are_the_best_of_their_degree() -> None:
    """Chebyshev: the polynomial closest to a constant is as far from it at four points, in turns.

    The first polynomials leave out the lowest part of their interval, and are scaled so that their
    image is centred on 1 (arXiv 2505.16932).
    """
    low, high = SMALLEST, 1.0
    for a, b, c in POLYNOMIALS:
        x = torch.linspace(max(low, 0.02 * high), high, 200_001, dtype=torch.float64)
        y = a * x + b * x**3 + c * x**5
        turns = (y[1:-1] - y[:-2]) * (y[2:] - y[1:-1]) < 0
        extremes = torch.cat((y[:1], y[1:-1][turns], y[-1:]))
        assert len(extremes) == 4
        centre = (extremes[0] + extremes[1]) / 2
        above = (extremes - centre) / (extremes[1] - centre)
        torch.testing.assert_close(above, torch.tensor([-1.0, 1, -1, 1]).double())
        ends = [a * end + b * end**3 + c * end**5 for end in (low, high)]
        assert sum(ends) == pytest.approx(2)
        low, high = ends
    assert low > 0.79


def test_matrices_are_updated_as_by_torchs_muon() -> None:
    """Both move a matrix by nearly the same orthogonal matrices, since its own is nearly one."""
    torch.manual_seed(1)
    start = torch.randn(6, 10)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95}
    mine = Muon([ours], [], dtype=torch.float32, **settings)
    reference = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(20):
        ours.grad = theirs.grad = torch.randn(6, 10)
        mine.step()
        reference.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), 0) > 0.98
    assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.15)


def test_an_update_is_computed_from_the_momentum_in_nesterovs_form() -> None:
    torch.manual_seed(2)
    weight = nn.Parameter(torch.randn(6, 10, dtype=torch.float64))
    optimizer = Muon([weight], [], lr=0.01, weight_decay=0.1, momentum=0.9, dtype=torch.float64)
    expected, momentum = weight.detach().clone(), torch.zeros(6, 10, dtype=torch.float64)
    for _ in range(5):
        weight.grad = torch.randn(6, 10, dtype=torch.float64)
        momentum = 0.9 * momentum + 0.1 * weight.grad
        (direction,) = orthogonalise((0.9 * momentum + 0.1 * weight.grad)[None])
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(10) * direction
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_other_parameters_are_updated_as_by_torchs_adamw(rate: float) -> None:
    torch.manual_seed(2)
    ours, theirs = (nn.Parameter(torch.ones(7)) for _ in range(2))
    mine = Muon([], [ours], lr=0.01, others_rate=rate)
    reference = torch.optim.AdamW([theirs], lr=0.01 * rate, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(7)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("blocks", [(3, 1), (1, 2), (3, 2)])
def test_blocks_are_updated_as_matrices_of_their_own(blocks: tuple[int, int]) -> None:
    torch.manual_seed(3)
    whole, gradient = nn.Parameter(torch.zeros(12, 4)), torch.randn(12, 4)

    def cut(matrix: torch.Tensor) -> list[torch.Tensor]:
        rows, columns = blocks
        return [part for row in matrix.chunk(rows) for part in row.chunk(columns, dim=1)]

    parts = [nn.Parameter(part.clone()) for part in cut(whole.detach())]
    whole.grad = gradient
    for part, of_gradient in zip(parts, cut(gradient), strict=True):
        part.grad = of_gradient
    Muon([whole], [], lr=1.0, blocks=lambda _: blocks).step()
    Muon(parts, [], lr=1.0).step()
    for part, of_whole in zip(parts, cut(whole.detach()), strict=True):
        torch.testing.assert_close(of_whole, part.detach())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(model: GPT, name: str) -> None:
    optimizer = build_optimizer(model, name, learning_rate=1e-3)
    stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())


def test_adamw_decays_only_matrices_and_embeddings(model: GPT) -> None:
    optimizer = build_optimizer(model, "adamw", learning_rate=1e-3, weight_decay=0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert all(value == (0.0 if ".ln_" in name else 0.3) for name, value in decay.items())
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}


def test_muon_takes_the_hidden_matrices_and_cuts_attention_into_heads(model: GPT) -> None:
    """The first step without weight decay moves each block by a nearly orthogonal matrix."""
    optimizer = build_optimizer(model, "muon", learning_rate=1.0, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(*torch.randint(11, (2, 4, 8))).loss.backward()
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    hidden = [name for name in moved if ".h." in name and moved[name].dim() == 2]
    assert len(hidden) == 4 * model.config.n_layer
    for name in hidden:
        heads = model.config.n_head
        parts: tuple[torch.Tensor, ...] = (moved[name],)
        if "c_attn" in name:
            parts = moved[name].chunk(3 * heads)
        elif "attn" in name:
            parts = moved[name].chunk(heads, dim=1)
        for part in parts:
            singular = torch.linalg.svdvals(part) / (0.2 * max(part.shape) ** 0.5)
            assert singular.median() > 0.6, name  # a few directions may have no gradient
            assert singular.max() < 1.35, name  # in bf16, where the hardware has it


def test_a_copied_or_unpickled_muon_updates_as_the_original() -> None:
    torch.manual_seed(4)
    weight = nn.Parameter(torch.randn(12, 4))
    original = Muon([weight], [], lr=0.1, blocks=lambda _: (3, 1), dtype=torch.float64)
    copies = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    gradient = torch.randn(12, 4)
    for optimizer in (original, *copies):
        (parameter,) = (p for group in optimizer.param_groups for p in group["params"])
        parameter.grad = gradient
        optimizer.step()
        assert torch.equal(parameter, weight)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_state_continues_bit_for_bit(model: GPT, name: str) -> None:
    batches = [torch.randint(11, (2, 4, 8)) for _ in range(6)]

    def steps(model: GPT, optimizer: torch.optim.Optimizer, chosen: slice) -> None:
        for x, y in batches[chosen]:
            model(x, y).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    optimizer = build_optimizer(model, name, learning_rate=0.01)
    steps(model, optimizer, slice(3))
    resumed = copy.deepcopy(model)
    again = build_optimizer(resumed, name, learning_rate=0.01)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, slice(3, 6))
    steps(resumed, again, slice(3, 6))
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_learning_rate_rises_linearly_and_stays_at_the_peak() -> None:
    rates = [learning_rate_at(step, peak=0.8, warmup_steps=4) for step in range(1, 7)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert learning_rate_at(1, peak=0.8) == 0.8


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_falls_from_the_peak_to_the_floor(schedule: str) -> None:
    settings = {"peak": 0.8, "warmup_steps": 10, "total_steps": 110, "floor": 0.1}
    rates = [learning_rate_at(step, schedule=schedule, **settings) for step in range(1, 121)]
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.8)
    of_torch = {
        "linear": torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.125, total_iters=100
        ),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1),
    }[schedule]
    expected = []
    for _ in range(101):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        of_torch.step()
    assert rates[9:110] == pytest.approx(expected)
    assert rates[:10] == pytest.approx([0.08 * step for step in range(1, 11)])
    assert rates[109:] == [pytest.approx(0.1)] * 11


def test_the_learning_rate_is_stable_before_it_decays() -> None:
    settings = {"peak": 1.0, "warmup_steps": 2, "total_steps": 10, "floor": 0.5}
    rates = [
        learning_rate_at(step, schedule="warmup-stable-decay", decay_steps=5, **settings)
        for step in range(1, 12)
    ]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5])
    by_default = [
        learning_rate_at(step, schedule="warmup-stable-decay", **settings) for step in range(1, 11)
    ]
    assert by_default == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"schedule": "step"}, "schedule is 'step'; allowed are constant, linear, cosine, warmup-"),
        ({"schedule": "cosine"}, "total_steps is None; the schedule 'cosine' needs it"),
        ({"schedule": "linear", "total_steps": 5, "warmup_steps": 6}, "room for 6 steps"),
        ({"schedule": "linear", "total_steps": 0}, "total_steps is 0"),
        (
            {"schedule": "warmup-stable-decay", "total_steps": 9, "decay_steps": 10},
            "room for 0 steps of warm-up and 10 steps of decay",
        ),
        ({"floor": 2.0}, "floor is 2.0; it must be at least 0 and at most peak, 1.0"),
        ({"floor": -0.1}, "floor is -0.1"),
        ({"peak": float("inf")}, "peak is inf; it must be above 0 and finite"),
        ({"step": 0}, "step is 0; steps count from 1"),
    ],
)
def test_a_schedule_that_cannot_work_is_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        learning_rate_at(**{"step": 1, "peak": 1.0, **settings})


def test_an_unknown_optimizer_is_named(model: GPT) -> None:
    with pytest.raises(ConfigError, match="optimizer is 'sgd'; allowed are adamw, muon"):
        build_optimizer(model, "sgd", learning_rate=1.0)


@pytest.mark.parametrize("learning_rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_learning_rate_that_cannot_work_is_named(model: GPT, learning_rate: float) -> None:
    with pytest.raises(ConfigError, match=f"learning_rate is {learning_rate}"):
        build_optimizer(model, learning_rate=learning_rate)


def test_a_negative_warm_up_is_named() -> None:
    with pytest.raises(ConfigError, match="warmup_steps is -5"):
        learning_rate_at(1, peak=1.0, warmup_steps=-5)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_a_momentum_that_cannot_work_is_named(model: GPT, momentum: float) -> None:
    with pytest.raises(ConfigError, match=f"momentum is {momentum}; it must be at least 0"):
        build_optimizer(model, "muon", learning_rate=1.0, momentum=momentum)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_bad_rate_of_the_embeddings_is_refused(model: GPT, rate: float) -> None:
    with pytest.raises(ConfigError, match=f"embedding_rate is {rate}; it must be greater than 0"):
        build_optimizer(model, "muon", learning_rate=1e-3, embedding_rate=rate)
