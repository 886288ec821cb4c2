"""A finished model from any kept checkpoint of a run with a constant learning rate: the branch that decays."""

import json
import tomllib
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

from tinyllama_ds.checkpoint.format import MANIFEST_FILE, CheckpointManifest, read_manifest
from tinyllama_ds.config.new_recipe import Draft, model_keys, recipe_text
from tinyllama_ds.config.recipe import Recipe, Stage, recipe_of_run
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.schedule import schedule_of_run
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.convert import hf_config
from tinyllama_ds.layout import RUN_FILE
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.outputs import write_file
from tinyllama_ds.run.identity import kept_checkpoints, reading_description

# The recipe decides them.
_AUTO = ("train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Decay:
    """A branch: where it begins, and what it is trained with."""

    checkpoint: Path
    at: int  # tokens
    over: int  # tokens, whole steps
    recipe: str  # TOML
    deepspeed_config: str  # JSON


def plan_decay(run: Path, name: str, at: int | None, over: int, shape: str, min_ratio: float) -> Decay:
    """The decay of a run, or of the checkpoint given, over so many tokens: from its newest one of at most `at` tokens.

    The last stage that was begun becomes as long as the branch. Raises `ConfigError` where there is no such
    checkpoint, or where its learning rate has begun to fall.
    """
    checkpoint = _newest(run, at)
    manifest = read_manifest(checkpoint)
    with reading_description(checkpoint / MANIFEST_FILE):
        trunk, tokens = recipe_of_run(manifest.run), manifest.progress.tokens
        begun, batch = _begun_stages(trunk, manifest.progress.step)
    first = trunk.stages[0].global_batch_tokens
    unit = batch * first // gcd(batch, first)  # whole steps of the first stage and of the last one
    over = -(-over // unit) * unit
    stages = (*begun[:-1], replace(begun[-1], tokens=begun[-1].tokens + over))
    recipe = replace(trunk, name=name, stages=stages)
    config = _config(checkpoint, manifest, {
        "num_training_steps": "auto", "num_decay_steps": over // first, "decay_type": shape, "min_lr_ratio": min_ratio,
    })  # fmt: skip
    text = recipe_text(Draft(name, model_of_recipe(recipe), recipe.sequence_length, recipe))
    return Decay(checkpoint, tokens, over, text, json.dumps(config, indent=2) + "\n")


def _newest(run: Path, at: int | None) -> Path:
    kept = kept_checkpoints(run)
    before = [path for tokens, path in kept.items() if at is None or tokens <= at]
    if not before:
        listed = ", ".join(f"{tokens:,}" for tokens in kept)
        raise ConfigError(f"{run}: has no checkpoint of at most {at:,} tokens; expected one of {listed} tokens or more")
    return before[-1]


def _begun_stages(recipe: Recipe, step: int) -> tuple[list[Stage], int]:
    """The stages of the first `step` steps, each with the tokens of these, and the batch of the last one in tokens."""
    begun = [
        replace(stage, tokens=steps * stage.global_batch_tokens)
        for stage, steps in zip(recipe.stages, RunPlan(recipe).begun(step), strict=False)
    ]
    return begun, begun[-1].global_batch_tokens


def _config(checkpoint: Path, manifest: CheckpointManifest, decay: dict) -> dict:
    """The run's DeepSpeed JSON with the same learning rates up to the checkpoint, and then the decay."""
    with reading_description(checkpoint / MANIFEST_FILE):
        schedule, tokens = schedule_of_run(manifest.run), manifest.progress.tokens
    past = schedule.until(tokens)
    if past.decays:
        raise ConfigError(
            f"{checkpoint}: the learning rate has fallen since {past.decays[-1][0]:,} tokens; expected a checkpoint"
            " before, of a run with a constant one (WarmupLR, warmup_stable_decay)"
        )
    first_batch = manifest.run["recipe"]["stages"][0]["global_batch_tokens"]
    warmup = {"num_warmup_steps": past.warmup_tokens // first_batch, "warmup_min_ratio": past.warmup_min_ratio}
    config = manifest.run["deepspeed_config"] | dict.fromkeys(_AUTO, "auto")
    return config | {"scheduler": {"type": "warmup_stable_decay", "params": warmup | decay}}


def model_of_recipe(recipe: Recipe) -> str | dict:
    """As a recipe has it: a name, or keys of Hugging Face's config.json."""
    import torch

    if recipe.model_name in MODEL_SIZES:
        return recipe.model_name
    return model_keys(hf_config(recipe.model, torch.float32).to_dict())


def write_once(path: Path, text: str) -> None:
    """Write a TOML or JSON file that a command may write again; one with the same values is kept, as is its text.

    Raises `ConfigError` where it has different values.
    """
    if not path.exists():
        write_file(path, text)
        return
    parse = tomllib.loads if path.suffix == ".toml" else json.loads
    try:
        is_same = parse(path.read_text()) == parse(text)
    except ValueError:
        is_same = False
    if not is_same:
        raise ConfigError(
            f"{path}: differs from what this command writes; choose another --run-dir, or remove {path} and {RUN_FILE}"
        )
