"""What every rank does, from its environment to its exit code."""

import errno
import os
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from tinyllama_ds import fault_injection
from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.distributed.collectives import gather_from_ranks
from tinyllama_ds.distributed.world import (
    TURN_SECONDS,
    DistributedInfo,
    read_world,
    wait_for_termination,
    wait_for_turn,
)
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
    log,
)
from tinyllama_ds.files import SECRETS_FILE, parse_row, read_secret
from tinyllama_ds.health.guard import Rollback
from tinyllama_ds.health.heartbeat import Heartbeat
from tinyllama_ds.layout import FIRST_STEP, LIFELINE_VARIABLE, STARTING
from tinyllama_ds.model.attention import capability_of
from tinyllama_ds.model.determinism import use_deterministic_kernels
from tinyllama_ds.run.console import log_to
from tinyllama_ds.run.directory import check_run_directory
from tinyllama_ds.run.ledger import ROLLED_BACK, Entry, record
from tinyllama_ds.run.resolve import Options, Run, resolve_run
from tinyllama_ds.run.run_file import write_status
from tinyllama_ds.train.dry_run import EstimateMemory, dry_run_batch
from tinyllama_ds.train.engine import check_with_deepspeed, expect_steps, start_process_group, supports_fast_bf16
from tinyllama_ds.train.setup import build_trainer
from tinyllama_ds.train.trainer import Trainer
from tinyllama_ds.train.utilization import peak_memory

_CAUSE_SECONDS = 3  # the launcher polls its ranks once a second


def pretrain(options: Options, estimate_memory: EstimateMemory) -> int:
    """Train until the plan is complete; returns the exit code. Errors of all ranks are printed once.

    `estimate_memory` is the estimate of `plan`, for the dry-run batch.
    """
    try:
        fault_injection.install()
        world = replace(read_world(), sequence_parallel=options.sequence_parallel)
    except ConfigError as error:
        return exit_before_start(error, options.run_dir)
    heartbeat = Heartbeat(world.rank, options.run_dir)
    try:
        read_secrets(options.run_dir)
        code = run_training(options, world, heartbeat, estimate_memory)
    except OutOfMemory as error:
        log(error)  # the other ranks wait in a collective
        code = EXIT_CONFIG
    except ConfigError as error:
        log_rank0(world, str(error))
        code = EXIT_CONFIG
    except DataError as error:
        log(f"{error}; audit the data before training continues")
        code = EXIT_NUMERICS
    except NumericsError as error:
        log_rank0(world, f"{error}; nothing was saved since")
        code = EXIT_NUMERICS
    except KeyboardInterrupt:  # before signals are stop requests: nothing is lost
        code = EXIT_RESTART
    except BaseException as error:
        if not is_out_of_memory(error):
            crash(error, heartbeat)
        log_out_of_memory(options, world, heartbeat.phase)
        code = EXIT_CONFIG
    heartbeat.report_exit(code)
    return code


def run_training(
    options: Options, world: DistributedInfo, heartbeat: Heartbeat, estimate_memory: EstimateMemory
) -> int:
    """Resolve the run, build its trainer, train; returns the exit code. Collective."""
    heartbeat.beat(0, STARTING)
    run = resolve(options, world)
    check_run_directory(run)
    os.umask(0o027)  # what others could write would not be loaded again
    terminal = log_to(run.run_dir, world.rank)
    start_process_group(world)
    check_with_deepspeed(run.engine_config, str(options.deepspeed_config))
    trainer = build_trainer(run, world, heartbeat, terminal)
    if trainer.start.step < run.plan.total_steps:
        trainer.console.log_line(dry_run_batch(trainer, estimate_memory))
    expect_steps(world)
    heartbeat.beat(trainer.start.step, FIRST_STEP)
    try:
        progress = trainer.train()
    except NumericsError:
        trainer.saver.finish()  # what was copied before was good
        raise
    except Rollback as rollback:
        trainer.saver.finish()
        return end(trainer, Progress(rollback.step, 0, 0), rollback)
    return end(trainer, progress)


def resolve(options: Options, world: DistributedInfo) -> Run:
    """The run on this rank's device, and with `--deterministic` PyTorch's deterministic kernels."""
    if options.deterministic:
        use_deterministic_kernels()
    bf16, capability = supports_fast_bf16(world.device), capability_of(world.device)
    return resolve_run(options, world.size, world.device.type, bf16, capability)


def end(trainer: Trainer, progress: Progress, rollback: Rollback | None = None) -> int:
    """Close the logs and write the status, after a rollback with an entry in the ledger; the exit code. Collective."""
    run, is_finished = trainer.run, progress.step == trainer.run.plan.total_steps and rollback is None
    trainer.console.close()
    trainer.metrics.close()
    if trainer.world.is_rank0:
        if rollback is not None:
            first, last = rollback.samples[0], rollback.samples[-1]
            record(run.run_dir, Entry(ROLLED_BACK, rollback.step, first, last, rollback.reason))
            log(f"rolled back at {rollback}")
        state = ROLLED_BACK if rollback else "finished" if is_finished else "stopped"
        write_status(run.run_dir, state, progress)
    gather_from_ranks(None)  # the exit of the first rank ends rank 0: none before all is written
    torch.distributed.destroy_process_group()
    return EXIT_ROLLBACK if rollback else EXIT_FINISHED if is_finished else EXIT_RESTART


def read_secrets(run_dir: Path) -> None:
    """Variables of a supervisor on another host that must not be on a command line. Raises OSError."""
    if LIFELINE_VARIABLE not in os.environ:
        return
    with suppress(FileNotFoundError):
        os.environ |= parse_row(read_secret(run_dir / SECRETS_FILE)) or {}


def exit_before_start(error: ConfigError, run_dir: Path) -> int:
    """Of a rank without `DistributedInfo`: the first rank of its host logs, and the launcher ends the others."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        wait_for_termination(TURN_SECONDS)
    Heartbeat(int(os.environ.get("RANK", "0")), run_dir).report_exit(EXIT_CONFIG)
    log(error)
    return EXIT_CONFIG


def crash(error: BaseException, heartbeat: Heartbeat) -> NoReturn:
    """End this process with a traceback and code 1."""
    heartbeat.fail(error)
    # If the end of another rank is the cause, the launcher has noticed that one, and ends this one meanwhile.
    wait_for_termination(_CAUSE_SECONDS)
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU, PyTorch's allocator of host memory, Python or the kernel had no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    is_of_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return is_of_host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def log_out_of_memory(options: Options, world: DistributedInfo, phase: str) -> None:
    """By the rank that it happened to; the others wait for it in a collective."""
    log(
        f"rank {world.rank} on {socket.gethostname()} ran out of memory in {phase},"
        f" {peak_memory(world.device)} at the peak;"
        f" try a smaller train_micro_batch_size_per_gpu or another ZeRO stage in {options.deepspeed_config}, or"
        " --activation-checkpointing 1 (tinyllama-ds plan shows what fits); the last checkpoint stands"
    )


def log_rank0(world: DistributedInfo, sentence: str) -> None:
    """By rank 0 for all ranks."""
    wait_for_turn(world)
    log(sentence)
