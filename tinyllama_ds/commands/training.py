"""The command that trains."""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import (
    MINUTES,
    SECONDS,
    add_shared,
    as_dataclass,
    token_count,
    with_absolute_paths,
    words_of,
)
from tinyllama_ds.commands.placement import (
    add_placement_arguments,
    lifeline_opener,
    lifeline_to_first,
    query_machines,
    read_placement,
    warn_of_hidden_gpus,
)
from tinyllama_ds.commands.printing import write_no_more
from tinyllama_ds.distributed.network import free_port
from tinyllama_ds.errors import EXIT_FINISHED, all_of, log
from tinyllama_ds.hardware.devices import Machine
from tinyllama_ds.launch.fleet import Fleet
from tinyllama_ds.launch.launcher import Placement, check_partition, check_placement, describe_launch
from tinyllama_ds.launch.lock import hold_run
from tinyllama_ds.launch.supervisor import SupervisionResult, SupervisorConfig, supervise
from tinyllama_ds.layout import LIFELINE_VARIABLE, STATUS_FILE, STOP_FILE

if TYPE_CHECKING:
    from tinyllama_ds.config.ablation import Ablation
    from tinyllama_ds.run.resolve import Options, Run
_START_SECONDS = 1800.0  # for imports, loading, compiling and the first step


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run is; the ranks are started with the same arguments."""
    add = parser.add_argument
    add_shared(parser, "--recipe", "--data", "--run-dir")
    add_shared(parser, "--deepspeed-config", aliases=["--deepspeed_config"])
    add("--resume", choices=("auto", "must", "never"), default="auto", help="from the newest checkpoint")
    branch = "begin with another run's checkpoint: the newest whose history this recipe shares, or a step_* folder"
    add("--branch-from", type=Path, metavar="RUN", help=branch)
    without = "exclude a source: from the beginning, or in a branch from the checkpoint of so many tokens on (300B)"
    add("--without", type=_ablation, metavar="SOURCE[@TOKENS]", help=without)
    weights = "start with only the weights of an imported model, a run or a checkpoint"
    add("--init-from", type=Path, metavar="DIR", help=weights)
    change = "resume although this differs from the run in --run-dir, named as in the error: recipe.seed, data ..."
    add("--allow-change", action="append", default=[], metavar="KEY", help=change)
    add_kernel_arguments(parser)


def _ablation(text: str) -> "Ablation":
    """An argument type: SOURCE, or SOURCE@TOKENS."""
    from tinyllama_ds.config.ablation import Ablation

    source, _, tokens = text.partition("@")
    return Ablation(source, token_count(tokens)) if "@" in text else Ablation(text)


def add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    """How a step is computed."""
    add = parser.add_argument
    add_shared(parser, "--attention", "--compile", "--activation-checkpointing", "--activation-offloading")
    add_shared(parser, "--sequence-parallel")
    exact = "bit-identical kernels on GPUs, at some cost; on CPUs they always are"
    add("--deterministic", action="store_true", help=exact)


def run_options(namespace: argparse.Namespace) -> "Options":
    """The typed form of `add_run_arguments`."""
    from tinyllama_ds.run.resolve import Options

    return as_dataclass(Options, namespace)


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    add_placement_arguments(parser)
    add_supervision_arguments(parser)


def add_supervision_arguments(parser: argparse.ArgumentParser) -> None:
    """What the supervisor does before, while and after the ranks run."""
    add = parser.add_argument
    shrink = "after a failure continue on the remaining hosts, with the same batch"
    add("--allow-shrink", action="store_true", help=shrink)
    add("--skip-doctor", action="store_true", help="start without the checks of doctor")
    add("--dry-run", action="store_true", help="print all commands and start nothing")
    stall = "restart a run without a completed step for so long"
    add("--step-timeout", type=SECONDS, default=600, metavar="SECONDS", help=stall)
    add("--max-wall-time", type=MINUTES, metavar="MINUTES", help="then save and exit with code 75")


def pretrain(options: argparse.Namespace) -> int:
    """Train under the deepspeed launcher; restarts and resumes automatically."""
    from tinyllama_ds.config.deepspeed import load_deepspeed_config
    from tinyllama_ds.config.recipe import load_recipe

    placement, *_ = all_of(
        lambda: read_placement(options),
        lambda: load_recipe(options.recipe),
        lambda: load_deepspeed_config(options.deepspeed_config),
    )
    arguments = words_of(add_run_arguments, with_absolute_paths(options))
    check_placement(placement, arguments)
    placement = query_machines(placement)
    run = _check_run(options, placement)
    warn_of_hidden_gpus(placement)
    _check_engine(options, placement, run)
    if options.dry_run:
        return _describe(placement, arguments)
    fleet = Fleet(
        placement,
        arguments,
        options.data,
        options.run_dir,
        check_first=not options.skip_doctor,
        allow_shrink=options.allow_shrink,
        check=lambda smaller: _check_run(options, smaller),
    )
    watch = _watch(options, placement, begun=(run.parent.step, run.parent.tokens) if run.parent else (0, 0))
    if placement.node_rank:  # the first host's supervisor has the lock and the lifeline
        line = {LIFELINE_VARIABLE: lifeline_to_first(placement)}
        return supervise(lambda own, directory: fleet.start(own | line, directory), watch, None).code
    with hold_run(options.run_dir) as lock:
        try:
            supervised = supervise(fleet.start, watch, lock)
        finally:
            fleet.remove_secrets()
    return _end(options.run_dir, supervised)


def _describe(placement: Placement, arguments: list[str]) -> int:
    """Print the dry run. Its port is free on this machine; a start takes one that is free on the first host."""
    port = placement.master_port or free_port()
    directory = Path(tempfile.gettempdir()) / f"tinyllama-ds-{os.getpid()}"
    print(describe_launch(replace(placement, master_port=port), arguments, directory))
    return EXIT_FINISHED


def _watch(options: argparse.Namespace, placement: Placement, begun: tuple[int, int]) -> SupervisorConfig:
    """`begun` are the steps and tokens of a branch without a checkpoint of its own."""
    from tinyllama_ds.checkpoint.format import newest_progress

    return SupervisorConfig(
        status_file=options.run_dir / STATUS_FILE,
        stop_file=options.run_dir / STOP_FILE,
        committed=lambda: max(newest_progress(options.run_dir), begun),
        step_seconds=options.step_timeout,
        start_seconds=max(_START_SECONDS, options.step_timeout),
        max_seconds=options.max_wall_time and 60 * options.max_wall_time,
        is_first=not placement.node_rank,
        open_lifeline=lifeline_opener(placement, options.run_dir),
    )


def _check_run(options: argparse.Namespace, placement: Placement) -> "Run":
    from tinyllama_ds.run.directory import check_run_directory
    from tinyllama_ds.run.resolve import resolve_run

    machine = placement.machine or _this_machine(placement)
    world_size, capability = placement.world_size, machine.capability
    run = resolve_run(run_options(options), world_size, machine.device_type, machine.bf16, capability)
    partition = run.engine_config["zero_optimization"].get("zero_hpz_partition_size", 1)
    check_partition(placement, partition, f"{options.deepspeed_config}: zero_hpz_partition_size")
    check_partition(placement, options.sequence_parallel, "--sequence-parallel")
    check_run_directory(run)
    return run


def _check_engine(options: argparse.Namespace, placement: Placement, run: "Run") -> None:
    """Warn of keys of the DeepSpeed JSON that may have no effect, and start its engine once if this machine can."""
    import torch

    from tinyllama_ds.config.deepspeed import warnings_of
    from tinyllama_ds.train.dry_start import check_engine_start

    if placement.node_rank:  # done by the first host's supervisor
        return
    path = options.deepspeed_config
    for warning in warnings_of(run.description["deepspeed_config"]):
        log(f"warning: {path}: {warning}")
    device_type = (placement.machine or _this_machine(placement)).device_type
    if device_type == "cpu" or torch.cuda.is_available():
        check_engine_start(run.engine_config, path, device_type)


def _this_machine(placement: Placement) -> Machine:
    """The hardware of this machine for its ranks."""
    import torch

    from tinyllama_ds.train.engine import supports_fast_bf16

    device_type = "cpu" if placement.on_cpu else "cuda"
    return Machine(device_type, supports_fast_bf16(torch.device(device_type)), os.cpu_count() or 1)


def _end(run_dir: Path, supervised: SupervisionResult) -> int:
    try:
        _print_goodput(run_dir, supervised)
        sys.stdout.flush()
    except OSError:  # a closed console or an unreadable file must not change the exit code
        write_no_more()
    return supervised.code


def _print_goodput(run_dir: Path, supervised: SupervisionResult) -> None:
    from tinyllama_ds.report.history import read_metrics

    if not supervised.tokens:
        return
    rates = [row["Speed/TokensPerSecond"] for row in read_metrics(run_dir) if row.get("Speed/TokensPerSecond", 0) > 0]
    peak = max(rates, default=0.0)
    committed = f"{supervised.tokens:,} tokens committed in {supervised.seconds:,.0f} s"
    if not peak:
        print(f"{committed}; no step was logged, so goodput is not known")
        return
    goodput = supervised.tokens / (peak * supervised.seconds)
    print(
        f"goodput {goodput:.1%}: {committed}, start-up, validation, saving and {supervised.restarts} restarts"
        f" included, at a peak of {peak:,.0f} tokens/s"
    )


COMMANDS = (("pretrain", _add_pretrain, pretrain),)
