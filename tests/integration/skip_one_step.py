"""Train a small model on one rank and poison the loss of step 3; asserts what must hold before, at and after it.

usage: skip_one_step.py RECIPE DEEPSPEED_CONFIG DATA RUN_DIR
"""

import sys
from pathlib import Path

import torch

from tinyllama_ds.model.llama import build_model
from tinyllama_ds.training.batches import micro_batches
from tinyllama_ds.training.engine import leave, set_learning_rate, start_process_group, wrap
from tinyllama_ds.training.metrics import PhaseClock
from tinyllama_ds.training.run import Options, resolve_run
from tinyllama_ds.training.step import train_step
from tinyllama_ds.training.world import read_world

POISONED = 3


def main(recipe: str, config: str, data: str, run_dir: str) -> None:
    world = read_world()
    run = resolve_run(Options(recipe, Path(config), Path(data), Path(run_dir)), 1, "cpu", bf16=True)
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


def master_weights(engine) -> list[torch.Tensor]:
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise AssertionError(f"no fp32 masters in {type(optimizer).__name__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
