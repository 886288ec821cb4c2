"""Two ranks with equal weights, of which one then changes a copy: `check_parameters` finds it, and names it.

usage: on two ranks, drift_apart.py RECIPE DEEPSPEED_CONFIG DATA RUN_DIR
"""

import sys
from pathlib import Path

import torch

from tinyllama_ds.errors import BadNumbers
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.training.engine import leave, start_process_group, wrap
from tinyllama_ds.training.guard import check_parameters
from tinyllama_ds.training.run import Options, resolve_run
from tinyllama_ds.training.world import read_world


def main(recipe: str, config: str, data: str, run_dir: str) -> None:
    world = read_world()
    run = resolve_run(Options(recipe, Path(config), Path(data), Path(run_dir)), world.size, "cpu", bf16=True)
    start_process_group(world)
    engine = wrap(build_model(run.model, "sdpa", run.recipe.seed), run.engine_config, run.schedule.ratio(0))
    check_parameters(engine)
    if world.rank == 1:
        weight = engine.module.model.norm.weight.data
        weight[0] = torch.nextafter(weight[0], torch.zeros_like(weight[0]))  # the least drift there is
    try:
        check_parameters(engine)
    except BadNumbers as bad:
        print(f"equal, then: {bad}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
