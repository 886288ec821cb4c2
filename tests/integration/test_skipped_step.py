"""A step that DeepSpeed skips changes no weight, and the schedule goes on in tokens as if it had not happened."""

from pathlib import Path

import pytest
import torch
from forked import on_ranks
from launching import write_deepspeed_config, write_recipe

from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.run.resolve import Options, resolve_run
from tinyllama_ds.train.batches import micro_batches
from tinyllama_ds.train.engine import hard_exit, set_learning_rate, start_process_group, wrap
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import train_step

POISONED = 3


def skip_one_step(recipe: Path, config: Path, data: Path, run_dir: Path) -> None:
    """The loss of one step is poisoned; asserts what must hold before, at and after it."""
    world = read_world()
    run = resolve_run(Options(str(recipe), config, data, run_dir), 1, "cpu", bf16=True)
    start_process_group(world)
    model = build_model(run.model, "sdpa", run.recipe.seed)
    engine = wrap(model, run.engine_config, run.schedule.ratio(0))
    batches = micro_batches(run, world, 0)
    for step in run.plan.steps(0):
        poison = float("nan") if step.number == POISONED else 1.0
        handle = engine.module.lm_head.register_forward_hook(lambda module, inputs, loss, p=poison: loss * p)
        rate = set_learning_rate(engine, run.schedule.ratio(step.tokens_after))
        assert rate == 3e-3 * run.schedule.ratio((step.number + 1) * step.batch * 32), step
        before = [group.clone() for group in master_weights(engine)]
        train_step(engine, step, batches, run.micro_batch, world, PhaseClock(world.device))
        changed = any(not torch.equal(old, new) for old, new in zip(before, master_weights(engine), strict=True))
        assert changed == (step.number != POISONED), step
        handle.remove()
    print("skipped", engine.skipped_steps)
    hard_exit(0)


def master_weights(engine) -> list[torch.Tensor]:
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise AssertionError(f"no fp32 masters in {type(optimizer).__name__}")


@pytest.mark.parametrize("stage", [1, 3])
def test_learning_rate_survives_a_skipped_step(stage: int, data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", 12, save_every=12)
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=8, bf16={"enabled": True})
    finished = on_ranks(skip_one_step, recipe, config, data_dir, tmp_path / "run", ranks=1)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "skipped 1" in finished.stdout
