"""Shapes that cannot be are refused in a sentence."""

import pytest

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import MODEL_SIZES, LlamaConfig, model_config


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((100, 65, 128, 2, 4, 2, 64), "hidden_size 65 must be a multiple of num_attention_heads 4"),
        ((100, 64, 128, 2, 4, 3, 64), "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ((100, 60, 128, 2, 4, 2, 64), "head size 15 must be even"),
    ],
)
def test_impossible_shapes_are_refused(shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LlamaConfig(*shape)


@pytest.mark.parametrize("factor", [0.5, float("inf"), float("nan")])
def test_impossible_interpolation_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="rope_scaling_factor .* (must be 1 or more|is not above 0)"):
        LlamaConfig(100, 64, 128, 2, 4, 2, 64, rope_scaling_factor=factor)


def test_a_description_gives_the_config_again() -> None:
    """Without interpolation it is what runs wrote before there was any, so that they can be resumed."""
    for config in MODEL_SIZES.values():
        assert LlamaConfig(**config.to_dict()) == config
        assert ("rope_scaling_factor" in config.to_dict()) == (config.rope_scaling_factor != 1)


def test_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'tinyllama-7b' is unknown; the known sizes are tinyllama-1.1b, "):
        model_config("tinyllama-7b")
