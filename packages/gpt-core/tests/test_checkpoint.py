import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_core import GPT, CheckpointError, from_pretrained, save_pretrained, to_hf_gpt2


def test_a_saved_model_comes_back_bit_for_bit(model: GPT, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "new" / "model")
    loaded = from_pretrained(tmp_path / "new" / "model")
    assert loaded.config == model.config
    assert not loaded.training
    for (name, one), other in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_tied_weights_are_stored_once_and_nothing_else_is_left(model: GPT, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert sum(t.numel() for t in stored.values()) == model.num_parameters(positions=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_and_settings_can_be_read_by_the_same_users(model: GPT, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    config, weights = (tmp_path / name for name in ("config.json", "model.safetensors"))
    assert weights.stat().st_mode == config.stat().st_mode


def test_a_compiled_model_is_saved_as_the_model_inside_it(model: GPT, tmp_path: Path) -> None:
    compiled = torch.compile(model, backend="eager")
    save_pretrained(compiled, tmp_path)  # type: ignore[arg-type]
    loaded = from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_file_at_the_path_of_the_directory_is_named(model: GPT, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(CheckpointError, match=r"model cannot be written: "):
        save_pretrained(model, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_a_failed_save_leaves_the_old_model(model: GPT, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    broken = GPT(model.config)
    broken.register_buffer("strange", torch.zeros(3).to_sparse())
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        save_pretrained(broken, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_each_tensor_that_does_not_fit_is_named(model: GPT, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.wpe.weight"] = torch.zeros(4, 16)
    del tensors["transformer.ln_f.weight"]
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path)
    message = str(caught.value)
    assert "transformer.wpe.weight has shape (4, 16) instead of (8, 16)" in message
    assert "transformer.ln_f.weight is missing" in message
    assert "extra is not part of the model" in message


def test_a_model_with_a_separate_head_cannot_be_saved_or_exported(
    model: GPT, tmp_path: Path
) -> None:
    model.lm_head.weight = torch.nn.Parameter(torch.randn(11, 16))
    for write in (lambda: save_pretrained(model, tmp_path), lambda: to_hf_gpt2(model)):
        with pytest.raises(CheckpointError, match=r"lm_head.weight differs from transformer.wte"):
            write()
    assert not list(tmp_path.iterdir())


def test_tensors_of_different_dtypes_are_named(model: GPT, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for dtype, named in (
        (
            torch.float64,
            "transformer.ln_f.weight is torch.float64, but transformer.wte.weight is",
        ),
        (torch.int32, "transformer.ln_f.weight is torch.int32; allowed are torch.float32"),
    ):
        changed = tensors | {"transformer.ln_f.weight": torch.ones(16, dtype=dtype)}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=named):
            from_pretrained(tmp_path)


def test_broken_files_are_named(model: GPT, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        from_pretrained(tmp_path / "nowhere")
    save_pretrained(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"n_head": 3}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="n_embd is 16; it must be divisible"):
        from_pretrained(tmp_path)
    for broken in ("{", "[]"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"config.json is not a model configuration"):
            from_pretrained(tmp_path)
