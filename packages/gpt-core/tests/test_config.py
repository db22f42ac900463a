import pytest

from gpt_core import GPT, ConfigError, GPTConfig


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd is 10; it must be divisible by n_head, which is 3"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"block_size": -1}, "block_size is -1"),
        ({"vocab_size": 2.5}, "vocab_size is 2.5"),
        ({"n_head": True}, "n_head is True"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1"),
        ({"bias": "no"}, "bias is 'no'"),
        ({"gelu_approximate": "erf"}, "gelu_approximate is 'erf'; it must be 'none' or 'tanh'"),
    ],
)
def test_a_shape_that_cannot_work_is_named(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        GPTConfig(**settings)


def test_settings_survive_a_dictionary(tiny: GPTConfig) -> None:
    assert GPTConfig.from_dict(tiny.to_dict()) == tiny


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigError, match="n_layers"):
        GPTConfig.from_dict({"n_layers": 2})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_layer", "n_head", "n_embd"), [(1, 1, 3), (3, 2, 8)])
def test_the_number_of_parameters_is_that_of_a_model(
    bias: bool, n_layer: int, n_head: int, n_embd: int
) -> None:
    config = GPTConfig(
        vocab_size=11, block_size=7, n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=bias
    )
    model = GPT(config)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
