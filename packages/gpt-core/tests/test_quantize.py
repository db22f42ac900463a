import pytest
import torch
from torch import nn

from gpt_core import (
    GPT,
    CheckpointError,
    GPTConfig,
    generate,
    int8_weights,
    save_pretrained,
    to_hf_gpt2,
    to_nanogpt_checkpoint,
)
from gpt_core.quantize import KERNEL_ROWS, Int8Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, KERNEL_ROWS, KERNEL_ROWS + 1, 200])
def test_the_error_of_a_product_is_rounding_error(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 32, bias=bias)
    x = torch.randn(rows, 3, 96) if rows > KERNEL_ROWS else torch.randn(rows, 96)
    exact, rounded = linear(x), Int8Linear(linear)(x).float()
    assert rounded.shape == exact.shape
    # The error of a weight is uniform within half a step. A step is 1/127 of the largest weight.
    # The relative error of inputs and outputs in bf16 is at most 2^-9. The errors of the 96 terms
    # are independent, so their squares add up.
    step = linear.weight.detach().abs().amax(1) / 127
    deviation = (step / 12**0.5) * x.square().sum(-1, keepdim=True).sqrt()
    assert ((rounded - exact).abs() <= 6 * deviation + 0.01 * exact.abs() + 0.005).all()


def test_weights_are_rounded_to_the_nearest_of_255_levels() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(40, 7)
    nn.init.zeros_(linear.weight[3])
    quantized = Int8Linear(linear)
    scale = quantized.scale.float()[:, None]
    off = (quantized.weight * scale - linear.weight).abs()
    assert (off <= 0.51 * scale + linear.weight.abs() / 256).all()
    assert quantized.weight.abs().amax(1).tolist() == [127 if i != 3 else 0 for i in range(7)]


def test_a_quantized_model_predicts_nearly_the_same() -> None:
    torch.manual_seed(2)
    model = GPT(GPTConfig(31, 32, 3, 4, 64, bias=True)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    idx, targets = torch.randint(31, (2, 64, 32))
    with torch.no_grad():
        loss = model(idx, targets).loss.item()
        assert int8_weights(model)(idx, targets).loss.item() == pytest.approx(loss, rel=0.01)


def test_the_original_model_does_not_change(model: GPT) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = int8_weights(model)
    assert not any(p.requires_grad for p in quantized.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert sum(isinstance(m, Int8Linear) for m in quantized.modules()) == 4 * model.config.n_layer
    assert quantized.lm_head.weight is quantized.transformer.wte.weight


def test_many_rows_give_the_text_of_the_dequantized_model(model: GPT) -> None:
    """With more than KERNEL_ROWS rows, both models compute in fp32 with equal weights."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    quantized = int8_weights(model)
    restored = GPT(model.config).eval()
    restored.load_state_dict(model.state_dict())
    for name, module in quantized.named_modules():
        if isinstance(module, Int8Linear):
            weight = module.weight.float() * module.scale.float()[:, None]
            restored.get_submodule(name).weight.data.copy_(weight)
    prompt = torch.randint(11, (KERNEL_ROWS + 1, 3))
    written = generate(quantized, prompt, 20, temperature=0.0)
    assert torch.equal(written, generate(restored, prompt, 20, temperature=0.0))


@pytest.mark.parametrize("width", [1, 7, 8, 30, 33, 36, 40, 50, 64, 100])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_every_width_can_be_multiplied(width: int, rows: int) -> None:
    torch.manual_seed(3)
    linear, x = nn.Linear(width, 5), torch.randn(rows, width)
    layer = Int8Linear(linear)
    expected = nn.functional.linear(x, layer.weight * layer.scale.float()[:, None], linear.bias)
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_can_write_with_int8_weights(dtype: torch.dtype) -> None:
    model = GPT(GPTConfig(11, 8, 2, 2, 32, bias=True)).to(dtype)
    assert generate(int8_weights(model), torch.tensor([[1], [2]]), 12, seed=0).shape == (2, 13)


@pytest.mark.parametrize("export", [to_hf_gpt2, lambda m: to_nanogpt_checkpoint(m, "never.pt")])
def test_a_quantized_model_cannot_be_exported(model: GPT, export) -> None:
    with pytest.raises(CheckpointError, match=r"c_attn\.scale is not part of the model"):
        export(int8_weights(model))


def test_a_quantized_model_cannot_be_saved(model: GPT, tmp_path) -> None:
    save_pretrained(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"h\.0\.attn\.c_attn\.scale is not part of the model"
    ):
        save_pretrained(int8_weights(model), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
