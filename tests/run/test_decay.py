"""The recipe and config of a decay, from a run's checkpoints."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from launching import SEQUENCE_LENGTH, STEP_TOKENS, write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import CheckpointManifest, Health, OptimizerRecord, Progress, checkpoint_name
from tinyllama_ds.config.deepspeed import load_deepspeed_config
from tinyllama_ds.config.recipe import load_recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.schedule import make_schedule
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.run.decay import plan_decay, write_once
from tinyllama_ds.run.resolve import Options, Run, resolve_run

CONSTANT = {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}}
STEPS = 10


def make_trunk(root: Path, data: Path, scheduler: dict | None, text: str | None = None) -> Run:
    """A run with checkpoints of 4 and 6 steps, without tensors."""
    recipe = write_recipe(root / "trunk.toml", STEPS, save_every=2)
    if text is not None:
        recipe.write_text(text)
    config = write_deepspeed_config(root / "ds.json", 1, micro_batch=2, scheduler=scheduler)
    run = resolve_run(Options(str(recipe), config, data, root / "trunk"), 2, "cpu", bf16=False)
    for step in (4, 6):
        folder = root / "trunk" / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        manifest = CheckpointManifest(
            Progress(step, *run.plan.end_of(step)), 2, 1, "float32", {}, run.description,
            {}, OptimizerRecord("AdamW", step, []), {}, Health(),
        )  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return run


@pytest.mark.parametrize(("at", "step"), [(None, 6), (6 * STEP_TOKENS, 6), (6 * STEP_TOKENS - 1, 4)])
def test_the_learning_rates_are_the_trunks_up_to_the_newest_checkpoint(
    data_dir: Path, tmp_path: Path, at: int | None, step: int
) -> None:
    trunk = make_trunk(tmp_path, data_dir, CONSTANT)
    decay = plan_decay(tmp_path / "trunk", "short", at, 3 * STEP_TOKENS - 1, "linear", 0.25)
    assert (decay.checkpoint.name, decay.at, decay.over) == (checkpoint_name(step), step * STEP_TOKENS, 3 * STEP_TOKENS)
    (tmp_path / "short.toml").write_text(decay.recipe)
    (tmp_path / "short.json").write_text(decay.deepspeed_config)
    recipe, config = load_recipe(str(tmp_path / "short.toml")), load_deepspeed_config(tmp_path / "short.json")
    plan = RunPlan(recipe)
    assert (recipe.name, plan.total_steps, recipe.model) == ("short", step + 3, trunk.recipe.model)
    schedule = make_schedule(config, tmp_path / "short.json", plan)
    rates = [schedule.ratio(planned.tokens_after) for planned in plan.steps(0)]
    assert rates[:step] == [trunk.schedule.ratio(planned.tokens_after) for planned in trunk.plan.steps(0)][:step]
    assert rates[step:] == pytest.approx([0.75, 0.5, 0.25])


STAGES = """
name = "trunk"
sequence_length = {T}
validation_samples = 4
[model]
vocab_size = 512
hidden_size = 64
intermediate_size = 176
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 128
rms_norm_eps = 1e-5
tie_word_embeddings = true
[[stages]]
tokens = {first}
global_batch_tokens = {batch}
weights = {{ slimpajama = 1 }}
[[stages]]
tokens = {second}
global_batch_tokens = {larger}
weights = {{ slimpajama = 1, starcoderdata = 1 }}
"""


def test_the_last_stage_that_was_begun_decays(data_dir: Path, tmp_path: Path) -> None:
    """In whole steps of the first batch, which the JSON counts, and of the last one."""
    batch = 4 * SEQUENCE_LENGTH
    sizes = {"T": SEQUENCE_LENGTH, "batch": batch, "larger": 2 * batch, "first": 5 * batch, "second": 20 * batch}
    trunk = make_trunk(tmp_path, data_dir, CONSTANT, STAGES.format(**sizes))
    decay = plan_decay(tmp_path / "trunk", "short", None, 3 * batch, "1-sqrt", 0.0)
    (tmp_path / "short.toml").write_text(decay.recipe)
    recipe = load_recipe(str(tmp_path / "short.toml"))
    assert [stage.tokens for stage in recipe.stages] == [5 * batch, 2 * batch + decay.over]
    assert (decay.over, recipe.model) == (4 * batch, trunk.recipe.model)
    assert json.loads(decay.deepspeed_config)["scheduler"]["params"]["num_decay_steps"] == 4


def test_a_rate_that_has_fallen_is_rejected(data_dir: Path, tmp_path: Path) -> None:
    cosine = {"type": "WarmupCosineLR", "params": CONSTANT["params"] | {"cos_min_ratio": 0.1}}  # type: ignore[operator]
    make_trunk(tmp_path, data_dir, cosine)
    with pytest.raises(
        ConfigError, match=f"step_00000006: the learning rate has fallen since {2 * STEP_TOKENS:,} tokens"
    ):
        plan_decay(tmp_path / "trunk", "short", None, STEP_TOKENS, "1-sqrt", 0.0)


def test_no_checkpoint_is_early_enough(data_dir: Path, tmp_path: Path) -> None:
    make_trunk(tmp_path, data_dir, CONSTANT)
    with pytest.raises(
        ConfigError, match=f"has no checkpoint of at most 5 tokens; expected one of {4 * STEP_TOKENS:,}, "
    ):
        plan_decay(tmp_path / "trunk", "short", 5, STEP_TOKENS, "1-sqrt", 0.0)


def test_a_file_of_a_different_decay_is_kept(tmp_path: Path) -> None:
    """By its values: a later version may write other comments."""
    write_once(tmp_path / "a.toml", "x = 1")
    write_once(tmp_path / "a.toml", "x = 1 # a comment")
    for other in ("x = 2", "x"):
        (tmp_path / "a.toml").write_text(other)
        with pytest.raises(ConfigError, match="a.toml: differs from what this command writes"):
            write_once(tmp_path / "a.toml", "x = 1")
        assert (tmp_path / "a.toml").read_text() == other
    write_once(tmp_path / "b.json", '{"x": 1}')
    write_once(tmp_path / "b.json", '{\n"x": 1}')
    assert (tmp_path / "b.json").read_text() == '{"x": 1}'
