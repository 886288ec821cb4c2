"""Recipes: the shipped ones load, and what is wrong is named with its place."""

from pathlib import Path

import pytest

from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.plan import RunPlan
from tinyllama_ds.recipe import RECIPE_DIRECTORY, GuardSettings, load_recipe

SHIPPED = sorted(path.stem for path in RECIPE_DIRECTORY.glob("*.toml"))
VALID = """
name = "mine"
model = "test"
sequence_length = 32
seed = 1
validation_samples = 4
[[stages]]
name = "only"
tokens = 6400
global_batch_tokens = 320
weights = { slimpajama = 1 }
[intervals]
log_steps = 1
evaluate_tokens = 640
save_tokens = 640
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_fit_their_model(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.sequence_length <= MODEL_SIZES[recipe.model].max_position_embeddings
    assert RunPlan(recipe).total_tokens >= sum(stage.tokens for stage in recipe.stages)


def test_tinyllama_v1_has_the_published_numbers() -> None:
    recipe = load_recipe("tinyllama-v1")
    plan = RunPlan(recipe)
    assert plan.stages[0].batch == 1024
    assert plan.total_steps == 1_430_512
    assert recipe.stages[0].weights == {"slimpajama": 0.693584, "starcoderdata": 0.306416}
    assert recipe.seed == 3407


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("tinyllama-v1.1")])
def test_tinyllama_v1_1_has_the_published_stages(name: str) -> None:
    recipe = load_recipe(name)
    assert [stage.tokens for stage in recipe.stages] == [1_500 * 10**9, 350 * 10**9, 150 * 10**9]
    assert [stage.batch for stage in RunPlan(recipe).stages] == [896, 896, 4 * 896]
    assert [stage.ramp_tokens for stage in recipe.stages] == [0, 0 if name == "tinyllama-v1.1" else 6 * 10**9, 0]
    assert recipe.stages[0].weights == {"slimpajama": 1.0}
    assert all(sum(stage.weights.values()) == pytest.approx(1) for stage in recipe.stages)


def test_the_code_model_has_the_published_numbers() -> None:
    recipe = load_recipe("tinyllama-python-8k")
    plan = RunPlan(recipe)
    assert (plan.stages[0].batch, recipe.sequence_length) == (360, 8192)
    assert plan.total_tokens == pytest.approx(7e9, rel=1e-3)
    assert MODEL_SIZES[recipe.model].rope_scaling_factor == 4
    assert MODEL_SIZES[recipe.model].num_parameters == MODEL_SIZES["tinyllama-1.1b"].num_parameters


RAMP = """
[[stages]]
name = "second"
tokens = 6400
global_batch_tokens = 320
weights = { slimpajama = 1, starcoderdata = 1 }
ramp_tokens = 3201
[intervals]"""


def test_a_ramp_reaches_the_plan_in_whole_samples(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace("[intervals]", RAMP))
    assert [stage.ramp_samples for stage in RunPlan(load_recipe(str(path))).stages] == [0, 101]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("ramp_tokens = 3201", "ramp_tokens = 6401"), "'second': ramp_tokens 6401 exceed its 6400 tokens"),
        (("ramp_tokens = 3201", "ramp_tokens = -1"), r"stages\[1\]: ramp_tokens is -1; expected 1 or more"),
        (("tokens = 6400", "tokens = 6400\nramp_tokens = 5"), "'only': ramp_tokens, but there is no stage before it"),
    ],
)
def test_an_impossible_ramp_is_refused(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace("[intervals]", RAMP).replace(*change, 1))
    with pytest.raises(Refusal, match=sentence):
        load_recipe(str(path))


def test_a_path_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID)
    assert load_recipe(str(path)).sources == ["slimpajama"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("seed = 1", "sed = 1"), r"the key 'seed' is missing \('sed' is not a key\)"),
        (("seed = 1", "seed = 1\nshuffle = true"), "unknown key 'shuffle'; the keys are stages, "),
        (("seed = 1", 'seed = "one"'), "seed is 'one'; expected a whole number"),
        (("tokens = 6400", "tokens = 0"), r"stages\[0\]: tokens is 0; expected 1 or more"),
        (("= 320", "= 330"), "global_batch_tokens 330 is not a multiple of sequence_length 32"),
        (("slimpajama = 1", "slimpajama = -1"), "the weight of 'slimpajama' is -1; expected a positive number"),
        (("slimpajama = 1", '"../x" = 1'), "'../x' is not the name of a source"),
        (("{ slimpajama = 1 }", "{}"), "weights name no source"),
        (("log_steps", "log_step"), r"intervals: the key 'log_steps' is missing \('log_step' is not a key\)"),
        (("log_steps = 1", "log_steps = 1\nkeep_last = 1"), "intervals: keep_last is 1; expected 2 or more"),
        (("log_steps = 1", "log_steps = 1\nsave_minutes = 0"), "intervals: save_minutes is 0; expected 1 or more"),
        (("[[stages]]", "[stages]"), "stages is .*; expected an array of tables"),
        (("seed = 1", "seed = = 1"), "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace(*change))
    with pytest.raises(Refusal, match=sentence) as refusal:
        load_recipe(str(path))
    assert str(path) in str(refusal.value)


def test_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(Refusal, match="'tinylama-v1' is unknown; the shipped ones are demo, "):
        load_recipe("tinylama-v1")


GUARD = '\n[guard]\nspike_policy = "rollback"\nspike_window = 64\nspike_sigmas = 8\nmax_rollbacks = 1\n'


def test_the_guard_is_the_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID)
    assert load_recipe(str(path)).guard == GuardSettings("log", 128, 6.0, 3)
    path.write_text(VALID + GUARD)
    assert load_recipe(str(path)).guard == GuardSettings("rollback", 64, 8.0, 1)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"rollback"', '"roll back"', r"mine.toml: guard: spike_policy is 'roll back'; expected log, skip, rollback"),
        ("spike_sigmas = 8", "spike_sigmas = 0", "guard: spike_sigmas is 0; expected a positive number"),
        ("spike_sigmas = 8", 'spike_sigmas = "8"', "guard: spike_sigmas is '8'; expected a number"),
        ("spike_window", "spike_windows", "guard: unknown key 'spike_windows'; did you mean 'spike_window'"),
    ],
)
def test_a_wrong_guard_is_refused(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID + GUARD.replace(old, new))
    with pytest.raises(Refusal, match=sentence):
        load_recipe(str(path))
