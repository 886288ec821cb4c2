"""Shapes that cannot be are rejected in a sentence."""

import json
from collections.abc import Callable

import pytest

from tinyllama_ds.config.validation import validate
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import MODEL_SIZES, Llama3Scaling, LlamaConfig, YarnScaling, model_config


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((100, 65, 128, 2, 4, 2, 64), "hidden_size 65 must be a multiple of num_attention_heads 4"),
        ((100, 64, 128, 2, 4, 3, 64), "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ((100, 60, 128, 2, 4, 2, 64), "head_dim 15 must be even"),
        ((10**400, 64, 128, 2, 4, 2, 64), r"vocab_size 10{79}\.\.\. is not above 0 and up to"),
    ],
)
def test_impossible_shapes_are_rejected(shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LlamaConfig(*shape)


@pytest.mark.parametrize("factor", [0.5, float("inf"), float("nan")])
def test_impossible_interpolation_is_rejected(factor: float) -> None:
    with pytest.raises(ConfigError, match="rope_scaling_factor .* (must be 1 or more|is not above 0)"):
        LlamaConfig(100, 64, 128, 2, 4, 2, 64, rope_scaling_factor=factor)


NEWER = {
    "head_dim": 32,
    "tie_word_embeddings": True,
    "rope_scaling_factor": 2.0,
    "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 16),
}


def test_a_description_gives_the_config_again() -> None:
    """Without options of later versions it is what runs wrote before there were any, so that they can be resumed."""
    newer = {"tinyllama-1.1b-8k": {"rope_scaling_factor"}, "tinyllama-1.1b-128k": {"rope_scaling"}}
    for name, config in MODEL_SIZES.items():
        assert validate(LlamaConfig, config.to_dict(), "model") == config
        assert NEWER.keys() & config.to_dict().keys() == newer.get(name, set())
    assert "head_dim" not in LlamaConfig(100, 64, 128, 2, 4, 2, 64, head_dim=16).to_dict()


@pytest.mark.parametrize("key", NEWER)
def test_later_options_are_part_of_the_identity(key: str) -> None:
    config = LlamaConfig(100, 64, 128, 2, 4, 2, 64, **{key: NEWER[key]})
    written = json.loads(json.dumps(config.to_dict()))
    assert written.keys() & NEWER.keys() == {key}
    assert validate(LlamaConfig, written, "model") == config
    assert config != LlamaConfig(100, 64, 128, 2, 4, 2, 64)


def test_the_identity_of_a_model_is_that_of_version_0_2() -> None:
    """As in the run.json of runs of that version."""
    assert json.dumps(MODEL_SIZES["tinyllama-1.1b-8k"].to_dict()) == (
        '{"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,'
        ' "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,'
        ' "rope_theta": 10000.0, "rope_scaling_factor": 4.0}'
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Llama3Scaling(8.0, 4.0, 4.0, 16), "low_freq_factor 4.0 must be below high_freq_factor 4.0"),
        (lambda: YarnScaling(0.5, 16), "factor 0.5 must be 1 or more"),
        (lambda: YarnScaling(2.0, 0), "original_max_position_embeddings 0 is not above 0"),
        (
            lambda: LlamaConfig(9, 8, 8, 1, 2, 1, 8, rope_scaling_factor=2.0, rope_scaling=YarnScaling(2.0, 4)),
            "rope_scaling_factor and rope_scaling: both scale positions",
        ),
    ],
)
def test_impossible_scaling_is_rejected(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'tinyllama-7b' is unknown; the known sizes are tinyllama-1.1b, "):
        model_config("tinyllama-7b")
