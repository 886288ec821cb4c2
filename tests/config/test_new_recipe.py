"""What `recipe new` writes: every key with its default, the values of another recipe, and a JSON that trains."""

import json
import re
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path

import forked
import pytest
from launching import write_recipe

from tinyllama_ds.cli import main
from tinyllama_ds.config.deepspeed import load_deepspeed_config
from tinyllama_ds.config.new_recipe import Draft, draft_like, recipe_text, toml_value
from tinyllama_ds.config.recipe import (
    RECIPE_DIRECTORY,
    Evaluation,
    GuardSettings,
    Intervals,
    Recipe,
    Samples,
    Stage,
    Teacher,
    load_recipe,
)
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.hf.import_model import read_config
from tinyllama_ds.model.config import Mup

SHIPPED = sorted(path.stem for path in RECIPE_DIRECTORY.glob("*.toml"))


def test_every_key_is_there_with_its_default() -> None:
    text = recipe_text(Draft("mine"))
    keys = set(re.findall(r"^(?:# )?\[*(\w+)[\] ]", text, flags=re.M))
    tables = (Recipe, Stage, Intervals, GuardSettings, Samples, Evaluation, Teacher, Mup)
    assert {field.name for table in tables for field in fields(table)} - keys == {"ramp_tokens"}, "of later stages"
    raw = tomllib.loads(text)
    for name, table in (("guard", GuardSettings()), ("intervals", Intervals())):
        assert raw[name] == asdict(table)
    assert {key: raw[key] for key in ("sequence_length", "seed", "validation_samples", "document_mask")} == {
        field.name: field.default
        for field in fields(Recipe)
        if not isinstance(raw.get(field.name, {}), dict | list | str)
    }


def test_what_has_no_default_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.toml"
    assert main(["recipe", "new", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["required"] == ["model", "tokens", "weights"]
    assert main(["plan", "--recipe", str(recipe), "--deepspeed-config", str(tmp_path / "mine.json")]) == EXIT_CONFIG
    error = capsys.readouterr().err
    assert "3 problems" in error
    assert all(f"{key}' is missing" in error for key in ("model", "stages[0].tokens", "stages[0].weights"))
    recipe.write_text(re.sub(r"^# (.* # REQUIRED: )", r"\1", recipe.read_text(), flags=re.M))
    assert load_recipe(str(recipe)).sources == ["slimpajama", "starcoderdata"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_like_another_has_its_values(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(recipe_text(draft_like("mine", name)))
    assert load_recipe(str(path)) == replace(load_recipe(name), name="mine")


def test_samples_scores_a_teacher_and_mup_are_taken_over(tmp_path: Path) -> None:
    like = write_recipe(tmp_path / "like.toml", 4, save_every=4)
    extra = '[samples]\nprompts = ["a\\"b", "\\\\n"]\nevery_tokens = 640\nnew_tokens = 5\n'
    extra += '[evaluation]\ntasks = ["piqa"]\nevery_tokens = 640\nlimit = 7\n'
    extra += "[teacher]\nweight = 0.25\ntemperature = 3\n[mup]\nbase_hidden_size = 32\n"
    like.write_text(like.read_text() + extra)
    path = tmp_path / "mine.toml"
    path.write_text(recipe_text(draft_like("mine", str(like))))
    assert load_recipe(str(path)) == replace(load_recipe(str(like)), name="mine")


def test_it_trains_as_it_is_written(data_dir: Path, tmp_path: Path) -> None:
    like = write_recipe(tmp_path / "like.toml", 4, save_every=4)
    recipe, config = tmp_path / "mine.toml", tmp_path / "mine.json"
    assert main(["recipe", "new", str(recipe), "--like", str(like)]) == 0
    assert load_deepspeed_config(config)["scheduler"]["params"]["warmup_num_steps"] == "auto"
    finished = forked.pretrain(recipe, config, data_dir, tmp_path / "run", 1)
    assert finished.returncode == 0, finished.stderr
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["deepspeed_config"]["scheduler"]["params"]["warmup_num_steps"] == 1


def test_files_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text("{}")
    assert main(["recipe", "new", str(tmp_path / "mine.toml")]) == EXIT_CONFIG
    assert "mine.json: already exists; expected a new file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
    assert main(["recipe", "new", str(tmp_path / "mine.yaml")]) == EXIT_CONFIG
    assert "mine.yaml: is not the name of a recipe" in capsys.readouterr().err


LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True, "vocab_size": 512, "torch_dtype": "bfloat16",
    "attention_bias": False, "pad_token_id": None, "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


def test_the_model_of_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3))
    path = tmp_path / "mine.toml"
    assert main(["recipe", "new", str(path), "--from-hf", str(tmp_path)]) == 0, capsys.readouterr().err
    assert tomllib.loads(path.read_text())["sequence_length"] == 2048
    path.write_text(re.sub(r"^# (.* # REQUIRED: )", r"\1", path.read_text(), flags=re.M))
    assert load_recipe(str(path)).model == read_config(tmp_path / "config.json")
    path.with_name("copy.toml").write_text(recipe_text(draft_like("copy", str(path))))
    assert load_recipe(str(path.with_name("copy.toml"))) == replace(load_recipe(str(path)), name="copy")


def test_a_model_that_is_not_a_llama_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3 | {"attention_bias": True}))
    assert main(["recipe", "new", str(tmp_path / "mine.toml"), "--from-hf", str(tmp_path)]) == EXIT_CONFIG
    assert "attention_bias is true; expected false" in capsys.readouterr().err
    assert not (tmp_path / "mine.toml").exists()


@pytest.mark.parametrize("value", [True, 12, 123_456, 0.5, 'a "b"\n\\', [1, 2], {"a b": 1.0, "c-d": ["x"]}])
def test_values_are_read_again(value: object) -> None:
    assert tomllib.loads(f"key = {toml_value(value)}") == {"key": value}
