"""What every rank does, from its environment to its exit code."""

import errno
import json
import os
import socket
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from tinyllama_ds.checkpoint.format import (
    Health,
    Progress,
    choose_checkpoint,
    read_manifest,
)
from tinyllama_ds.checkpoint.initial_weights import InitialWeights, fill_masters, fill_model
from tinyllama_ds.checkpoint.load import load_checkpoint
from tinyllama_ds.checkpoint.retention import Retention, sweep_leftovers
from tinyllama_ds.checkpoint.save import Saver, SaveSettings
from tinyllama_ds.config.deepspeed import weights_dtype
from tinyllama_ds.distributed.collectives import broadcast_from_rank0, gather_from_ranks
from tinyllama_ds.distributed.world import TURN_SECONDS, DistributedInfo, read_world, wait_for_the_end, wait_for_turn
from tinyllama_ds.errors import (
    EXIT_CONFIG,
    EXIT_FINISHED,
    EXIT_NUMERICS,
    EXIT_RESTART,
    EXIT_ROLLBACK,
    ConfigError,
    DataError,
    NumericsError,
    OutOfMemory,
)
from tinyllama_ds.fault_injection import maybe_inject_fault
from tinyllama_ds.files import SECRETS_FILE, parse_row, read_secret, write_object
from tinyllama_ds.health.guard import AnomalyGuard, Rollback
from tinyllama_ds.health.heartbeat import FIRST_STEP, LIFELINE_VARIABLE, STARTING, Heartbeat
from tinyllama_ds.health.probe import check_probe
from tinyllama_ds.layout import CHECKPOINTS, LEDGER_FILE, QUARANTINE, STATUS_FILE
from tinyllama_ds.model.attention import capability_of
from tinyllama_ds.model.determinism import use_deterministic_kernels
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model, empty_model
from tinyllama_ds.model.probe import Probe
from tinyllama_ds.run.branch import verify_parent
from tinyllama_ds.run.changes import Change
from tinyllama_ds.run.directory import (
    check_run_directory,
    open_run_directory,
    reject_different_history,
)
from tinyllama_ds.run.ledger import (
    ROLLED_BACK,
    Entry,
    forget_skips_after,
    record,
)
from tinyllama_ds.run.logs import log_to
from tinyllama_ds.run.metrics import MetricsLogger, peak_flops, peak_memory
from tinyllama_ds.run.resolve import Options, Run, resolve_run
from tinyllama_ds.run.sinks import warn
from tinyllama_ds.run.starts import record_start
from tinyllama_ds.train.compile import compile_blocks, decide_compilation
from tinyllama_ds.train.dry_run import EstimateMemory, dry_run_batch
from tinyllama_ds.train.engine import check_with_deepspeed, expect_steps, start_process_group, supports_fast_bf16, wrap
from tinyllama_ds.train.loop import train
from tinyllama_ds.train.reports import report_save
from tinyllama_ds.train.stop import StopRequest

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_CAUSE_SECONDS = 3  # the launcher looks at its ranks once a second


def pretrain(options: Options, estimate_memory: EstimateMemory) -> int:
    """Train until the plan is complete; returns the exit code. What all ranks have to say is printed once.

    `estimate_memory` is what `plan` knows, for the dry-run batch.
    """
    try:
        world = read_world()
    except ConfigError as config_error:
        return exit_before_start(config_error, options.run_dir)
    began = time.perf_counter()
    heartbeat = Heartbeat(world.rank, options.run_dir)
    try:
        take_over_secrets(options.run_dir)
        code = _pretrain(options, world, heartbeat, began, estimate_memory)
    except OutOfMemory as config_error:
        log_line(str(config_error))  # the other ranks wait in a collective
        code = EXIT_CONFIG
    except ConfigError as config_error:
        log_rank0(world, str(config_error))
        code = EXIT_CONFIG
    except DataError as bad:
        log_line(f"{bad}; audit the data before it goes on")
        code = EXIT_NUMERICS
    except NumericsError as bad:
        log_rank0(world, f"{bad}; nothing was saved since")
        code = EXIT_NUMERICS
    except KeyboardInterrupt:  # before the run heeds signals: nothing is lost
        code = EXIT_RESTART
    except BaseException as error:
        if is_out_of_memory(error):
            log_out_of_memory(options, world, heartbeat.phase)
            heartbeat.report_exit(EXIT_CONFIG)
            return EXIT_CONFIG
        heartbeat.fail(error)
        # Where another rank's end is the cause, the launcher has seen that one and ends this one now, unheard.
        wait_for_the_end(_CAUSE_SECONDS)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    heartbeat.report_exit(code)
    return code


def take_over_secrets(run_dir: Path) -> None:
    """Variables of a supervisor on another host that must not stand in a command line. Raises OSError."""
    if LIFELINE_VARIABLE not in os.environ:
        return
    with suppress(FileNotFoundError):
        os.environ |= parse_row(read_secret(run_dir / SECRETS_FILE)) or {}


def exit_before_start(error: ConfigError, run_dir: Path) -> int:
    """Of a rank that has no `DistributedInfo` yet: its host's first rank speaks, and the launcher ends the others."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        wait_for_the_end(TURN_SECONDS)
    Heartbeat(int(os.environ.get("RANK", "0")), run_dir).report_exit(EXIT_CONFIG)
    log_line(str(error))
    return EXIT_CONFIG


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, PyTorch's allocator of host memory, Python or the kernel had no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_of_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return is_of_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def log_out_of_memory(options: Options, world: DistributedInfo, phase: str) -> None:
    """By the rank that it happened to; the others wait for it in a collective."""
    log_line(
        f"rank {world.rank} on {socket.gethostname()} ran out of memory in {phase},"
        f" {peak_memory(world.device)} at the peak;"
        f" try a smaller train_micro_batch_size_per_gpu or another ZeRO stage in {options.deepspeed_config}, or"
        " --activation-checkpointing 1 (tinyllama-ds plan shows what fits); the last checkpoint stands"
    )


def log_rank0(world: DistributedInfo, sentence: str) -> None:
    """By rank 0, in place of all."""
    wait_for_turn(world)
    log_line(sentence)


def log_line(sentence: str) -> None:
    """Now, whatever the other ranks say."""
    print(f"tinyllama-ds: {sentence}", file=sys.stderr, flush=True)


def _pretrain(
    options: Options, world: DistributedInfo, heartbeat: Heartbeat, began: float, estimate_memory: EstimateMemory
) -> int:
    heartbeat.beat(0, STARTING)
    maybe_inject_fault("start", 0)
    run = _resolve(options, world)
    check_run_directory(run)
    os.umask(0o027)  # what others could write would not be loaded again
    terminal = log_to(run.run_dir, world.rank)
    start_process_group(world)
    check_with_deepspeed(run.engine_config, str(options.deepspeed_config))
    checkpoint = agree_on_checkpoint(run, world)
    manifest = read_manifest(checkpoint) if checkpoint else None
    start, health = (manifest.progress, manifest.health) if manifest else (Progress(0, 0, 0), Health())
    reject_different_history(run, start, health)
    if world.is_rank0:
        sweep_leftovers(run.run_dir)
    engine, compilation = start_engine(run, world, checkpoint, health.probe)
    if world.is_rank0:
        tell_changes(open_run_directory(run, start.step), run.allow_change)
        forget_skips_after(run.run_dir, start.step)
    # Of the ledger that all ranks have agreed on: a branch's own is written by rank 0 in this moment.
    guard = AnomalyGuard(run.recipe.guard, health.guard, run.rollbacks)
    hosts = gather_from_ranks(socket.gethostname())
    peak_flops(world.device, next(engine.module.parameters()).dtype, world.size)  # by all ranks, and known from here on
    metrics = None
    if world.is_rank0:
        metrics = _open_metrics(run, world, start, engine, compilation, terminal, began)
        record_start(run, start, metrics.reached, hosts)
    saver = Saver(save_settings(run), world, on_end=lambda save: report_save(metrics, save))
    if start.step < run.plan.total_steps:
        dry_run = dry_run_batch(engine, run, world, start, saver, estimate_memory)
        if metrics is not None:
            metrics.log_line(str(dry_run))
    expect_steps(world)
    heartbeat.beat(start.step, FIRST_STEP)
    try:
        progress = train(engine, run, world, start, guard, metrics, StopRequest(run.run_dir), heartbeat, saver)
    except NumericsError:
        saver.finish()  # what was copied before was good
        raise
    except Rollback as rollback:
        saver.finish()
        if metrics is not None:
            metrics.close()
        return roll_back(run, world, rollback)
    is_finished = progress.step == run.plan.total_steps
    if metrics is not None:
        metrics.close()
        write_status(run.run_dir, "finished" if is_finished else "stopped", progress)
    gather_from_ranks(None)  # no rank leaves before it is written: its exit code would end rank 0
    torch.distributed.destroy_process_group()
    return EXIT_FINISHED if is_finished else EXIT_RESTART


def save_settings(run: Run) -> SaveSettings:
    """How the recipe wants its checkpoints: every stage's last one stays, for variants to branch off."""
    intervals = run.recipe.intervals
    retention = Retention(intervals.keep_last, intervals.keep_tokens, run.plan.stage_ends)
    return SaveSettings(run.run_dir, retention, 60 * intervals.save_minutes, run.model, run.description)


def start_engine(
    run: Run, world: DistributedInfo, checkpoint: Path | None, probe: Probe | None
) -> "tuple[DeepSpeedEngine, str]":
    """The engine with the state that training begins with or goes on from, and how its blocks run. Collective."""
    initial = run.init_from if checkpoint is None else None
    model = build_initial_model(run, world, initial)
    is_compiled, compilation = decide_compilation(run.compile, world)
    if is_compiled:
        compile_blocks(model)
    engine = wrap(model, run.engine_config, run.schedule.ratio(0))
    if initial is not None:
        fill_masters(engine, initial)
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint)
        if probe is not None:
            check_probe(engine, run, world, probe, str(checkpoint))
    return engine, compilation


def _resolve(options: Options, world: DistributedInfo) -> Run:
    """The run on this rank's device, with the kernels that it asks for."""
    if options.deterministic:
        use_deterministic_kernels()
    bf16, capability = supports_fast_bf16(world.device), capability_of(world.device)
    return resolve_run(options, world.size, world.device.type, bf16, capability)


def tell_changes(changes: list[Change], allowed: tuple[str, ...]) -> None:
    """Say on the console what was allowed to change since the run last started, and which packages did."""
    packages = [change for change in changes if change.is_below("versions")]
    if packages:
        pairs = [f"{change.key.removeprefix('versions.')} {change.there} -> {change.now}" for change in packages]
        print(f"tinyllama-ds: warning: other packages than at the last start: {', '.join(pairs)}", file=sys.stderr)
    for change in changes:
        if any(change.is_below(key) for key in allowed):
            print(f"tinyllama-ds: allowed change: {change}", file=sys.stderr)
    sys.stderr.flush()


def roll_back(run: Run, world: DistributedInfo, rollback: Rollback) -> int:
    """Note in the ledger what the next process leaves out, and ask for it by the exit code. Collective."""
    if world.is_rank0:
        first, last = rollback.samples[0], rollback.samples[-1]
        record(run.run_dir, Entry(ROLLED_BACK, rollback.step, first, last, rollback.reason))
        write_status(run.run_dir, ROLLED_BACK, Progress(rollback.step, 0, 0))
        print(f"tinyllama-ds: rolled back at {rollback}", file=sys.stderr, flush=True)
    gather_from_ranks(None)  # no rank leaves before it is written: its exit code would end rank 0
    torch.distributed.destroy_process_group()
    return EXIT_ROLLBACK


def agree_on_checkpoint(run: Run, world: DistributedInfo) -> Path | None:
    """The newest checkpoint that verifies, else the parent's, found by rank 0; None for a fresh start. Collective."""
    name = broadcast_from_rank0(partial(_choose, run), world)
    gaps = [[gap.start, gap.stop] for gap in run.order.left_out]
    ledgers = gather_from_ranks([run.description.get("parent"), run.rollbacks, gaps])
    if any(ledger != ledgers[0] for ledger in ledgers):
        raise OSError(f"{run.run_dir / LEDGER_FILE}: the ranks read different ledgers; expected storage that all share")
    if name:
        return run.run_dir / CHECKPOINTS / name
    return Path(run.parent.checkpoint) if run.parent else None


def _choose(run: Run) -> str | None:
    """The name of the run's newest checkpoint that verifies; without one, its parent's has been verified."""
    choice = choose_checkpoint(run.run_dir)
    for damage in choice.damages:
        print(f"tinyllama-ds: moved to {QUARANTINE}: {damage}", file=sys.stderr, flush=True)
    if choice.checkpoint is not None:
        return choice.checkpoint.name
    if run.parent is not None:
        verify_parent(run.parent)
    return None


def build_initial_model(run: Run, world: DistributedInfo, initial: InitialWeights | None) -> LlamaForCausalLM:
    """The model before DeepSpeed has it: with stored weights, which rank 0 verifies, or random. Collective.

    It is made on the device and in the dtype that DeepSpeed would bring it to, so that the ranks of a host do not hold
    a model in fp32 each in its memory.
    """
    place = {"device": world.device, "dtype": getattr(torch, weights_dtype(run.engine_config))}
    if initial is None:
        return build_model(run.model, run.attention, run.recipe.seed, run.activation_checkpointing, **place)
    broadcast_from_rank0(initial.verify, world)
    model = empty_model(run.model, run.attention, run.activation_checkpointing, **place)
    fill_model(model, initial)
    return model


def _open_metrics(
    run: Run,
    world: DistributedInfo,
    start: Progress,
    engine: "DeepSpeedEngine",
    compilation: str,
    terminal: TextIO | None,
    began: float,
) -> MetricsLogger:
    description = json.dumps(run.description, indent=1)
    metrics = MetricsLogger(run.run_dir, run.monitors, run.plan.total_steps, start, description, terminal, began)
    dtype = next(engine.module.parameters()).dtype
    peak, origin = peak_flops(world.device, dtype, world.size)
    batch = run.plan.stages[0].batch
    metrics.log_line(
        f"{run.recipe.model}: {run.model.num_parameters:,} parameters in {str(dtype).removeprefix('torch.')} on"
        f" {world.size} x {world.device.type}, ZeRO-{engine.zero_optimization_stage()}, {run.kernels},"
        f" blocks {compilation}\n"
        f"{run.plan.total_steps:,} steps, {run.plan.total_tokens:,} tokens; a step is {batch} sequences of"
        f" {run.recipe.sequence_length} tokens in {batch // run.micro_batch // world.size} micro batches of"
        f" {run.micro_batch} on each rank\n"
        f"MFU = tokens/s x (6 x matmul parameters + 12 x layers x hidden x sequence) / peak;"
        f" peak {peak / 1e12:.2f} TFLOP/s per rank from {origin}"
    )
    if run.parent and start.step == run.parent.step:
        metrics.log_line(f"branched off at step {start.step:,} ({start.tokens:,} tokens) of {run.parent.checkpoint}")
    elif start.step:
        metrics.log_line(f"resumed at step {start.step:,} ({start.tokens:,} tokens)")
    elif run.init_from is not None:
        metrics.log_line(f"started from {run.init_from.path} (SHA-256 {run.init_from.sha256[:16]})")
    if metrics.reached > start.step and start.step == (run.parent.step if run.parent else 0):
        metrics.log_line(f"no checkpoint was saved: steps {start.step + 1:,} to {metrics.reached:,} are done again")
    write_status(run.run_dir, "running", start)
    for gap in run.order.left_out:
        metrics.log_line(f"samples {gap[0]} to {gap[-1]} are left out ({LEDGER_FILE})")
    return metrics


def write_status(run_dir: Path, state: str, progress: Progress) -> None:
    """What the run does, for the supervisor and for people. On a full disk it takes the place of the status before."""
    path, status = run_dir / STATUS_FILE, {"state": state, "step": progress.step, "tokens": progress.tokens}
    try:
        write_object(path, status)
    except OSError as error:
        try:
            with path.open("r+") as file:
                file.write(json.dumps(status))
                file.truncate()
        except OSError:
            warn(path, error)
