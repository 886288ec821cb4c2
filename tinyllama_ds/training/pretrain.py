"""What every rank does, from its environment to its exit code."""

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.errors import EXIT_FINISHED, EXIT_NUMERICS, EXIT_REFUSED, EXIT_RESTART, BadNumbers, Refusal
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.training.checkpoint import CHECKPOINTS, QUARANTINE, Progress, choose_checkpoint, load_checkpoint
from tinyllama_ds.training.compilation import compile_blocks, decide_compilation
from tinyllama_ds.training.engine import (
    World,
    check_with_deepspeed,
    gather_from_ranks,
    read_world,
    start_process_group,
    supports_fast_bf16,
    wrap,
)
from tinyllama_ds.training.heartbeat import Heartbeat
from tinyllama_ds.training.loop import train
from tinyllama_ds.training.metrics import MetricsLogger, peak_flops
from tinyllama_ds.training.run import (
    STATUS_FILE,
    Options,
    Run,
    check_run_directory,
    open_run_directory,
    resolve_run,
    write_json,
)
from tinyllama_ds.training.saving import sweep_leftovers
from tinyllama_ds.training.stop import StopRequest

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def pretrain(options: Options) -> int:
    """Train until the plan is complete; returns the exit code. A refusal is printed once, by rank 0."""
    world = read_world()
    try:
        return _pretrain(options, world)
    except Refusal as refusal:
        if world.is_main:
            print(f"tinyllama-ds: {refusal}", file=sys.stderr, flush=True)
        return EXIT_REFUSED
    except BadNumbers as bad:
        if world.is_main:
            print(f"tinyllama-ds: {bad}; nothing was saved since", file=sys.stderr, flush=True)
        return EXIT_NUMERICS
    except BaseException:
        # The other ranks wait in a collective for this one: leave at once, so that the launcher can end them.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _pretrain(options: Options, world: World) -> int:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    heartbeat = Heartbeat(world.rank)
    heartbeat.beat(0, "starting")
    run = resolve_run(options, world.size, world.device.type, supports_fast_bf16(world.device))
    check_run_directory(run)
    os.umask(0o027)  # what others could write would not be loaded again
    start_process_group(world)
    check_with_deepspeed(run.engine_config, str(options.deepspeed_config))
    checkpoint = agree_on_checkpoint(run, world)
    if world.is_main:
        open_run_directory(run)
        sweep_leftovers(run.run_dir)
    model = build_model(run.model, run.attention, run.recipe.seed, run.activation_checkpointing)
    is_compiled, compilation = decide_compilation(run.compile, world)
    if is_compiled:
        compile_blocks(model)
    engine = wrap(model, run.engine_config, run.schedule.ratio(0))
    start = Progress(step=0, position=0, tokens=0)
    if checkpoint is not None:
        start = load_checkpoint(engine, checkpoint, run.description["deepspeed_config"]["zero_optimization"])
    metrics = _open_metrics(run, world, start, engine, compilation) if world.is_main else None
    progress = train(engine, run, world, start, metrics, StopRequest(run.run_dir), heartbeat)
    is_finished = progress.step == run.plan.total_steps
    if metrics is not None:
        metrics.close()
        state = "finished" if is_finished else "stopped"
        write_json(run.run_dir / STATUS_FILE, {"state": state, "step": progress.step, "tokens": progress.tokens})
    torch.distributed.destroy_process_group()
    return EXIT_FINISHED if is_finished else EXIT_RESTART


def agree_on_checkpoint(run: Run, world: World) -> Path | None:
    """The newest checkpoint that verifies, found by rank 0; None for a fresh start. Collective."""
    answer: dict[str, str | None] = {}
    if world.is_main:
        try:
            choice = choose_checkpoint(run.run_dir)
            for damage in choice.damages:
                print(f"tinyllama-ds: moved to {QUARANTINE}: {damage}", file=sys.stderr, flush=True)
            answer = {"name": choice.checkpoint.name if choice.checkpoint else None}
        except Refusal as refusal:
            answer = {"refusal": str(refusal)}
    answer = gather_from_ranks(answer)[0]
    if "refusal" in answer:
        raise Refusal(answer["refusal"])
    return run.run_dir / CHECKPOINTS / answer["name"] if answer["name"] else None


def _open_metrics(
    run: Run, world: World, start: Progress, engine: "DeepSpeedEngine", compilation: str
) -> MetricsLogger:
    metrics = MetricsLogger(
        run.run_dir, run.monitors, run.plan.total_steps, start, json.dumps(run.description, indent=1)
    )
    dtype = next(engine.module.parameters()).dtype
    peak, origin = peak_flops(world.device, dtype)
    batch = run.plan.stages[0].batch
    metrics.say(
        f"{run.recipe.model}: {run.model.num_parameters:,} parameters in {str(dtype).removeprefix('torch.')} on"
        f" {world.size} x {world.device.type}, ZeRO-{engine.zero_optimization_stage()}, attention {run.attention},"
        f" blocks {compilation}\n"
        f"{run.plan.total_steps:,} steps, {run.plan.total_tokens:,} tokens; a step is {batch} sequences of"
        f" {run.recipe.sequence_length} tokens in {batch // run.micro_batch // world.size} micro batches of"
        f" {run.micro_batch} on each rank\n"
        f"MFU = tokens/s x (6 x matmul parameters + 12 x layers x hidden x sequence) / peak;"
        f" peak {peak / 1e12:.2f} TFLOP/s per rank from {origin}"
    )
    if start.step:
        metrics.say(f"resumed at step {start.step:,} ({start.tokens:,} tokens)")
    write_json(run.run_dir / STATUS_FILE, {"state": "running", "step": start.step, "tokens": start.tokens})
    return metrics
