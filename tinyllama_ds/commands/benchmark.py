"""The command that measures the training step."""

import argparse
import json
from pathlib import Path

from tinyllama_ds.bars import progress
from tinyllama_ds.benchmark import grid as bench
from tinyllama_ds.commands.arguments import WholeNumber, add_shared, output_file, output_folder, words_of
from tinyllama_ds.commands.placement import local_placement, warn_of_hidden_gpus
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch.launcher import MEASURE, launcher_command, launcher_environment
from tinyllama_ds.outputs import reporting_write_errors, write_figure, write_file

_MICRO_BATCH = WholeNumber(1, 100_000)


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """What all settings of one call have in common; the ranks are started with the same arguments."""
    add = parser.add_argument
    add("--model", default="tinyllama-1.1b", help="named size")
    add("--sequence-length", type=WholeNumber(1, 10_000_000), default=2048, metavar="T", help="tokens of a sample")
    add_shared(parser, "--activation-checkpointing", "--activation-offloading", help="as in pretrain")
    add("--accumulation", type=WholeNumber(1, 10_000), default=4, help="micro-batches per step")
    add("--steps", type=WholeNumber(1, 10_000), default=3, help="measured steps")


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """One setting, as `benchmark.grid` writes it for the ranks."""
    add = parser.add_argument
    add("--deepspeed-config", type=Path, required=True)
    add("--micro-batch", type=_MICRO_BATCH, required=True)
    add("--attention", required=True)
    add("--compile", action="store_true")
    add("--output", type=output_file, required=True)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add_step_arguments(parser)
    add = parser.add_argument
    configs = "DeepSpeed configs to compare, or names of shipped ones"
    add_shared(parser, "--deepspeed-config", nargs="+", help=configs)
    add("--micro-batch", type=_MICRO_BATCH, nargs="+", default=[8], metavar="B", help="default: 8")
    add_shared(parser, "--attention", nargs="+", default=["auto"], help="backends (default: auto)")
    add("--compile", choices=("on", "off", "both"), default="both", help="torch.compile each decoder block")
    add_shared(parser, "--num-gpus")
    add("--output", type=output_folder, default="bench", help="for bench.json and bench.png")
    add_shared(parser, "--json")


def _bench(options: argparse.Namespace) -> int:
    """Measure tokens/s, MFU, memory and the split of a step over a grid of settings."""
    _check(options)
    placement = local_placement(options.num_gpus)
    compiled = {"on": [True], "off": [False], "both": [False, True]}[options.compile]
    settings = bench.grid(options.deepspeed_config, options.micro_batch, options.attention, compiled)
    warn_of_hidden_gpus(placement)
    measured = bench.measure_all(
        settings,
        lambda words: launcher_command(placement, [*words, *words_of(add_step_arguments, options)], MEASURE),
        launcher_environment(placement),
    )
    rows = list(progress(measured, total=len(settings), desc="bench", unit="setting"))
    title = f"{options.model}, {options.sequence_length} tokens, {placement.world_size} ranks"
    text = f"{bench.table(rows)}\n\n{bench.advice(rows)}\n{options.output / 'bench.png'}"
    code = print_result(options, {"rows": rows}, text)
    with reporting_write_errors(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    write_file(options.output / "bench.json", json.dumps(rows, indent=1) + "\n")
    write_figure(bench.picture_of(rows, title), options.output / "bench.png")
    return code


def _check(options: argparse.Namespace) -> None:
    from tinyllama_ds.config.deepspeed import load_deepspeed_config
    from tinyllama_ds.model.config import model_config

    positions = model_config(options.model).max_position_embeddings
    if options.sequence_length > positions:
        raise ConfigError(f"--sequence-length {options.sequence_length}: {options.model} has {positions} positions")
    for config in options.deepspeed_config:
        load_deepspeed_config(config)


COMMANDS = (("bench", _add_bench, _bench),)
