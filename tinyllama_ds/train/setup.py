"""From a resolved run to a trainer: the checkpoint to resume from, the engine with its state, and the logs."""

import json
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from tinyllama_ds.checkpoint.format import Health, Progress, choose_checkpoint, read_manifest
from tinyllama_ds.checkpoint.initial_weights import InitialWeights, fill_masters, fill_model
from tinyllama_ds.checkpoint.load import load_checkpoint
from tinyllama_ds.checkpoint.retention import sweep_leftovers
from tinyllama_ds.config.deepspeed import weights_dtype
from tinyllama_ds.config.run_plan import accumulation_steps
from tinyllama_ds.distributed.collectives import broadcast_from_rank0, gather_from_ranks
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import log
from tinyllama_ds.health.heartbeat import Heartbeat
from tinyllama_ds.health.probe import check_probe
from tinyllama_ds.layout import CHECKPOINTS, LEDGER_FILE, QUARANTINE
from tinyllama_ds.model.distillation import distillation_of
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model, empty_model
from tinyllama_ds.run.console import Console
from tinyllama_ds.run.directory import open_run_directory, reject_different_history
from tinyllama_ds.run.identity import Change, verify_parent
from tinyllama_ds.run.ledger import forget_skips_after
from tinyllama_ds.run.metrics import MetricsLogger, NoMetrics
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.run.run_file import write_status
from tinyllama_ds.run.starts import record_start
from tinyllama_ds.train.callbacks.registry import register_callbacks
from tinyllama_ds.train.compile import compile_blocks, decide_compilation
from tinyllama_ds.train.engine import sequence_parallel_group, wrap
from tinyllama_ds.train.trainer import Outputs, Trainer
from tinyllama_ds.train.utilization import peak_flops

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class ResumePoint:
    """Where training begins: a checkpoint of the run or of its parent, or step 0."""

    checkpoint: Path | None = None
    progress: Progress = Progress(0, 0, 0)
    health: Health = Health()


def build_trainer(run: Run, world: DistributedInfo, heartbeat: Heartbeat, terminal: TextIO | None) -> Trainer:
    """The trainer of a run in its directory, after every check has passed. Collective."""
    point = find_resume_point(run, world)
    reject_different_history(run, point.progress, point.health)
    if world.is_rank0:
        sweep_leftovers(run.run_dir)
    engine, compilation = start_engine(run, world, point)
    if world.is_rank0:
        print_changes(open_run_directory(run, point.progress.step), run.options.allow_change)
        forget_skips_after(run.run_dir, point.progress.step)
    hosts = gather_from_ranks(socket.gethostname())
    # Measured by all ranks together the first time, and cached.
    peak_flops(world.device, next(engine.module.parameters()).dtype, world.size)
    console = Console(run.plan.total_steps, point.progress.step, terminal, is_silent=not world.is_rank0)
    outputs = Outputs(NoMetrics(), console)
    if world.is_rank0:
        metrics = MetricsLogger(
            run.run_dir, run.monitors, point.progress, json.dumps(run.description, indent=1), heartbeat.began
        )
        outputs = Outputs(metrics, console)
        console.log_line(describe_run(run, world, engine, compilation))
        for line in describe_start(run, point.progress, metrics.last_logged_step):
            console.log_line(line)
        write_status(run.run_dir, "running", point.progress)
        record_start(run, point.progress, metrics.last_logged_step, hosts)
    trainer = Trainer(engine, run, world, (point.progress, point.health), outputs, heartbeat)
    register_callbacks(trainer)
    return trainer


def find_resume_point(run: Run, world: DistributedInfo) -> ResumePoint:
    """The newest checkpoint that verifies, else the parent's, found by rank 0; else step 0. Collective."""
    name = broadcast_from_rank0(partial(_choose, run), world)
    gaps = [[gap.start, gap.stop] for gap in run.data.order.excluded_samples]
    ledgers = gather_from_ranks([run.description.get("parent"), run.rollbacks, gaps])
    if any(ledger != ledgers[0] for ledger in ledgers):
        raise OSError(f"{run.run_dir / LEDGER_FILE}: the ranks read different ledgers; expected storage that all share")
    if name:
        checkpoint = run.run_dir / CHECKPOINTS / name
    elif run.parent:
        checkpoint = Path(run.parent.checkpoint)
    else:
        return ResumePoint()
    manifest = read_manifest(checkpoint)
    return ResumePoint(checkpoint, manifest.progress, manifest.health)


def _choose(run: Run) -> str | None:
    """The name of the run's newest checkpoint that verifies; without one, its parent's has been verified."""
    choice = choose_checkpoint(run.run_dir)
    for damage in choice.damages:
        log(f"moved to {QUARANTINE}: {damage}")
    if choice.checkpoint is not None:
        return choice.checkpoint.name
    if run.parent is not None:
        verify_parent(run.parent)
    return None


def start_engine(run: Run, world: DistributedInfo, point: ResumePoint) -> "tuple[DeepSpeedEngine, str]":
    """The engine with the state that training begins with or resumes from, and how it is compiled. Collective."""
    initial = run.init_from if point.checkpoint is None else None
    model = build_initial_model(run, world, initial)
    if run.recipe.teacher is not None:
        model.lm_head.distillation_and_grad = distillation_of(run.recipe.teacher.weight, run.recipe.teacher.temperature)
    if world.sequence_parallel > 1:
        model.split_sequences(sequence_parallel_group(world))
    is_compiled, compilation = decide_compilation(run.options.compile, world)
    if is_compiled:
        compile_blocks(model)
    engine = wrap(model, run.engine_config, run.schedule.ratio(0))
    if initial is not None:
        fill_masters(engine, initial)
    if point.checkpoint is not None:
        load_checkpoint(engine, point.checkpoint)
        if point.health.probe is not None:
            check_probe(engine, run, world, point.health.probe, str(point.checkpoint))
    return engine, compilation


def build_initial_model(run: Run, world: DistributedInfo, initial: InitialWeights | None) -> LlamaForCausalLM:
    """The model before DeepSpeed wraps it: with stored weights, which rank 0 verifies, or random. Collective.

    It is made on the device and in the dtype to which DeepSpeed would convert it, so that the ranks of a host do not
    each hold a model in fp32 in its memory.
    """
    place = {"device": world.device, "dtype": getattr(torch, weights_dtype(run.engine_config))}
    attention, recompute_every = run.attention.backend, run.options.activation_checkpointing
    if initial is None:
        return build_model(run.model, attention, run.recipe.seed, recompute_every, **place)
    broadcast_from_rank0(initial.verify, world)
    model = empty_model(run.model, attention, recompute_every, **place)
    fill_model(model, initial)
    return model


def print_changes(changes: list[Change], allowed: tuple[str, ...]) -> None:
    """Print which packages have changed since the run last started, and which changes were allowed."""
    packages = [change for change in changes if change.is_below("versions")]
    if packages:
        pairs = [f"{change.key.removeprefix('versions.')} {change.there} -> {change.now}" for change in packages]
        log(f"warning: package versions differ from the last start: {', '.join(pairs)}")
    for change in changes:
        if any(change.is_below(key) for key in allowed):
            log(f"allowed change: {change}")


def describe_run(run: Run, world: DistributedInfo, engine: "DeepSpeedEngine", compilation: str) -> str:
    """Model, layout, plan and the definition of MFU, in three lines."""
    dtype = next(engine.module.parameters()).dtype
    peak, origin = peak_flops(world.device, dtype, world.size)
    batch = run.plan.stages[0].batch
    accumulation = accumulation_steps(batch, world.data_size, run.micro_batch)
    padding = run.model.vocab_size - run.data.tokenizer.vocab_size
    padded = f" ({padding} rows of the vocabulary are padding, which no text uses)" if padding else ""
    each = f"each group of {world.sequence_parallel} ranks" if world.sequence_parallel > 1 else "each rank"
    mup = f", muP ({run.model.width_multiplier:g} times its base's width)" if run.model.mup else ""
    return (
        f"{run.recipe.model_name}: {run.model.num_parameters:,} parameters{padded} in"
        f" {str(dtype).removeprefix('torch.')} on {world.size} x {world.device.type},"
        f" ZeRO-{engine.zero_optimization_stage()}{mup}, {run.kernels}, torch.compile: {compilation}\n"
        f"{run.plan.total_steps:,} steps, {run.plan.total_tokens:,} tokens; a step is {batch} sequences of"
        f" {run.recipe.sequence_length} tokens in {accumulation} micro-batch{'es' if accumulation > 1 else ''} of"
        f" {run.micro_batch} on {each}\n"
        f"MFU = tokens/s x (6 x matmul parameters + 12 x layers x heads x head size x sequence) / peak;"
        f" peak {peak / 1e12:.2f} TFLOP/s per rank from {origin}"
    )


def describe_start(run: Run, start: Progress, last_logged_step: int) -> list[str]:
    """Where training begins, and what is repeated or excluded."""
    lines = []
    if run.parent and start.step == run.parent.step:
        lines.append(f"branched off at step {start.step:,} ({start.tokens:,} tokens) of {run.parent.checkpoint}")
    elif start.step:
        lines.append(f"resumed at step {start.step:,} ({start.tokens:,} tokens)")
    elif run.init_from is not None:
        changes = f": {run.init_from.changes}" if run.init_from.changes else ""
        lines.append(f"started from {run.init_from.path} (SHA-256 {run.init_from.sha256[:16]}){changes}")
    if last_logged_step > start.step and start.step == run.first_step:
        lines.append(f"no checkpoint was saved: steps {start.step + 1:,} to {last_logged_step:,} are repeated")
    excluded = [
        f"samples {gap[0]} to {gap[-1]} are excluded ({LEDGER_FILE})" for gap in run.data.order.excluded_samples
    ]
    return lines + excluded
