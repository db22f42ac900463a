from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context

from gpt_core import Runtime, build_optimizer, learning_rate_at, train_steps
from nanogpt_flower.artifacts import RunDirectory
from nanogpt_flower.client_app import build_model, measure_part, train
from nanogpt_flower.client_text import client_part
from nanogpt_flower.composition import client_seed
from nanogpt_flower.local.launch import Launch, prepare_resume
from nanogpt_flower.schedule import learning_rate, schedule_notes, smallest_learning_rate_sum
from nanogpt_flower.settings import Settings, SettingsError
from shakespeare_data import Batches

MakeContext = Callable[..., Context]
LINEAR = {"learning_rate": 0.1, "schedule": "linear", "num_server_rounds": 5}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "warmup-stable-decay"])
def test_the_schedule_runs_through_all_rounds_and_ends_at_the_floor(schedule: str) -> None:
    settings = Settings(
        learning_rate=0.1,
        min_learning_rate=0.01,
        schedule=schedule,
        warmup_steps=0,
        num_server_rounds=5,
    )
    rates = [
        learning_rate(settings, 10, server_round, step, 10 * (server_round - 1) + step)
        for server_round in range(1, 6)
        for step in range(1, 11)
    ]
    expected = [
        learning_rate_at(step, peak=0.1, schedule=schedule, total_steps=50, floor=0.01)
        for step in range(1, 51)
    ]
    assert rates == expected
    assert rates[-1] == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)


def test_a_client_that_joins_late_warms_up_to_the_rate_of_the_others() -> None:
    settings = Settings(**LINEAR, warmup_steps=4)
    late = [learning_rate(settings, 10, 4, step, step) for step in range(1, 11)]
    others = [learning_rate(settings, 10, 4, step, 30 + step) for step in range(1, 11)]
    assert late[:4] == pytest.approx([others[k - 1] * k / 4 for k in range(1, 5)])
    assert late[4:] == others[4:]


def test_the_policy_judges_the_round_with_the_smallest_rates() -> None:
    decays = Settings(**LINEAR, warmup_steps=0)
    last_round = sum(0.1 * (10 - step) / 50 for step in range(1, 11))
    assert smallest_learning_rate_sum(decays, 10, 1) == pytest.approx(last_round)
    warms_up = Settings(learning_rate=0.1, warmup_steps=20)
    first_round = sum(0.1 * step / 20 for step in range(1, 11))
    assert smallest_learning_rate_sum(warms_up, 10, 3) == pytest.approx(first_round)
    longer = Settings(**LINEAR, schedule_rounds=2, min_learning_rate=1e-4, warmup_steps=0)
    assert smallest_learning_rate_sum(longer, 10, 4) == pytest.approx(10 * 1e-4)


def test_all_settings_of_the_recipe_reach_the_training(
    context: MakeContext, to_clients: ConfigRecord
) -> None:
    """Two rounds of a client equal a loop that is written here."""
    recipe: dict[str, Any] = {
        "schedule": "linear",
        "min_learning_rate": 0.002,
        "learning_rate": 0.02,
        "warmup_steps": 3,
        "optimizer": "muon",
        "weight_decay": 0.5,
        "muon_momentum": 0.8,
        "embedding_rate": 0.3,
        "grad_clip": 0.3,
        "windows": "disjoint",
        "max_steps": 6,
    }
    here = context(**recipe, dropout=0.0)
    settings = Settings.from_run_config(here.run_config)
    part = client_part(settings, to_clients, here)
    torch.manual_seed(0)
    ours = build_model(to_clients, here)
    torch.manual_seed(0)
    plain = build_model(to_clients, here)
    optimizer = build_optimizer(
        plain, "muon", learning_rate=1.0, weight_decay=0.5, momentum=0.8, embedding_rate=0.3
    )
    for server_round in (1, 2):
        train(ours, ConfigRecord({**to_clients, "server-round": server_round}), here)
        seed = client_seed(settings, "partition 0000 of 2", server_round)
        batches = Batches(part.train, 8, 16, seed=seed, windows="disjoint")
        first = 6 * (server_round - 1)
        train_steps(
            plain,
            batches,
            optimizer,
            steps=6,
            runtime=Runtime.resolve(device="cpu"),
            grad_clip=0.3,
            learning_rate=lambda step, first=first: (
                min(1.0, (first + step) / 3) * (0.02 - 0.018 * (first + step) / 12)
            ),
        )
    for mine, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_a_schedule_that_would_end_at_0_before_the_run_is_refused() -> None:
    config = {"schedule": "linear", "schedule-rounds": 5, "num-server-rounds": 8}
    with pytest.raises(SettingsError, match="schedule-rounds=8 would stretch the schedule"):
        Settings.from_run_config(config)
    for change in ({"min-learning-rate": 1e-4}, {"schedule-rounds": 8}, {"schedule": "constant"}):
        Settings.from_run_config(config | change)


def test_the_floor_is_below_the_peak() -> None:
    with pytest.raises(SettingsError, match=r"min-learning-rate is 0\.2; it must be at most"):
        Settings.from_run_config({"min-learning-rate": 0.2})


@pytest.fixture
def interrupted(text_file: Path, tmp_path: Path) -> RunDirectory:
    """A run of 5 rounds with a linear schedule that has a checkpoint."""
    directory = RunDirectory(tmp_path / "runs" / "cut-off")
    (directory.path / "checkpoints" / "round-00003").mkdir(parents=True)
    run_config = {
        "corpus": str(text_file),
        "block-size": 16,
        "num-server-rounds": 5,
        "schedule": "linear",
        "min-learning-rate": 1e-4,
        "output-dir": str(tmp_path / "runs"),
    }
    directory.write_json(
        "config.json",
        {"settings": Settings.from_run_config(run_config).to_run_config(), "corpus": None},
    )
    Launch("quick", run_config, 2, "simulation").write(directory)
    return directory


def test_a_resumed_run_keeps_its_schedule_and_says_so(
    interrupted: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "resume", lambda settings, corpus: interrupted)
    runs = interrupted.path.parent
    for arguments, rounds, ending in (
        ([], 5, "over rounds 1 to 5"),
        (["num-server-rounds=8"], 5, "over rounds 1 to 5; after round 5 it stays at 0.0001"),
        (["num-server-rounds=8", "schedule-rounds=8"], 8, "over rounds 1 to 8"),
    ):
        settings = prepare_resume("cut-off", runs, arguments).settings
        assert settings.schedule_rounds == rounds
        (note,) = schedule_notes(settings)
        assert note.startswith("the learning rate goes on with its schedule: linear from 0.001")
        assert note.endswith(ending)


def test_flwr_run_must_say_what_becomes_of_the_schedule(interrupted: RunDirectory) -> None:
    old = interrupted.read_json("config.json")["settings"]
    config = old | {"resume-from": str(interrupted.path), "num-server-rounds": 8}
    with pytest.raises(SettingsError, match="schedule-rounds=5 keeps the schedule, and schedule-"):
        RunDirectory.resume(Settings.from_run_config(config), None)
    for rounds in (5, 8):
        RunDirectory.resume(Settings.from_run_config(config | {"schedule-rounds": rounds}), None)
    same = old | {"resume-from": str(interrupted.path)}
    RunDirectory.resume(Settings.from_run_config(same), None)


def test_a_message_is_measured_in_its_own_round(
    context: MakeContext, to_clients: ConfigRecord
) -> None:
    here = context(schedule="linear", schedule_rounds=1, min_learning_rate=1e-6)
    settings = Settings.from_run_config(here.run_config)
    part = client_part(settings, to_clients, here)
    sums = [measure_part(settings, part, part.tokenizer, at)["learning-rate-sum"] for at in (1, 2)]
    assert sums[1] == pytest.approx(20 * 1e-6)
    assert sums[0] > 100 * sums[1]
