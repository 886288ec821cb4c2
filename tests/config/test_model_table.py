"""The `[model]` table of a recipe: Hugging Face's config.json, pasted; mistakes are named with their line."""

import json
from pathlib import Path

import pytest
from llama_family import LLAMA_3_2_1B, SMOLLM2_135M
from recipes import VALID

from tinyllama_ds.config.recipe import Recipe, load_recipe
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import MODEL_SIZES, Llama3Scaling, LlamaConfig, YarnScaling

RECIPE = VALID.replace('model = "test"\n', "") + "[model]\n"
LLAMA3 = Llama3Scaling(32.0, 1.0, 4.0, 8192)
TEST = LlamaConfig(512, 64, 176, 2, 4, 2, 128)
FIELDS = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip


def toml(value: object) -> str:
    """A value of JSON as TOML has it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(entry)}" for key, entry in value.items()) + " }"
    return json.dumps(value)


def recipe_with(folder: Path, fields: dict, sequence_length: int = 32) -> Recipe:
    path = folder / "mine.toml"
    table = "\n".join(f"{key} = {toml(value)}" for key, value in fields.items())
    path.write_text(RECIPE.replace("= 32", f"= {sequence_length}") + table)
    return load_recipe(str(path))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            LLAMA_3_2_1B,
            LlamaConfig(
                128_256, 2048, 8192, 16, 32, 8, 131_072, 1e-5, 5e5, tie_word_embeddings=True, rope_scaling=LLAMA3
            ),
        ),
        (SMOLLM2_135M, LlamaConfig(49_152, 576, 1536, 30, 9, 3, 8192, 1e-5, 1e5, tie_word_embeddings=True)),
        (FIELDS, TEST),
        (FIELDS | {"rope_scaling": {"type": "linear", "factor": 4.0}}, LlamaConfig(*FIELDS.values(), 1e4, 4.0)),
        (
            FIELDS | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4, "beta_slow": 2}},
            LlamaConfig(*FIELDS.values(), 500.0, rope_scaling=YarnScaling(4, 128, beta_slow=2)),
        ),
        (FIELDS | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, LlamaConfig(*FIELDS.values(), 7.0)),
    ],
)  # fmt: skip
def test_a_config_json_is_pasted(fields: dict, expected: LlamaConfig, tmp_path: Path) -> None:
    assert recipe_with(tmp_path, fields).model == expected


def test_the_table_of_a_named_size_has_its_identity(tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, FIELDS)
    assert (recipe.model, recipe.model_name, recipe.to_dict()["model"]) == (MODEL_SIZES["test"], "test", "test")
    other = recipe_with(tmp_path, FIELDS | {"tie_word_embeddings": True})
    assert (other.model_name, other.to_dict()["model"]) == (
        "custom",
        FIELDS | {"rope_theta": 1e4} | {"tie_word_embeddings": True},
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 65}, "line 15: model: hidden_size 65 must be a multiple of num_attention_heads 4"),
        ({"hidden_size": 64.5}, "line 17: model.hidden_size is 64.5; expected a whole number"),
        ({"hiden_size": 64}, "line 24: unknown key 'model.hiden_size'"),
        ({"attention_bias": True}, "line 24: model.attention_bias is true; expected false, as in TinyLlama"),
        ({"mlp_bias": True}, "model.mlp_bias is true; expected false, as in TinyLlama"),
        ({"hidden_act": "gelu"}, 'model.hidden_act is "gelu"; expected "silu"'),
        ({"tie_word_embeddings": "yes"}, 'model.tie_word_embeddings is "yes"; expected true or false'),
        ({"head_dim": 15}, "model: head_dim 15 must be even"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            """line 24: model.rope_scaling.rope_type is "dynamic"; expected 'default', 'linear', 'llama3' or 'yarn'""",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "expected low_freq_factor and high_freq_factor with the type llama3",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fst": 3}}, "key 'model.rope_scaling.beta_fst'"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_line(changes: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        recipe_with(tmp_path, FIELDS | changes)
    assert str(error.value).startswith(f"{tmp_path}/mine.toml: ")
    assert sentence in str(error.value)


def test_mistakes_of_the_table_come_with_all_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.replace("seed = 1", "seed = 1.5") + 'vocab_size = 512\nhidden_size = "64"')
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path))
    assert "line 4: seed is 1.5; expected a whole number" in str(error.value)
    assert ": 7 problems: " in str(error.value)
    assert 'line 17: model.hidden_size is "64"; expected a whole number' in str(error.value)
    assert "line 15: the key 'model.rms_norm_eps' is missing" in str(error.value)


@pytest.mark.parametrize("value", ['"tinyllama-7b"', "7"])
def test_a_name_is_one_of_the_sizes(value: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"model = {value}\n{RECIPE.removesuffix('[model]')}".replace("[model]\n", ""))
    with pytest.raises(ConfigError, match=f"line 1: model is {value}; expected "):
        load_recipe(str(path))


def test_positions_bound_the_sequences(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sequence_length is 160; expected at most the 128 positions of model 'test'"):
        recipe_with(tmp_path, FIELDS, sequence_length=160)
