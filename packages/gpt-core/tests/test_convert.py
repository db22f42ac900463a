"""Convert checkpoints in the formats of nanoGPT and `transformers`, built from random tensors.

The tests in `parity/` compare with `transformers` itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_gpt import plain_forward
from torch import Tensor

from gpt_core import (
    GPT,
    CheckpointError,
    GPTConfig,
    from_hf_gpt2,
    from_nanogpt_checkpoint,
    from_pretrained,
    save_pretrained,
    to_hf_gpt2,
    to_nanogpt_checkpoint,
)

ARGUMENTS = {"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 7, "vocab_size": 13}
HF = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 12,
    "n_positions": 7,
    "vocab_size": 13,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.3,
}


def weights(bias: bool, transposed: bool = False) -> dict[str, Tensor]:
    """Draw random tensors with the names of GPT-2."""
    torch.manual_seed(0)
    C = 12
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (13, C), "wpe.weight": (7, C)}
    for layer in range(2):
        for name, shape in {
            "ln_1": (C,),
            "attn.c_attn": (3 * C, C),
            "attn.c_proj": (C, C),
            "ln_2": (C,),
            "mlp.c_fc": (4 * C, C),
            "mlp.c_proj": (C, 4 * C),
        }.items():
            shapes[f"h.{layer}.{name}.weight"] = shape[::-1] if transposed else shape
            if bias:
                shapes[f"h.{layer}.{name}.bias"] = shape[:1]
    shapes["ln_f.weight"] = (C,)
    if bias:
        shapes["ln_f.bias"] = (C,)
    found = {f"transformer.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return {**found, "lm_head.weight": found["transformer.wte.weight"]}


def nanogpt_file(path: Path, bias: bool, prefix: str = "", **changes: Any) -> Path:
    model = {prefix + name: tensor for name, tensor in weights(bias).items()}
    content = {
        "model": model,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": []},
        "model_args": {**ARGUMENTS, "bias": bias, "dropout": 0.2},
        "iter_num": 5000,
        "best_val_loss": torch.tensor(1.47),
        "config": {"out_dir": "out", "learning_rate": 1e-3},
        **changes,
    }
    torch.save(content, path)
    return path


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_a_nanogpt_checkpoint_gives_the_logits_of_the_plain_formula(
    tmp_path: Path, bias: bool, prefix: str
) -> None:
    model = from_nanogpt_checkpoint(nanogpt_file(tmp_path / "ckpt.pt", bias, prefix))
    assert not model.training
    assert (model.config.dropout, model.config.attention_dropout) == (0.2, 0.2)
    idx = torch.randint(13, (3, 7))
    expected = plain_forward(weights(bias), model.config, idx)
    torch.testing.assert_close(model(idx).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_nanogpt_checkpoint_is_loaded_and_saved_bit_for_bit(tmp_path: Path, bias: bool) -> None:
    model = from_nanogpt_checkpoint(nanogpt_file(tmp_path / "ckpt.pt", bias))
    to_nanogpt_checkpoint(model, tmp_path / "new" / "ckpt.pt")
    found = torch.load(tmp_path / "new" / "ckpt.pt", weights_only=True)
    expected = weights(bias)
    assert found["model"].keys() == expected.keys()
    assert all(torch.equal(found["model"][name], expected[name]) for name in expected)
    assert found["model_args"] == {**ARGUMENTS, "bias": bias, "dropout": 0.2}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["ckpt.pt"]


def test_masks_in_older_nanogpt_checkpoints_are_ignored(tmp_path: Path) -> None:
    model = weights(True) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 7, 7)}
    from_nanogpt_checkpoint(nanogpt_file(tmp_path / "ckpt.pt", True, model=model))


def test_each_mismatch_in_a_nanogpt_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    model = weights(True)
    del model["transformer.ln_f.weight"]
    model["transformer.wpe.weight"] = torch.zeros(5, 12)
    model["extra"] = torch.zeros(1)
    nanogpt_file(path, True, model=model)
    with pytest.raises(CheckpointError) as caught:
        from_nanogpt_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "transformer.ln_f.weight is missing" in str(caught.value)
    assert "transformer.wpe.weight has shape (5, 12) instead of (7, 12)" in str(caught.value)
    assert "extra is not part of the model" in str(caught.value)
    untied = {**weights(True), "lm_head.weight": torch.zeros(13, 12)}
    nanogpt_file(path, True, model=untied)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from transformer.wte.weig"):
        from_nanogpt_checkpoint(path)
    nanogpt_file(path, True, model_args={"n_layer": 2, "n_head": 3, "n_embd": 12})
    with pytest.raises(CheckpointError, match="model_args has no vocab_size, block_size"):
        from_nanogpt_checkpoint(path)
    nanogpt_file(path, True, model_args={**ARGUMENTS, "n_head": 5})
    with pytest.raises(CheckpointError, match="model_args: n_embd is 12; it must be divisible"):
        from_nanogpt_checkpoint(path)


def test_a_file_that_is_not_a_nanogpt_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    with pytest.raises(CheckpointError, match=r"ckpt.pt cannot be read: .*No such file"):
        from_nanogpt_checkpoint(path)
    for content in (b"", b"text", b"PK\x03\x04broken"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"ckpt.pt cannot be read"):
            from_nanogpt_checkpoint(path)
    torch.save({"model": "weights"}, path)
    with pytest.raises(CheckpointError, match="not a nanoGPT checkpoint: it has no 'model'"):
        from_nanogpt_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not a nanoGPT checkpoint"):
        from_nanogpt_checkpoint(path)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this code ran",)


def test_code_in_a_nanogpt_checkpoint_does_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = nanogpt_file(tmp_path / "ckpt.pt", True, config=Harmful())
    with pytest.raises(CheckpointError, match=r"ckpt.pt cannot be read"):
        from_nanogpt_checkpoint(path)
    assert "this code ran" not in capsys.readouterr().out


def test_a_model_with_tanh_gelu_cannot_be_saved_for_nanogpt(tmp_path: Path) -> None:
    model = GPT(GPTConfig(11, 8, 1, 1, 4, gelu_approximate="tanh"))
    with pytest.raises(CheckpointError, match="gelu_approximate is 'tanh'"):
        to_nanogpt_checkpoint(model, tmp_path / "ckpt.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize(("activation", "gelu"), [("gelu_new", "tanh"), ("gelu", "none")])
def test_a_hugging_face_state_dict_gives_the_logits_of_the_plain_formula(
    prefix: str, activation: str, gelu: str
) -> None:
    found = {
        name.replace("transformer.", prefix): tensor
        for name, tensor in weights(True, transposed=True).items()
        if prefix or name != "lm_head.weight"  # files on the hub have neither prefix nor head
    }
    found[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 7, 7).bool()
    model = from_hf_gpt2(found, HF | {"activation_function": activation})
    assert model.config.gelu_approximate == gelu
    assert (model.config.dropout, model.config.attention_dropout) == (0.1, 0.3)
    plain = {
        name: tensor.t() if name.endswith(("attn.weight", "fc.weight", "proj.weight")) else tensor
        for name, tensor in weights(True, transposed=True).items()
    }
    idx = torch.randint(13, (3, 7))
    expected = plain_forward(plain, model.config, idx)
    torch.testing.assert_close(model(idx).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_converted_to_hugging_face_and_back_is_the_same(bias: bool) -> None:
    torch.manual_seed(3)
    model = GPT(GPTConfig(13, 7, 2, 3, 12, bias=bias, gelu_approximate="tanh")).eval()
    state_dict, config = to_hf_gpt2(model)
    back = from_hf_gpt2(state_dict, config)
    assert back.config.bias
    idx = torch.randint(13, (3, 7))
    assert torch.equal(back(idx).logits, model(idx).logits)
    state_dict["transformer.wte.weight"].zero_()  # a copy
    assert torch.equal(back(idx).logits, model(idx).logits)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'; allowed are gelu,"),
        ({"n_inner": 40}, "n_inner is 40; GPT supports only 4 n_embd, which is 48"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; GPT supports only 1e-05"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; GPT supports only True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        (
            {"embd_pdrop": 0.0},
            "resid_pdrop and embd_pdrop differ; give the rate to use as `dropout`",
        ),
        ({"n_head": 5}, "n_embd is 12; it must be divisible by n_head, which is 5"),
        ({"n_layer": 3}, r"transformer\.h\.2\.attn\.c_attn\.weight is missing"),
        ({"n_positions": 9}, r"transformer\.wpe\.weight has shape \(7, 12\) instead of \(9, 12\)"),
    ],
)
def test_each_mismatch_in_a_hugging_face_model_is_named(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        from_hf_gpt2(weights(True, transposed=True), HF | changes)


def test_a_state_dict_without_its_configuration_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="config is None; a state dict needs its GPT2Config"):
        from_hf_gpt2(weights(True, transposed=True))
    with pytest.raises(CheckpointError, match="n_head is missing"):
        from_hf_gpt2(weights(True, transposed=True), {k: v for k, v in HF.items() if k != "n_head"})


def test_the_dropout_can_be_chosen_if_two_rates_differ() -> None:
    given = weights(True, transposed=True)
    assert from_hf_gpt2(given, HF | {"embd_pdrop": 0.0}, dropout=0.25).config.dropout == 0.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weights_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    given = {name: t.to(dtype) for name, t in weights(True, transposed=True).items()}
    model = from_hf_gpt2(given, HF)
    save_pretrained(model, tmp_path)
    for loaded in (model, from_pretrained(tmp_path)):
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert torch.equal(loaded.lm_head.weight, given["lm_head.weight"])
