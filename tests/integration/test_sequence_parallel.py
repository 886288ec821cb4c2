"""Ranks that share sequences train as one rank: the same samples, losses and gradients, whatever else is chosen."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import conversations, prepare_chat, write_chat_recipe, write_records
from forked import on_ranks
from launching import BATCH, write_deepspeed_config, write_recipe

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.distributed.world import DistributedInfo, read_world
from tinyllama_ds.evaluation.validation import mean_losses, sample_losses
from tinyllama_ds.health.guard import all_reduce_step_status
from tinyllama_ds.health.probe import take_probe
from tinyllama_ds.run.resolve import Options, resolve_run
from tinyllama_ds.train.batches import count_targets, open_loader
from tinyllama_ds.train.engine import gather_full_params, hard_exit, set_learning_rate, start_process_group
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.setup import ResumePoint, start_engine
from tinyllama_ds.train.step import accumulate_gradients, apply_gradients

STEPS = 6


def train_all(settings: Path, sequence_parallel: int) -> None:
    """Rank 0 prints what each of the trainings has come to. Collective."""
    world = read_world()
    start_process_group(world)
    world = DistributedInfo(world.rank, world.local_rank, world.size, world.device, world.local_size, sequence_parallel)
    found = {}
    for name, setting in json.loads(settings.read_text()).items():
        with torch.compiler.set_stance("default", force_backend=setting["backend"]):
            found[name] = train(setting, world)
    if world.is_rank0:
        print(json.dumps(found))
    hard_exit(0)


def train(setting: dict[str, Any], world: DistributedInfo) -> dict[str, list[float]]:
    options = Options(
        **setting["options"] | {name: Path(setting["options"][name]) for name in ("deepspeed_config", "data", "run_dir")},
        sequence_parallel=world.sequence_parallel,
    )
    raw = json.loads(options.deepspeed_config.read_text())
    run = resolve_run(options, world.size, "cpu", bf16=False)
    engine, _ = start_engine(run, world, ResumePoint())
    batches, clock = open_loader(run, world, 0), PhaseClock(world.device)
    found: dict[str, list[float]] = {"digest": [], "loss": [], "norm": []}
    for step in run.plan.steps(0):
        set_learning_rate(engine, run.schedule.ratio(step.tokens_after))
        accumulation = step.batch // world.data_size // run.micro_batch
        loss = accumulate_gradients(engine, batches, accumulation, count_targets(run, step), world, clock)
        norm = apply_gradients(engine)
        status = all_reduce_step_status(False, False, False, batches.take_digest(), loss, norm)
        found["digest"].append(status.digest)
        found["loss"].append(status.loss)
        found["norm"].append(status.grad_norm)
    held_out = sample_losses(run.evaluation.validation, engine, sum_over_ranks, world, run.micro_batch)
    found["validation"] = list(mean_losses(held_out).values())
    found["probe"] = [take_probe(engine, run, world).loss]
    found["weights"] = [float(w.double().square().sum()) for w in gather_full_params(engine).values()]
    return found
