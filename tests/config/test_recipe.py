"""Recipes: the shipped ones load, and what is wrong is named with its place."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from recipes import VALID

from tinyllama_ds.config.deepspeed import load_deepspeed_config
from tinyllama_ds.config.recipe import (
    RECIPE_DIRECTORY,
    Evaluation,
    GuardSettings,
    Intervals,
    Samples,
    Stage,
    load_recipe,
    recipe_of_run,
)
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.schedule import make_schedule
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import MODEL_SIZES, Mup, YarnScaling

SHIPPED = sorted(path.stem for path in RECIPE_DIRECTORY.glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_fit_their_model(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.sequence_length <= recipe.model.max_position_embeddings
    assert RunPlan(recipe).total_tokens >= sum(stage.tokens for stage in recipe.stages)


PUBLISHED = sorted(name for name in SHIPPED if name.startswith("tinyllama-v1"))
VARIANTS = {
    "tinyllama-v1.1": {"slimpajama": 1.0},
    "tinyllama-v1.1-math-code": {"slimpajama": 0.75, "starcoderdata": 0.15, "proof-pile-2": 0.1},
    "tinyllama-v1.1-chinese": {"slimpajama": 0.5, "skypile": 0.5},
}
ZERO3 = RECIPE_DIRECTORY.parents[1] / "ds_configs" / "zero3.json"


def test_packing_is_in_a_runs_description_where_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID)
    assert "packing" not in load_recipe(str(path)).to_dict(), "an older run has the same identity"
    path.write_text(VALID.replace("seed = 1", 'seed = 1\npacking = "best_fit"\ndocument_mask = true'))
    recipe = load_recipe(str(path))
    assert recipe.to_dict()["packing"] == recipe.packing == "best_fit"
    assert recipe_of_run({"recipe": recipe.to_dict()}) == recipe


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_share_model_context_and_seed(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model.num_parameters == 1_100_048_384
    assert (recipe.sequence_length, recipe.seed, recipe.document_mask) == (2048, 3407, False)


def test_tinyllama_v1_has_the_published_numbers() -> None:
    """pretrain/tinyllama.py of TinyLlama's repository, and its README."""
    recipe = load_recipe("tinyllama-v1")
    plan = RunPlan(recipe)
    assert plan.first_batch_tokens == 2_097_152
    assert plan.stages[0].batch == 1024
    assert plan.total_steps == 1_430_512 == 2 * 715_256
    assert plan.total_tokens == 3_000_001_101_824
    assert recipe.stages[0].weights == {"slimpajama": 0.693584, "starcoderdata": 0.306416}


@pytest.mark.parametrize(("name", "shares"), VARIANTS.items())
def test_tinyllama_v1_1_has_the_published_stages(name: str, shares: dict[str, float]) -> None:
    """The paper's section 2.5 and appendix; 896 sequences are our reading of "about 1.8M tokens"."""
    recipe = load_recipe(name)
    plan = RunPlan(recipe)
    assert [stage.tokens for stage in recipe.stages] == [1_500 * 10**9, 350 * 10**9, 150 * 10**9]
    assert [stage.global_batch_tokens for stage in recipe.stages] == [1_835_008, 1_835_008, 7_340_032]
    assert [stage.ramp_tokens for stage in recipe.stages] == [0, 0 if name == "tinyllama-v1.1" else 6 * 10**9, 0]
    assert [stage.weights for stage in recipe.stages] == [{"slimpajama": 1.0}, shares, shares]
    assert [stage.steps for stage in plan.stages] == [817_436, 190_735, 20_436]
    assert all(stage.batch % 64 == 0 for stage in plan.stages), "16 nodes of 4 GPUs"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_learning_rate_is_one_cosine_over_all_tokens(name: str) -> None:
    plan = RunPlan(load_recipe(name))
    config = load_deepspeed_config(ZERO3)
    schedule, params = make_schedule(config, ZERO3, plan), config["optimizer"]["params"]
    peak = params["lr"]
    assert (peak, params["betas"], params["weight_decay"], config["gradient_clipping"]) == (4e-4, [0.9, 0.95], 0.1, 1.0)
    assert peak * schedule.ratio(2000 * plan.first_batch_tokens) == pytest.approx(4e-4, rel=1e-12)
    assert peak * schedule.ratio(1000 * plan.first_batch_tokens) == pytest.approx(2e-4, rel=1e-12)
    assert peak * schedule.ratio(plan.total_tokens) == pytest.approx(4e-5, rel=1e-12)
    if name != "tinyllama-v1":
        assert peak * schedule.ratio(1_500 * 10**9) == pytest.approx(9.27e-5, rel=0.01)
        assert peak * schedule.ratio(1_850 * 10**9) == pytest.approx(4.50e-5, rel=0.01)


@pytest.mark.parametrize(("name", "steps"), [("tinyllama-v1", 2000), ("demo", 1)])
def test_an_automatic_warmup_has_the_published_share_of_the_run(name: str, steps: int) -> None:
    plan, config = RunPlan(load_recipe(name)), load_deepspeed_config(ZERO3)
    config["scheduler"]["params"]["warmup_num_steps"] = "auto"
    assert make_schedule(config, ZERO3, plan).warmup_tokens == steps * plan.first_batch_tokens


@pytest.mark.parametrize(("name", "shares"), VARIANTS.items())
def test_the_rehearsal_has_the_stages_of_v1_1_in_proportion(name: str, shares: dict[str, float]) -> None:
    small, large = (load_recipe(which) for which in (name.replace("tinyllama", "demo"), name))
    total = sum(stage.tokens for stage in small.stages)
    for ours, published in zip(small.stages, large.stages, strict=True):
        assert ours.name == published.name
        assert ours.tokens / total == published.tokens / 2e12
        assert ours.global_batch_tokens / 2048 == published.global_batch_tokens / 1_835_008
        assert ours.weights == published.weights
        assert bool(ours.ramp_tokens) == bool(published.ramp_tokens)


@pytest.mark.parametrize(("name", "before"), [("32k", 2048), ("128k", 32_768)])
def test_a_context_extension_keeps_batch_and_shapes(name: str, before: int) -> None:
    """Tokens per step and the short half of the mixture are v1's; rows hold whole documents."""
    recipe, v1 = load_recipe(f"tinyllama-{name}"), load_recipe("tinyllama-v1")
    assert recipe.sequence_length == recipe.model.max_position_embeddings == 1024 * int(name[:-1]) > before
    assert RunPlan(recipe).first_batch_tokens == RunPlan(v1).first_batch_tokens == 2_097_152
    assert recipe.document_mask
    assert recipe.packing == "best_fit"
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    assert [getattr(recipe.model, key) for key in same] == [getattr(v1.model, key) for key in same]
    weights = recipe.stages[0].weights
    assert sum(weights.values()) == pytest.approx(1)
    short = {source: 2 * weights[source] for source in v1.sources}
    assert short == pytest.approx(v1.stages[0].weights)
    scaling = recipe.model.rope_scaling
    if isinstance(scaling, YarnScaling):
        assert scaling.original_max_position_embeddings == before
        assert scaling.factor * before == recipe.sequence_length


def test_the_code_model_has_the_published_numbers() -> None:
    recipe = load_recipe("tinyllama-python-8k")
    plan = RunPlan(recipe)
    assert (plan.stages[0].batch, recipe.sequence_length) == (360, 8192)
    assert plan.total_tokens == pytest.approx(7e9, rel=1e-3)
    assert recipe.model.rope_scaling_factor == 4
    assert recipe.model.num_parameters == MODEL_SIZES["tinyllama-1.1b"].num_parameters


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("weight = 0", "teacher.weight is 0; expected more than 0"),
        ("weight = 1.5", "teacher.weight is 1.5; expected 1.0 or less"),
        ("weight = 1\ntemperature = 0", "teacher.temperature is 0; expected 0.1 or more"),
        ("temperature = 2", "the key 'teacher.weight' is missing"),
        ("weight = 1\ntop_k = 8", "unknown key 'teacher.top_k'; the keys are weight, temperature"),
    ],
)
def test_a_teacher_has_a_weight_and_a_temperature(table: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"{VALID}\n[teacher]\n{table}\n")
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load_recipe(str(path))


def test_a_run_remembers_its_teacher_and_no_absent_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID)
    assert "teacher" not in load_recipe(str(path)).to_dict()
    path.write_text(f"{VALID}\n[teacher]\nweight = 0.5\n")
    recipe = load_recipe(str(path))
    assert recipe.to_dict()["teacher"] == {"weight": 0.5, "temperature": 1.0}
    assert recipe_of_run({"recipe": recipe.to_dict()}) == recipe


def test_a_table_mup_is_the_models_and_no_absent_one(tmp_path: Path) -> None:
    """A named size keeps its name; a model of its own is described once."""
    path = tmp_path / "mine.toml"
    path.write_text(VALID)
    assert "mup" not in load_recipe(str(path)).to_dict()
    path.write_text(f"{VALID}\n[mup]\nbase_hidden_size = 32\n")
    recipe = load_recipe(str(path))
    assert recipe.model == replace(MODEL_SIZES["test"], mup=Mup(32))
    described = recipe.to_dict()
    assert (described["model"], described["mup"]) == ("test", {"base_hidden_size": 32, "base_head_dim": None})
    assert recipe_of_run({"recipe": described}) == recipe
    for line, sentence in (
        ("base_hidden_size = 0", "base_hidden_size 0 is not above 0"),
        ("base_hidden_size = 3.5", "line 18: mup.base_hidden_size is 3.5; expected a whole number"),
        ("base_head_dim = 16", "the key 'mup.base_hidden_size' is missing"),
        ("base_hidden_size = 8\nwidth = 2", "unknown key 'mup.width'; the keys are base_hidden_size, base_head_dim"),
    ):
        path.write_text(f"{VALID}\n[mup]\n{line}\n")
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            load_recipe(str(path))


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
        (
            ("ramp_tokens = 3201", "ramp_tokens = 6401"),
            r"stages\[1\].ramp_tokens is 6401; expected at most the 6400 tokens of the stage",
        ),
        (("ramp_tokens = 3201", "ramp_tokens = -1"), r"stages\[1\].ramp_tokens is -1; expected 1 or more"),
        (
            ("tokens = 6400", "tokens = 6400\nramp_tokens = 5"),
            r"line 10: stages\[0\].ramp_tokens is 5; expected it in a later stage",
        ),
    ],
)
def test_an_impossible_ramp_is_rejected(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace("[intervals]", RAMP).replace(*change, 1))
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(str(path))


def test_a_path_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID)
    assert load_recipe(str(path)).sources == ["slimpajama"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("seed = 1", "sed = 1"), "unknown key 'sed'; did you mean 'seed'?"),
        (("seed = 1", "seed = 1\nshuffle = true"), "unknown key 'shuffle'; the keys are name, "),
        (("seed = 1", 'seed = "one"'), 'seed is "one"; expected a whole number'),
        (("tokens = 6400", "tokens = 0"), r"stages\[0\].tokens is 0; expected 1 or more"),
        (("= 320", "= 330"), r"stages\[0\].global_batch_tokens is 330; expected a multiple of sequence_length 32"),
        (("slimpajama = 1", "slimpajama = -1"), "weights.slimpajama is -1; expected a positive number"),
        (
            ("slimpajama = 1", '"../x" = 1'),
            r'weights.../x is "../x"; expected the name of a source, which is a folder',
        ),
        (("{ slimpajama = 1 }", "{}"), "weights is {}; expected at least 1 entry"),
        (("log_steps", "log_step"), "unknown key 'intervals.log_step'; did you mean 'intervals.log_steps'?"),
        (("log_steps = 1", "log_steps = 1\nkeep_last = 1"), "intervals.keep_last is 1; expected 2 or more"),
        (("log_steps = 1", "log_steps = 1\nsave_minutes = 0"), "intervals.save_minutes is 0; expected 1 or more"),
        (("[[stages]]", "[stages]"), "stages is .*; expected an array"),
        (("seed = 1", "seed = = 1"), "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace(*change))
    with pytest.raises(ConfigError, match=sentence) as error:
        load_recipe(str(path))
    assert str(path) in str(error.value)


def test_what_has_a_default_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text('model = "test"\nsequence_length = 128\n[[stages]]\ntokens = 1_000_000\nweights = { books = 1 }\n')
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.seed, recipe.intervals) == ("short", 3407, Intervals())
    assert recipe.stages == (Stage(tokens=1_000_000, weights={"books": 1}),)
    path.write_text("")
    with pytest.raises(ConfigError, match=r"\(1\) the key 'model' is missing; \(2\) the key 'stages' is missing$"):
        load_recipe(str(path))


TWELVE_MISTAKES = """
model = "tset"
sequence_length = "2k"
sede = 1
documents = true
[[stages]]
tokens = 0
weights = { "../x" = 1 }
ramp_tokens = 5
[[stages]]
tokens = 6400
ramp_tokens = 6401
weights = {}
[intervals]
keep_last = 1
[guard]
spike_policy = "roll back"
[evaluation]
tasks = ["piqa"]
"""


def test_all_mistakes_are_named_in_one_answer(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TWELVE_MISTAKES)
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path))
    sentences = [
        "line 2: model is",
        "line 3: sequence_length is",
        "line 4: unknown key 'sede'",
        "line 5: unknown key 'documents'",
        "line 7: stages[0].tokens is 0",
        "line 8: stages[0].weights.../x is",
        "line 9: stages[0].ramp_tokens is 5; expected it in a later stage",
        "line 12: stages[1].ramp_tokens is 6401; expected at most",
        "line 13: stages[1].weights is {}",
        "line 15: intervals.keep_last is 1",
        "line 17: guard.spike_policy is",
        "line 18: the key 'evaluation.every_tokens' is missing",
    ]
    assert "12 problems" in str(error.value)
    assert [sentence for sentence in sentences if sentence not in str(error.value)] == []


def test_keys_that_depend_on_each_other_are_named_with_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace("= 32\n", "= 160\n").replace("= 320", "= 330").replace("seed = 1", "seed = -1"))
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path))
    assert all(
        sentence in str(error.value)
        for sentence in (
            "sequence_length is 160; expected at most the 128 positions of model 'test'",
            "global_batch_tokens is 330; expected a multiple of sequence_length 160",
            "seed is -1",
        )
    )


def test_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="'tinylama-v1' is unknown; the shipped ones are demo, "):
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
        (
            '"rollback"',
            '"roll back"',
            r'mine.toml: line 18: guard.spike_policy is "roll back"; expected .log., .skip. or .rollback.',
        ),
        ("spike_sigmas = 8", "spike_sigmas = 0", "guard.spike_sigmas is 0; expected a positive number"),
        ("spike_sigmas = 8", 'spike_sigmas = "8"', 'guard.spike_sigmas is "8"; expected a number'),
        ("spike_window", "spike_windows", "unknown key 'guard.spike_windows'; did you mean 'guard.spike_window'"),
    ],
)
def test_a_wrong_guard_is_rejected(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID + GUARD.replace(old, new))
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(str(path))


SAMPLES = '\n[samples]\nprompts = ["Once", "def"]\nevery_tokens = 640\nnew_tokens = 5\n'


def test_samples_are_off_unless_the_recipe_has_prompts(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID)
    assert load_recipe(str(path)).samples == Samples()
    path.write_text(VALID + SAMPLES)
    assert load_recipe(str(path)).samples == Samples(("Once", "def"), 640, 5)
    assert [name for name in SHIPPED if load_recipe(name).samples.prompts] == ["demo"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            '["Once", "def"]',
            "[]",
            r"mine.toml: line 18: samples.prompts is \[\]; expected at least 1 entry",
        ),
        ('["Once", "def"]', '["Once", ""]', r'samples.prompts\[1\] is ""; expected a text that is not empty'),
        ('["Once", "def"]', '"Once"', 'samples.prompts is "Once"; expected an array'),
        ("every_tokens = 640", "every_tokens = 0", "samples.every_tokens is 0; expected 1 or more"),
        ("new_tokens = 5", "", "the key 'samples.new_tokens' is missing"),
    ],
)
def test_wrong_samples_are_rejected(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID + SAMPLES.replace(old, new))
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(str(path))


EVALUATION = '\n[evaluation]\ntasks = ["commonsense", "mine.yaml", "/a/b.yml"]\nevery_tokens = 640\n'


def test_nothing_is_scored_unless_the_recipe_has_tasks(tmp_path: Path) -> None:
    """Files are next to the recipe, wherever the ranks are started."""
    path = tmp_path / "mine.toml"
    path.write_text(VALID)
    assert load_recipe(str(path)).evaluation == Evaluation()
    path.write_text(VALID + EVALUATION)
    tasks = ("commonsense", str(tmp_path / "mine.yaml"), "/a/b.yml")
    assert load_recipe(str(path)).evaluation == Evaluation(tasks, 640, None, 32, None)
    path.write_text(VALID + EVALUATION + 'limit = 9\nbatch_size = 4\ndata_dir = "sets"\n')
    assert load_recipe(str(path)).evaluation == Evaluation(tasks, 640, 9, 4, str(tmp_path / "sets"))
    assert [name for name in SHIPPED if load_recipe(name).evaluation.tasks] == []


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            '["commonsense", "mine.yaml", "/a/b.yml"]',
            "[]",
            r"mine.toml: line 18: evaluation.tasks is \[\]; expected at least 1 entry",
        ),
        ("every_tokens = 640", "", "the key 'evaluation.every_tokens' is missing"),
        ("every_tokens", "limit = 0\nevery_tokens", "evaluation.limit is 0; expected 1 or more"),
        ("every_tokens", "shots = 5\nevery_tokens", "unknown key 'evaluation.shots'; the keys are tasks, "),
    ],
)
def test_a_wrong_evaluation_is_rejected(old: str, new: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID + EVALUATION.replace(old, new))
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            ("tokens = 6400", f"tokens = {10**30}"),
            "stages[0].tokens is 1000000000000000000000000000000; expected 1,000,0",
        ),
        (("tokens = 6400", "tokens = 1e9"), "stages[0].tokens is 1000000000.0; expected a whole number"),
        (("tokens = 6400", "tokens = true"), "stages[0].tokens is true; expected a whole number"),
        (
            ("tokens = 6400", "tokens = 0x1" + 5000 * "0"),
            "stages[0].tokens is a value with a number of too many digits",
        ),
        (("tokens = 6400", "tokens = 1" + 5000 * "0"), "not valid TOML (Exceeds the limit"),
        (
            ("seed = 1", "seed = " + 3000 * "[" + 3000 * "]"),
            "not valid TOML (its arrays or tables are nested too deeply)",
        ),
        (("seed = 1", "seed = -1"), "seed is -1; expected 0 or more"),
        (("seed = 1", f"seed = {2**64}"), "seed is 18446744073709551616; expected 9,223,372,036,854,775,807 or less"),
        (("seed = 1", "seed = 1979-05-27"), 'seed is "datetime.date(1979, 5, 27)"; expected a whole number'),
        (
            ("sequence_length = 32", "sequence_length = 1_000_000_000"),
            "sequence_length is 1000000000; expected 10,000,0",
        ),
        (
            ("= 320", "= 32_000_000_000_000"),
            "stages[0].global_batch_tokens is 32000000000000; expected 2,147,483,648 or",
        ),
        (("slimpajama = 1", "slimpajama = nan"), "stages[0].weights.slimpajama is NaN; expected a positive"),
        (
            ("slimpajama = 1", "slimpajama = inf"),
            "stages[0].weights.slimpajama is Infinity; expected a positive",
        ),
        (
            ("slimpajama = 1", "slimpajama = 0"),
            "stages[0].weights.slimpajama is 0; expected a positive number",
        ),
        (("slimpajama = 1", "slimpajama = true"), "stages[0].weights.slimpajama is true; expected a number"),
        (("slimpajama = 1", f"slimpajama = {10**400}"), "stages[0].weights.slimpajama is 1000"),
        (("{ slimpajama = 1 }", "5"), "stages[0].weights is 5; expected a table of keys and values"),
        (("log_steps = 1", "log_steps = 0"), "intervals.log_steps is 0; expected 1 or more"),
        (('name = "mine"', 'name = ""'), 'name is ""; expected a text'),
        (('name = "mine"', 'name = "a\\u0000b"'), r'name is "a\u0000b"; expected a text'),
        (("seed = 1", "seed = 1\ndocument_mask = 1"), "document_mask is 1; expected true or false"),
        (("seed = 1", "seed = 1\nguard = 1"), "guard is 1; expected a table"),
        (("seed = 1", 'seed = 1\npacking = "bfd"'), "packing is \"bfd\"; expected 'concatenate' or 'best_fit'"),
        (
            ("seed = 1", 'seed = 1\npacking = "best_fit"'),
            'packing is "best_fit"; expected "concatenate", or document_mask = true as well',
        ),
    ],
)
def test_values_have_type_and_range(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    path = tmp_path / "mine.toml"
    assert change[0] in VALID
    path.write_text(VALID.replace(*change))
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path))
    place, _, problem = str(error.value).partition(": ")
    assert place == str(path)
    assert re.sub(r"^line \d+: ", "", problem).startswith(sentence)
    assert len(str(error.value)) < 400


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = (
        VALID.replace("seed = 1", 'seed = "one"').replace("tokens = 6400", "tokens = 0").replace("save_tok", "safe_tok")
    )
    path.write_text(text + "\n[guard]\nspike_windw = 3\n")
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path))
    assert str(error.value) == (
        f'{path}: 4 problems: (1) line 5: seed is "one"; expected a whole number;'
        " (2) line 9: stages[0].tokens is 0; expected 1 or more;"
        " (3) line 15: unknown key 'intervals.safe_tokens'; did you mean 'intervals.save_tokens'?;"
        " (4) line 18: unknown key 'guard.spike_windw'; did you mean 'guard.spike_window'?"
    )


def test_a_hint_calls_no_valid_key_invalid(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(VALID.replace("\ntokens = 6400", ""))
    with pytest.raises(ConfigError) as error:
        load_recipe(str(path))
    assert str(error.value) == f"{path}: line 7: the key 'stages[0].tokens' is missing"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "is a directory; expected the recipe, which is a file"),
        (b"# caf\xe9\n", "byte 0xe9 is not UTF-8; expected the recipe in UTF-8"),
        (VALID.encode("utf-16"), "byte 0xff is not UTF-8"),
        (bytes(100), "not valid TOML"),
        (b"", "the key 'model' is missing"),
    ],
)
def test_other_files_are_rejected(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(str(path))


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    assert load_recipe(str(path)).name == "mine"
