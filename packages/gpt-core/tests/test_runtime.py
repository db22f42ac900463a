import pytest
import torch

from gpt_core import ConfigError, Runtime


def test_auto_is_resolved_and_explained() -> None:
    runtime = Runtime.resolve()
    assert runtime.precision in ("fp32", "bf16")
    assert runtime.device.type in ("cpu", "cuda", "mps")
    assert len(runtime.reasons) == 3
    assert "precision" in str(runtime)


def test_a_choice_is_kept_and_needs_no_reason() -> None:
    runtime = Runtime.resolve(device="cpu", precision="bf16", compile="off")
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
        ({"device": "cuda:99"}, "no such device here"),
        ({"precision": "fp8"}, "precision is 'fp8'; allowed are auto, fp32, bf16"),
        ({"compile": "yes"}, "compile is 'yes'; allowed are auto, on, off"),
    ],
)
def test_an_unknown_choice_is_named(choice: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Runtime.resolve(**choice)
