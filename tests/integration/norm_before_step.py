"""One rank: the gradient norm that `gradient_norm` gives before each step, beside the one that DeepSpeed's step gives.

usage: norm_before_step.py RECIPE DEEPSPEED_CONFIG DATA RUN_DIR, prints a JSON list of both for every step.
"""

import json
import sys
from pathlib import Path

from tinyllama_ds.model.llama import build_model
from tinyllama_ds.training.batches import count_targets, micro_batches
from tinyllama_ds.training.engine import drop_gradients, gradient_norm, leave, start_process_group, wrap
from tinyllama_ds.training.metrics import PhaseClock
from tinyllama_ds.training.run import Options, resolve_run
from tinyllama_ds.training.step import accumulate_gradients, apply_gradients
from tinyllama_ds.training.world import read_world

DROPPED = 2


def main(recipe: str, config: str, data: str, run_dir: str) -> None:
    world = read_world()
    run = resolve_run(Options(recipe, Path(config), Path(data), Path(run_dir)), 1, "cpu", bf16=True)
    start_process_group(world)
    engine = wrap(build_model(run.model, "sdpa", run.recipe.seed), run.engine_config, run.schedule.ratio(0))
    batches, clock = micro_batches(run, world, 0), PhaseClock(world.device)
    norms = []
    for step in run.plan.steps(0):
        accumulate_gradients(engine, step, batches, run.micro_batch, count_targets(run, step), world, clock)
        before = float(gradient_norm(engine))
        if step.number == DROPPED:
            drop_gradients(engine)
        else:
            norms.append([before, float(apply_gradients(engine, step))])
    print(json.dumps(norms))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
