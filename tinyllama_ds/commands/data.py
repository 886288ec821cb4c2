"""Commands that make, import and inspect token shards."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import COUNT, POSITIVE, RANKS, WholeNumber, hostfile, output_file, output_folder
from tinyllama_ds.commands.printing import add_json, print_result
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, EXIT_RESTART, ConfigError

if TYPE_CHECKING:
    from tinyllama_ds.config.run_plan import RunPlan
    from tinyllama_ds.data.order import SampleOrder
    from tinyllama_ds.data.prepare.inputs import Inputs
    from tinyllama_ds.data.prepare.sources import SourceFormat
    from tinyllama_ds.data.shards import Manifest
    from tinyllama_ds.data.stream import TokenStream


def _add_demo_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=output_folder, metavar="OUT", help="directory to create")
    parser.add_argument(
        "--source",
        nargs="+",
        choices=("slimpajama", "starcoderdata", "proof-pile-2", "skypile"),
        default=["slimpajama", "starcoderdata"],
        metavar="NAME",
        help="slimpajama and starcoderdata (the default), proof-pile-2, skypile",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--chat", action="store_true", help="write conversations to OUT/chat instead")
    instead.add_argument(
        "--tasks",
        action="store_true",
        help="write a task for evaluate instead, from the held-out text of OUT/slimpajama",
    )
    add_json(parser)


def _demo_data(options: argparse.Namespace) -> int:
    """Write a raw demo corpus in the published formats, made from the Python installation."""
    from tinyllama_ds.data.demo.chat import SOURCE, make_demo_chat
    from tinyllama_ds.data.demo.corpus import make_demo_corpus
    from tinyllama_ds.data.demo.tasks import make_demo_task

    if options.tasks:
        task = make_demo_task(options.output)
        return print_result(options, {"task_file": str(task)}, f"{task}: a task for evaluate --task-file")
    if options.chat:
        counts = make_demo_chat(options.output)
        return print_result(options, counts, f"{options.output / SOURCE}: {counts or 'already there'}")
    made = make_demo_corpus(options.output, sources=options.source)
    lines = [f"{options.output / name}: {counts}" for name, counts in made.items()]
    return print_result(options, made, "\n".join(lines) or f"{options.output}: already there")


def _add_train_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="DIR", help="raw corpora")
    parser.add_argument(
        "--vocab-size", type=WholeNumber(260, 2**20), default=32_000, help="number of pieces (default: %(default)s)"
    )
    parser.add_argument("--output", type=output_file, required=True, metavar="tokenizer.model")
    parser.add_argument("--text-field", help="where the text is, for corpora of your own (default: text)")
    add_json(parser)


def _train_tokenizer(options: argparse.Namespace) -> int:
    """Train a sentencepiece tokenizer with Llama's settings."""
    from tinyllama_ds.data.tokenizer import train_tokenizer

    if options.output.exists():
        raise ConfigError(f"{options.output}: already exists; expected a new file")
    tokenizer = train_tokenizer(_texts(options.input, options.text_field), options.vocab_size, options.output)
    result = {"tokenizer": str(options.output), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    return print_result(options, result, f"{options.output}: {tokenizer.vocab_size:,} pieces")


def _texts(directories: list[Path], text_field: str | None) -> Iterator[str]:
    """Texts of all corpora in turn, so that the tokenizer sees as many of each."""
    readers = [_texts_of(directory, text_field) for directory in directories]
    while readers:
        for reader in list(readers):
            text = next(reader, None)
            if text is None:
                readers.remove(reader)
            else:
                yield text


def _texts_of(directory: Path, text_field: str | None) -> Iterator[str]:
    from tinyllama_ds.data.prepare.inputs import find_inputs
    from tinyllama_ds.data.prepare.reading import read_texts
    from tinyllama_ds.data.prepare.sources import source_format

    fmt = source_format(directory.name, text_field)
    inputs = find_inputs(directory, fmt)
    _print_notes(inputs)
    for path in inputs.splits.get("train", []):
        yield from read_texts(path, fmt)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", required=True, help="slimpajama, starcoderdata, proof-pile-2, skypile, or a name of your own"
    )
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="raw files, or one file")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="tokenizer.model")
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR", help="the data directory")
    parser.add_argument("--text-field", help="where the text is, for corpora of your own (default: text)")
    parser.add_argument(
        "--subset",
        nargs="+",
        metavar="NAME",
        help="only these parts: SlimPajama's set names, or folders (languages of StarCoderData)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="conversations (messages, or Guanaco's text), with a loss mask on the answers",
    )
    parser.add_argument(
        "--max-tokens",
        type=POSITIVE,
        default=2048,
        metavar="T",
        help="with --chat, cut longer conversations after an answer; a recipe's sequence_length (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-records",
        type=COUNT,
        default=0,
        metavar="N",
        help="list and skip up to N bad records (default: %(default)s)",
    )
    parser.add_argument("--encoder", choices=("auto", "gigatoken", "sentencepiece"), default="auto")
    parser.add_argument("--workers", type=RANKS, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--shard-bytes",
        type=WholeNumber(1, 2**40),
        default=256 * 2**20,
        metavar="N",
        help="about this many per shard (default: 256 MiB)",
    )
    _add_places(parser)
    add_json(parser)


def _add_places(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=hostfile, metavar="H", help="work on all these hosts, through ssh")
    where.add_argument("--mpi", action="store_true", help="work on the ranks of mpirun ... python -m mpi4py.futures")
    where.add_argument(
        "--share",
        type=_share,
        metavar="RANK/SIZE",
        help="make only every SIZE-th shard, from RANK on (default: all; under srun each task its share)",
    )


def _share(text: str) -> tuple[int, int]:
    rank, _, size = text.partition("/")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form RANK/SIZE, such as 0/4 to 3/4")
    return int(rank), int(size)


def _share_of_task(options: argparse.Namespace) -> tuple[int, int]:
    """The option, else this task's share under srun, whose batch scripts do not know the number of tasks of a step."""
    if options.share is None and not (options.mpi or options.hostfile) and "SLURM_STEP_NUM_TASKS" in os.environ:
        share = f"{os.environ.get('SLURM_PROCID')}/{os.environ['SLURM_STEP_NUM_TASKS']}"
        try:
            return _share(share)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"SLURM_PROCID/SLURM_STEP_NUM_TASKS in the environment: {error}") from error
    return options.share or (0, 1)


def _prepare(options: argparse.Namespace) -> int:
    """Tokenise one source into shards; continues after an interruption."""
    from concurrent.futures import BrokenExecutor

    from tinyllama_ds.data.prepare.agents import prepare_on_hosts
    from tinyllama_ds.data.prepare.inputs import find_inputs
    from tinyllama_ds.data.prepare.prepare import Preparation, prepare, summarise
    from tinyllama_ds.launch.hostfile import read_hostfile

    job = Preparation(
        source=options.source,
        input=options.input.absolute(),
        format=_format_of(options),
        tokenizer=options.tokenizer.absolute(),
        output=options.output.absolute(),
        encoder=options.encoder,
        max_bad_records=options.max_bad_records,
        shard_bytes=options.shard_bytes,
    )
    _print_notes(find_inputs(job.input, job.format))
    if options.hostfile is not None:
        hosts = [host.name for host in read_hostfile(options.hostfile)]
        for failure in prepare_on_hosts(job, hosts, _agent_arguments(options)):
            print(f"{failure}; finishing its share here", file=sys.stderr)
    workers = max(1, options.workers or len(os.sched_getaffinity(0)))
    try:
        table = summarise(prepare(job, workers, _share_of_task(options), options.mpi))
    except BrokenExecutor:
        print(
            "tinyllama-ds: a worker was killed, perhaps for its memory; run prepare again, finished shards are kept",
            file=sys.stderr,
        )
        return EXIT_RESTART
    return print_result(options, table, _prepare_text(options.source, table))


def _print_notes(inputs: "Inputs") -> None:
    """Print which files are held out or not read, before any is read."""
    for note in inputs.notes():
        print(f"tinyllama-ds: {note}", file=sys.stderr, flush=True)


def _format_of(options: argparse.Namespace) -> "SourceFormat":
    from tinyllama_ds.data.prepare.conversations import ChatFormat
    from tinyllama_ds.data.prepare.sources import source_format

    if options.chat:
        return ChatFormat(options.text_field or "text", max_tokens=options.max_tokens)
    return source_format(options.source, options.text_field, options.subset)


def _agent_arguments(options: argparse.Namespace) -> list[str]:
    """The same preparation on another host, paths made absolute."""
    arguments = ["prepare"] + (["--chat"] if options.chat else [])
    for name in ("source", "input", "tokenizer", "output", "encoder", "max_bad_records", "shard_bytes", "text_field",
                 "max_tokens", "workers"):  # fmt: skip
        value = getattr(options, name)
        if value:
            arguments += [f"--{name.replace('_', '-')}", str(value.absolute() if isinstance(value, Path) else value)]
    return arguments + (["--subset", *options.subset] if options.subset else [])


def _prepare_text(source: str, table: dict[str, dict]) -> str:
    lines = []
    for split, row in table.items():
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in row["rejected"].items()) or "none"
        shortened = "".join(f", {count:,} without their {what}" for what, count in row["shortened"].items())
        encoders = ", ".join(f"{count:,} by {name}" for name, count in row["encoders"].items())
        lines.append(
            f"{source}/{split}: {row['files']:,} files ({encoders}), {row['records']:,} records,"
            f" {row['documents']:,} documents{shortened}, rejected: {rejected}, {len(row['faults']):,} bad;"
            f" {row['tokens']:,} tokens, {row['bytes_per_token']:.2f} bytes per token, {row['shards']:,} shards"
        )
        lines += [f"  bad: {fault}" for fault in row["faults"]] + [f"  {fallback}" for fallback in row["fallbacks"]]
    return "\n".join(lines)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", type=Path, nargs="+", metavar="FILE", help="in the order in which they are joined")
    parser.add_argument("--source", required=True, help="the name that recipes give it")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="tokenizer.model", help="what made the tokens")
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR", help="the data directory")
    add_json(parser)


def _import_megatron(options: argparse.Namespace) -> int:
    """Make Megatron's .idx files (with their .bin files) usable for training, without a copy."""
    from tinyllama_ds.data.prepare.imports import import_megatron

    return _import_tokens(options, import_megatron)


def _import_litpkds(options: argparse.Namespace) -> int:
    """Turn the LITPKDS chunks of TinyLlama's own scripts into shards."""
    from tinyllama_ds.data.prepare.imports import import_litpkds

    return _import_tokens(options, import_litpkds)


def _import_tokens(options: argparse.Namespace, import_files: "Callable[..., list[Manifest]]") -> int:
    from tinyllama_ds.data.prepare.imports import Import

    job = Import(options.source, options.split, options.tokenizer, options.output)
    manifests = import_files(job, options.inputs)
    result = {
        "shards": len(manifests),
        "documents": sum(manifest.documents for manifest in manifests),
        "tokens": sum(manifest.tokens for manifest in manifests),
        "filler_tokens": sum(manifest.source_format.get("filler_tokens_left_out", 0) for manifest in manifests),
    }
    text = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in result.items())
    return print_result(options, result, f"{options.source}/{options.split}: {text}")


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--recipe", help="also verify what a run of this recipe trains on")
    parser.add_argument(
        "--world-size", type=WholeNumber(1, 1_000_000), default=1, metavar="N", help="ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--raw", action="append", default=[], metavar="SOURCE=DIR", help="compare random documents with the raw input"
    )
    parser.add_argument(
        "--samples", type=COUNT, default=20, help="documents per shard to compare (default: %(default)s)"
    )
    parser.add_argument("--workers", type=RANKS, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--output", type=output_file, metavar="HTML", help="default: DATA_DIR/audit.html")
    add_json(parser)


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
    page = _write_page(options, audit_page(audit, f"Audit of {options.data}"))
    result = {
        "good": not audit.problems,
        "problems": audit.problems,
        "warnings": audit.warnings,
        "page": page and str(page),
    }
    end = f"\n{page}" if page else ""
    print_result(options, result, f"{verdict(audit)}{end}")
    return EXIT_CONFIG if audit.problems or (options.output and not page) else EXIT_FINISHED


def _write_page(options: argparse.Namespace, page: str) -> Path | None:
    """The path of the page; None where it cannot be written, as data may be mounted read-only."""
    from tinyllama_ds.outputs import write_file

    output = options.output or options.data / "audit.html"
    try:
        write_file(output, page)
    except ConfigError as error:
        print(f"tinyllama-ds: {error}", file=sys.stderr, flush=True)
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
    streams = {name: open_stream(data / name / "train") for name in recipe.sources}
    sizes = {name: stream.num_samples(recipe.sequence_length) for name, stream in streams.items()}
    return plan, planned_order(recipe, plan, sizes, excluded), streams


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    show = actions.add_parser("show", help="print the texts that a step trains on")
    show.add_argument("step", type=WholeNumber(0, 10**15), metavar="STEP", help="from 0")
    show.add_argument("--recipe", required=True)
    show.add_argument("--data", type=Path, required=True, metavar="DIR")
    show.add_argument("--run-dir", type=Path, metavar="DIR", help="exclude the samples that this run's ledger excludes")
    show.add_argument("--limit", type=COUNT, default=8, metavar="N", help="samples to print (default: %(default)s)")
    add_json(show)


def _data(options: argparse.Namespace) -> int:
    """Inspect prepared data: `show` prints the texts that a step trains on."""
    from tinyllama_ds.data.audit.show import show_samples
    from tinyllama_ds.data.loader import reject_different_tokenizer
    from tinyllama_ds.data.tokenizer import TOKENIZER_FILE, Tokenizer
    from tinyllama_ds.run.ledger import excluded_samples, read_ledger

    if options.run_dir is not None and not options.run_dir.is_dir():
        raise ConfigError(f"--run-dir {options.run_dir}: is missing; expected the directory of a run")
    excluded = excluded_samples(read_ledger(options.run_dir)) if options.run_dir else []
    plan, order, streams = _planned_order(options.recipe, options.data, excluded)
    if not 0 <= options.step < plan.total_steps:
        raise ConfigError(f"step {options.step}: the recipe {options.recipe!r} has steps 0 to {plan.total_steps - 1}")
    step = plan.step(options.step)
    positions = range(step.first_position, step.first_position + min(options.limit, step.batch))
    tokenizer = Tokenizer(options.data / TOKENIZER_FILE)
    reject_different_tokenizer(streams, tokenizer)
    shown = list(show_samples(streams, order, positions, plan.sequence_length, tokenizer))
    lines = [
        f"=== position {sample.position}: {sample.source}, epoch {sample.epoch}, sample {sample.sample},"
        f" {sample.place}\n{sample.text}"
        for sample in shown
    ]
    return print_result(options, {"samples": [asdict(sample) for sample in shown]}, "\n".join(lines))


COMMANDS = (
    ("demo-data", _add_demo_data, _demo_data),
    ("train-tokenizer", _add_train_tokenizer, _train_tokenizer),
    ("prepare", _add_prepare, _prepare),
    ("import-megatron", _add_import, _import_megatron),
    ("import-litpkds", _add_import, _import_litpkds),
    ("audit", _add_audit, _audit),
    ("data", _add_data, _data),
)
