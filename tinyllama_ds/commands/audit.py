"""Commands that check and show prepared data."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import COUNT, POSITIVE, RANKS, WholeNumber, add_shared, output_file
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, ConfigError, log
from tinyllama_ds.outputs import write_file

if TYPE_CHECKING:
    from tinyllama_ds.config.run_plan import RunPlan
    from tinyllama_ds.data.audit.audit import DataAudit
    from tinyllama_ds.data.order import SampleOrder
    from tinyllama_ds.data.stream import TokenStream


def _add_audit(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", type=Path, metavar="DATA_DIR")
    add_shared(parser, "--recipe", required=False, help="also verify what a run of this recipe trains on")
    add("--world-size", type=WholeNumber(1, 1_000_000), default=1, metavar="N", help="ranks")
    rows = "count the documents that rows of T tokens cut, concatenated and packed by best fit"
    add("--sequence-length", type=POSITIVE, metavar="T", help=rows)
    raw = "compare random documents with the raw input"
    add("--raw", action="append", default=[], metavar="SOURCE=DIR", help=raw)
    add("--samples", type=COUNT, default=20, help="documents per shard to compare")
    add("--workers", type=RANKS, default=os.cpu_count() or 1, help="processes")
    add("--output", type=output_file, metavar="HTML", help="default: DATA_DIR/audit.html")
    add_shared(parser, "--json")


def _audit(options: argparse.Namespace) -> int:
    """Check every token of a data directory, and what a run of a recipe trains on."""
    from tinyllama_ds.config.run_plan import micro_batch_of
    from tinyllama_ds.data.audit.audit import audit_data
    from tinyllama_ds.data.audit.page import audit_page, verdict
    from tinyllama_ds.data.prepare.coverage import check_coverage

    coverage = None
    if options.recipe is not None:
        plan, order, _ = _planned_order(options.recipe, options.data)
        micro_batch_of(plan, None, options.world_size)  # raises for a number of ranks that does not divide the batches
        coverage = check_coverage(order, [stage.batch for stage in plan.stages], options.world_size)
    raw = _raw_inputs(options.raw)
    audit = audit_data(options.data, raw, options.samples, options.workers, coverage=coverage)
    if not audit.problems:
        _add_packing(audit, options)
    page = _write_page(options, audit_page(audit, f"Audit of {options.data}"))
    result = {
        "good": not audit.problems,
        "problems": audit.problems,
        "warnings": audit.warnings,
        "packing": [asdict(found) for found in audit.packing],
        "page": page and str(page),
    }
    end = f"\n{page}" if page else ""
    print_result(options, result, f"{verdict(audit)}{end}")
    return EXIT_CONFIG if audit.problems or (options.output and not page) else EXIT_FINISHED


def _add_packing(audit: "DataAudit", options: argparse.Namespace) -> None:
    """Of the recipe's sources, or of all, at the length that is given or that of a recipe that packs."""
    from tinyllama_ds.config.recipe import BEST_FIT, load_recipe
    from tinyllama_ds.data.audit.packing import audit_packing

    recipe = load_recipe(options.recipe) if options.recipe else None
    length = options.sequence_length
    if length is None and recipe is not None and recipe.packing == BEST_FIT:
        length = recipe.sequence_length
    sources = recipe.sources if recipe else sorted(path.parent.name for path in options.data.glob("*/train"))
    for source in sources if length else ():
        try:
            audit.packing.append(audit_packing(options.data, source, length))
        except ConfigError as error:  # a conversation that is longer
            audit.warnings.append(str(error))


def _write_page(options: argparse.Namespace, page: str) -> Path | None:
    """The path of the page; None where it cannot be written, as data may be mounted read-only."""
    output = options.output or options.data / "audit.html"
    try:
        write_file(output, page)
    except ConfigError as error:
        log(error)
        return None
    return output


def _raw_inputs(pairs: list[str]) -> dict[str, Path]:
    named = [pair.partition("=") for pair in pairs]
    for source, separator, directory in named:
        if not separator or not Path(directory).exists():
            raise ConfigError(f"--raw {source}{separator}{directory}: expected SOURCE=DIR with a directory that exists")
    return {source: Path(directory) for source, _, directory in named}


def _planned_order(
    recipe_name: str, data: Path, excluded: Sequence[range] = ()
) -> "tuple[RunPlan, SampleOrder, dict[str, TokenStream]]":
    """Plan, sample order and streams of a recipe on a data directory."""
    from tinyllama_ds.config.recipe import load_recipe
    from tinyllama_ds.config.run_plan import RunPlan
    from tinyllama_ds.data.order import planned_order
    from tinyllama_ds.data.packing import open_stream

    recipe = load_recipe(recipe_name)
    plan = RunPlan(recipe)
    streams = {name: open_stream(data / name / "train", recipe.packing) for name in recipe.sources}
    sizes = {name: stream.num_samples(recipe.sequence_length) for name, stream in streams.items()}
    return plan, planned_order(recipe, plan, sizes, excluded), streams


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    show = actions.add_parser("show", help="print the texts that a step trains on")
    show.add_argument("step", type=WholeNumber(0, 10**15), metavar="STEP", help="from 0")
    add_shared(show, "--recipe", "--data")
    add_shared(show, "--run-dir", required=False, help="exclude the samples that this run's ledger excludes")
    show.add_argument("--limit", type=COUNT, default=8, metavar="N", help="samples to print")
    add_shared(show, "--json")


def _data(options: argparse.Namespace) -> int:
    """Inspect prepared data: `show` prints the texts that a step trains on."""
    from tinyllama_ds.data.audit.show import show_samples
    from tinyllama_ds.data.loader import reject_different_tokenizer
    from tinyllama_ds.data.tokenizers.storage import load_tokenizer
    from tinyllama_ds.run.ledger import excluded_samples, read_ledger

    if options.run_dir is not None and not options.run_dir.is_dir():
        raise ConfigError(f"--run-dir {options.run_dir}: is missing; expected the directory of a run")
    excluded = excluded_samples(read_ledger(options.run_dir)) if options.run_dir else []
    plan, order, streams = _planned_order(options.recipe, options.data, excluded)
    if not 0 <= options.step < plan.total_steps:
        raise ConfigError(f"step {options.step}: the recipe {options.recipe!r} has steps 0 to {plan.total_steps - 1}")
    step = plan.step(options.step)
    positions = range(step.first_position, step.first_position + min(options.limit, step.batch))
    tokenizer = load_tokenizer(options.data)
    reject_different_tokenizer(streams, tokenizer)
    shown = list(show_samples(streams, order, positions, plan.sequence_length, tokenizer))
    lines = [
        f"=== position {sample.position}: {sample.source}, epoch {sample.epoch}, sample {sample.sample},"
        f" {sample.place}\n{sample.text}"
        for sample in shown
    ]
    return print_result(options, {"samples": [asdict(sample) for sample in shown]}, "\n".join(lines))


COMMANDS = (
    ("audit", _add_audit, _audit),
    ("data", _add_data, _data),
)
