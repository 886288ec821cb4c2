"""A ladder's file: the sizes of its rule, and one sentence for whatever is wrong in it."""

from pathlib import Path

import pytest
from ladders import write_ladder

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.ladder.definition import LADDER_DIRECTORY, load_ladder, scaled
from tinyllama_ds.model.config import MODEL_SIZES


@pytest.mark.parametrize("path", sorted(LADDER_DIRECTORY.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_ladder_is_valid(path: Path) -> None:
    ladder = load_ladder(path.stem)
    assert max(size.model.num_parameters for size in ladder.sizes) < ladder.recipe.model.num_parameters
    assert sorted(size.model.num_parameters for size in ladder.sizes) == [s.model.num_parameters for s in ladder.sizes]


def test_a_model_of_the_same_depth_is_the_same() -> None:
    for model in MODEL_SIZES.values():
        assert scaled(model, model.num_hidden_layers) == model


def test_shapes_keep_their_proportions() -> None:
    large = MODEL_SIZES["tinyllama-1.1b"]
    small = scaled(large, 8)
    assert (small.num_hidden_layers, small.hidden_size, small.intermediate_size) == (8, 768, 2112)
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (12, 1, 64)
    assert small.intermediate_size / small.hidden_size == large.intermediate_size / large.hidden_size
    assert (small.vocab_size, small.rope_theta) == (large.vocab_size, large.rope_theta)
    assert all(scaled(large, depth).num_key_value_heads >= 1 for depth in range(1, 40))


def test_tokens_are_whole_steps_and_follow_the_parameters(tmp_path: Path) -> None:
    ladder = load_ladder(str(write_ladder(tmp_path, tokens=None, tokens_per_parameter=[0.1, 0.4])))
    for size in ladder.sizes:
        assert all(tokens % ladder.batch_tokens == 0 for tokens in size.tokens)
        assert size.tokens[1] == pytest.approx(0.4 * size.model.num_parameters, abs=ladder.batch_tokens)
    assert ladder.batch_tokens == 256


def test_the_learning_rate_follows_the_width(tmp_path: Path) -> None:
    path = write_ladder(tmp_path, learning_rate=1e-3, learning_rate_exponent=-1.0)
    rates = {size.model.hidden_size: size.learning_rate for size in load_ladder(str(path)).sizes}
    assert rates == pytest.approx({32: 2e-3, 64: 1e-3, 96: 1e-3 / 1.5, 128: 5e-4})
    assert {size.learning_rate for size in load_ladder(str(write_ladder(tmp_path))).sizes} == {3e-3}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depth": [1]}, "line 5: unknown key 'depth'; the keys are recipe, deepspeed_config, depths"),
        ({"depths": [1, 2, 3]}, "depths is .1, 2, 3.; expected at least 4 entries"),
        ({"depths": [1, 2, 2, 3]}, "depths has 2 twice; expected different ones"),
        ({"tokens": None}, "tokens_per_parameter and tokens decide the same; expected one of them"),
        ({"tokens_per_parameter": [1.0]}, "tokens_per_parameter and tokens decide the same; expected one of them"),
        ({"recipe": "none.toml"}, "none.toml: the recipe is missing"),
        ({"deepspeed_config": "none.json"}, "none.json"),
        ({"tokens": [256, 512]}, "a decay over 0.1 of 256 tokens, 0 steps of 256, does not fit"),
        ({"tokens": [5120, 5376]}, "d1: a decay over 0.1 of 5,376 tokens, 2 steps of 256, does not fit after 5,120"),
        ({"global_batch_tokens": 100}, "global_batch_tokens is 100; expected a multiple of sequence_length 32"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, changes: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_ladder(str(write_ladder(tmp_path, **changes)))
    assert "\n" not in str(caught.value)


def test_what_is_no_ladder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ladder 'none' is unknown; the shipped ones are demo"):
        load_ladder("none")
    (tmp_path / "bad.toml").write_text("recipe = ")
    with pytest.raises(ConfigError, match="bad.toml: not valid TOML"):
        load_ladder(str(tmp_path / "bad.toml"))
    path = write_ladder(tmp_path, recipe="tinyllama-v1.1")
    with pytest.raises(ConfigError, match="recipe tinyllama-v1.1 has [23] stages; expected one"):
        load_ladder(str(path))
