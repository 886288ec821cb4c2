"""The commands that measure speed: of the training step, and of speculative decoding."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_ds.bars import progress
from tinyllama_ds.benchmark import grid as bench
from tinyllama_ds.commands.arguments import (
    DRAFT_LENGTH,
    WholeNumber,
    add_shared,
    as_dataclass,
    output_file,
    output_folder,
    words_of,
)
from tinyllama_ds.commands.model import add_sampling_arguments, load_for_generation
from tinyllama_ds.commands.placement import local_placement, warn_of_hidden_gpus
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch.launcher import MEASURE, launcher_command, launcher_environment
from tinyllama_ds.outputs import reporting_write_errors, write_figure, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MICRO_BATCH = WholeNumber(1, 100_000)


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """What all settings of one call have in common; the ranks are started with the same arguments."""
    add = parser.add_argument
    add("--model", default="tinyllama-1.1b", help="named size")
    add("--sequence-length", type=WholeNumber(1, 10_000_000), default=2048, metavar="T", help="tokens of a sample")
    add_shared(parser, "--activation-checkpointing", help="as in pretrain")
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
    _write(options.output, "bench", rows, bench.picture_of(rows, title))
    return code


def _check(options: argparse.Namespace) -> None:
    from tinyllama_ds.config.deepspeed import load_deepspeed_config
    from tinyllama_ds.model.config import model_config

    positions = model_config(options.model).max_position_embeddings
    if options.sequence_length > positions:
        raise ConfigError(f"--sequence-length {options.sequence_length}: {options.model} has {positions} positions")
    for config in options.deepspeed_config:
        load_deepspeed_config(config)


def _add_draft_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", type=Path, required=True, metavar="MODEL", help="the model to be made faster")
    add("--drafts", type=Path, nargs="+", required=True, metavar="MODEL", help="smaller models to compare")
    add("--prompts", type=Path, required=True, metavar="FILE", help="text file with one prompt a line")
    lengths = "tokens that a draft proposes at once (default: 1 2 3 4 5 8)"
    add("--draft-lengths", type=DRAFT_LENGTH, nargs="+", default=[1, 2, 3, 4, 5, 8], metavar="N", help=lengths)
    add_sampling_arguments(parser, max_new_tokens=64, temperature=0.0)
    add_shared(parser, "--universal-assisted-decoding")
    files = "for draft_bench.json and draft_bench.png"
    add("--output", type=output_folder, default="draft-bench", metavar="DIR", help=files)
    add_shared(parser, "--json")


def _draft_bench(options: argparse.Namespace) -> int:
    """Measure acceptance and speed-up of drafts for speculative decoding, by draft length."""
    from tinyllama_ds.hf.generate import Sampling
    from tinyllama_ds.speculative.bench import Bench, read_prompts
    from tinyllama_ds.speculative.pair import NamedModel, make_pair
    from tinyllama_ds.speculative.report import figure_of, report_text

    target = NamedModel(str(options.target), load_for_generation(options.target))
    prompts = read_prompts(options.prompts, target)
    drafts = (NamedModel(str(path), load_for_generation(path)) for path in dict.fromkeys(options.drafts))
    pairs = [make_pair(target, draft, options.universal_assisted_decoding) for draft in drafts]
    bench = Bench(target, pairs, options.draft_lengths, as_dataclass(Sampling, options))
    total = (len(prompts) + 1) * len(bench.settings)  # the warm-up is one
    for _ in progress(bench.measure(prompts), total=total, desc="draft-bench", unit="text"):
        pass
    result = bench.result()
    code = print_result(options, result, f"{report_text(result)}\n{options.output / 'draft_bench.png'}")
    _write(options.output, "draft_bench", result, figure_of(result))
    return code


def _write(output: Path, name: str, result: Any, figure: "Figure") -> None:
    with reporting_write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    write_file(output / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_figure(figure, output / f"{name}.png")


COMMANDS = (("bench", _add_bench, _bench), ("draft-bench", _add_draft_bench, _draft_bench))
