"""The planned memory of a run that has started, and the alternatives that need less."""

from dataclasses import replace
from pathlib import Path

import pytest
from launching import write_recipe

from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.hardware.gpus import GIB, gpu_named
from tinyllama_ds.model.attention import AttentionChoice
from tinyllama_ds.model.config import model_config
from tinyllama_ds.planning.fit import estimate_memory
from tinyllama_ds.run.resolve import Options, Run, resolve_run

CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero3_keep.json"


@pytest.fixture
def run(data_dir: Path, tmp_path: Path) -> Run:
    """TinyLlama-1.1B with 8 rows of 2,048 tokens on one GPU: a small run with its shapes."""
    recipe = write_recipe(tmp_path / "r.toml", 2001, save_every=1000)
    small = resolve_run(Options(str(recipe), CONFIG, data_dir, tmp_path / "run"), 1, "cuda", bf16=True)
    larger = replace(small.recipe, sequence_length=2048)
    return replace(small, model=model_config("tinyllama-1.1b"), recipe=larger, attention=AttentionChoice("sdpa"))


def test_it_is_what_plan_counts(run: Run) -> None:
    """20 bytes of state per parameter on one GPU, and the activations of 16k tokens."""
    estimate = estimate_memory(run, 1, True, gpu_named("h100").memory_bytes)
    states = 20 * run.model.num_parameters
    assert states < estimate.bytes < states + 25 * GIB


def test_alternatives_need_less_and_fit(run: Run) -> None:
    gpu = 30 * GIB
    estimate = estimate_memory(run, 1, True, gpu)
    assert estimate.bytes > gpu
    first = estimate.alternatives.split(" or ")[0]
    assert first.startswith("micro-batch 8, --activation-checkpointing")
    assert float(first.split("(")[1].split()[0]) * GIB < gpu


def test_alternatives_divide_the_batch_of_every_stage(run: Run) -> None:
    """8 and 12 sequences per step: 8 rows divide the first alone."""
    first = run.recipe.stages[0]
    second = replace(first, name="second", global_batch_tokens=12 * 32)
    plan = RunPlan(replace(run.recipe, sequence_length=32, stages=(first, second)))
    estimate = estimate_memory(replace(run, plan=plan), 1, True, 30 * GIB)
    assert estimate.alternatives.startswith("micro-batch 4")


def test_where_nothing_fits_a_different_zero_config_is_named(run: Run) -> None:
    assert "a different ZeRO config" in estimate_memory(run, 1, True, 10 * GIB).alternatives
