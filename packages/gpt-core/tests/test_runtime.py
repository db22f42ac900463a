import os
from pathlib import Path

import pytest
import torch

from gpt_core import GPT, ConfigError, Runtime, runtime


def test_auto_is_resolved_and_explained() -> None:
    runtime = Runtime.resolve()
    assert runtime.precision in ("fp32", "bf16")
    assert runtime.device.type in ("cpu", "cuda", "mps")
    assert {reason.split()[0] for reason in runtime.reasons} >= {"device", "precision", "compile"}
    assert "precision" in str(runtime)
    assert runtime.micro_batch_tokens == (2048 if runtime.device.type == "cpu" else 0)


def test_an_explicit_choice_is_kept_without_a_reason() -> None:
    runtime = Runtime.resolve(
        device="cpu", precision="bf16", compile="off", micro_batch_tokens=0, threads=1
    )
    assert (runtime.device, runtime.precision, runtime.compile) == (
        torch.device("cpu"),
        "bf16",
        False,
    )
    assert runtime.reasons == ()
    with runtime.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ({"device": "gpu"}, "device is 'gpu'; allowed are auto, cpu, cuda, mps"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"device": "cuda:99"}, "no such device"),
        ({"precision": "fp8"}, "precision is 'fp8'; allowed are auto, fp32, bf16"),
        ({"compile": "yes"}, "compile is 'yes'; allowed are auto, on, off"),
        ({"micro_batch_tokens": -1}, "micro_batch_tokens is -1"),
        ({"micro_batch_tokens": 2.5}, "micro_batch_tokens is 2.5; it must be a whole number"),
        ({"threads": 0}, "threads is 0; it must be a whole number of at least 1"),
    ],
)
def test_an_unknown_choice_is_named(choice: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Runtime.resolve(**choice)


@pytest.mark.parametrize(
    ("quota", "affinity", "threads"),
    [
        ("max 100000", 64, 8),  # PyTorch's own number
        ("max 100000", 3, 3),
        ("400000 100000", 64, 4),
        ("150000 100000", 64, 1),
        ("50000 100000", 64, 1),  # half a CPU is one thread
    ],
)
def test_the_thread_count_respects_affinity_and_quota(
    quota: str, affinity: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(runtime, "_CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    resolved = Runtime.resolve(device="cpu")
    assert resolved.threads == threads
    assert any("threads" in reason for reason in resolved.reasons) is (threads < 8)


def test_preparing_a_model_sets_the_thread_count(model: GPT) -> None:
    before = torch.get_num_threads()
    try:
        Runtime.resolve(device="cpu", threads=before + 1).prepare(model)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
