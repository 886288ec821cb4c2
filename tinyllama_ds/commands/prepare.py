"""Commands that make token shards of raw text, and what they need: a demo corpus and a tokenizer."""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import (
    COUNT,
    POSITIVE,
    RANKS,
    WholeNumber,
    add_shared,
    argument_type,
    as_dataclass,
    output_file,
    output_folder,
    with_absolute_paths,
    words_of,
)
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.errors import EXIT_RESTART, ConfigError, log
from tinyllama_ds.launch.hostfile import read_hostfile

if TYPE_CHECKING:
    from tinyllama_ds.data.prepare.inputs import Inputs
    from tinyllama_ds.data.prepare.sources import SourceFormat


def _add_demo_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("output", type=output_folder, metavar="OUT", help="directory to create")
    add(
        "--source",
        nargs="+",
        choices=("slimpajama", "starcoderdata", "proof-pile-2", "skypile", "numbers"),
        default=["slimpajama", "starcoderdata"],
        metavar="NAME",
        help="slimpajama and starcoderdata (the default), proof-pile-2, skypile, numbers",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--chat", action="store_true", help="write conversations to OUT/chat instead")
    task = "write a task for evaluate instead, from the held-out text of OUT/slimpajama"
    add("--tasks", action="store_true", help=task)
    add_shared(parser, "--json")


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
        return print_result(options, counts, f"{options.output / SOURCE}: {_counts(counts)}")
    made = make_demo_corpus(options.output, sources=options.source)
    lines = [f"{options.output / name}: {_counts(counts)}" for name, counts in made.items()]
    return print_result(options, made, "\n".join(lines) or f"{options.output}: already there")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items()) or "already there"


def _add_train_tokenizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="DIR", help="raw corpora")
    add("--vocab-size", type=WholeNumber(260, 2**20), default=32_000, help="number of pieces")
    kinds = "a tokenizer.model with Llama 2's settings, or a tokenizer.json of byte-level BPE"
    add("--type", choices=("sentencepiece", "bpe"), default="sentencepiece", help=kinds)
    add_shared(parser, "--output", type=output_file, metavar="FILE", help="file to create")
    add_shared(parser, "--text-field", "--json")


def _train_tokenizer(options: argparse.Namespace) -> int:
    """Train a tokenizer: sentencepiece with Llama 2's settings, or byte-level BPE."""
    from tinyllama_ds.data.tokenizers.train_tokenizer import train_bpe, train_tokenizer

    if options.output.exists():
        raise ConfigError(f"{options.output}: already exists; expected a new file")
    train = train_bpe if options.type == "bpe" else train_tokenizer
    tokenizer = train(_texts(options.input, options.text_field), options.vocab_size, options.output)
    result = {"tokenizer": str(options.output), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    return print_result(options, result, f"{options.output}: {tokenizer.vocab_size:,} pieces")


def _texts(directories: list[Path], text_field: str | None) -> Iterator[str]:
    """Texts of all corpora in turn, so that the tokenizer sees as many of each."""
    for texts in zip_longest(*(_texts_of(directory, text_field) for directory in directories)):
        yield from (text for text in texts if text is not None)


def _texts_of(directory: Path, text_field: str | None) -> Iterator[str]:
    from tinyllama_ds.data.prepare.inputs import find_inputs
    from tinyllama_ds.data.prepare.reading import read_texts
    from tinyllama_ds.data.prepare.sources import source_format

    fmt = source_format(directory.name, text_field)
    inputs = find_inputs(directory, fmt)
    _print_notes(inputs)
    for path in inputs.splits.get("train", []):
        yield from read_texts(path, fmt)


def _add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """What is prepared, and how; the hosts of a hostfile are given the same arguments."""
    add = parser.add_argument
    add_shared(parser, "--source", help="slimpajama, starcoderdata, proof-pile-2, skypile, or a name of your own")
    add("--input", type=Path, metavar="DIR", help="raw files, or one file")
    add_shared(parser, "--tokenizer", required=False)
    add_shared(parser, "--output", "--text-field")
    add("--name", metavar="NAME", help="of the source in DATA (default: --source)")
    parts = "only these parts: SlimPajama's set names, or folders (languages of StarCoderData)"
    add("--subset", nargs="+", metavar="NAME", help=parts)
    shortest = "only documents of N tokens or more: a source of long ones (docs/long-context.md)"
    add("--min-tokens", type=COUNT, default=0, metavar="N", help=shortest)
    chat = "conversations (messages, or Guanaco's text), with a loss mask on the answers"
    add("--chat", action="store_true", help=chat)
    longest = "with --chat, cut longer conversations after an answer; a recipe's sequence_length"
    add("--max-tokens", type=POSITIVE, default=2048, metavar="T", help=longest)
    add("--max-bad-records", type=COUNT, default=0, metavar="N", help="list and skip up to N bad records")
    encoders = ("auto", "gigatoken", "sentencepiece", "tokenizers")
    add("--encoder", choices=encoders, default="auto", help="of text into token ids")
    add("--workers", type=RANKS, metavar="N", help="processes (default: one per core)")
    size = "about this many per shard (default: 256 MiB)"
    add("--shard-bytes", type=WholeNumber(1, 2**40), default=256 * 2**20, metavar="N", help=size)


def _add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("distillation (docs/distillation.md)").add_argument
    cache = "cache what this model predicts for every training token; without --input, of tokens that are there"
    add("--teacher", type=Path, metavar="HF_DIR", help=cache)
    add("--teacher-top-k", type=POSITIVE, default=32, metavar="K", help="most probable tokens to keep of each position")
    add("--sequence-length", type=POSITIVE, metavar="T", help="tokens that the teacher sees: the recipe's")
    add("--document-mask", action="store_true", help="the teacher sees its own document only, as in the recipe")
    add("--packing", choices=("concatenate", "best_fit"), default="concatenate", help="as in the recipe")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    _add_job_arguments(parser)
    _add_teacher_arguments(parser)
    where = parser.add_mutually_exclusive_group()
    add_shared(where, "--hostfile", help="work on all these hosts, through ssh")
    where.add_argument("--mpi", action="store_true", help="work on the ranks of mpirun ... python -m mpi4py.futures")
    share = "make only every SIZE-th shard, from RANK on (default: all; under srun each task its share)"
    where.add_argument("--share", type=argument_type(_share), metavar="RANK/SIZE", help=share)
    add_shared(parser, "--json")


def _share(text: str) -> tuple[int, int]:
    rank, _, size = text.partition("/")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"{text!r} is not of the form RANK/SIZE, such as 0/4 to 3/4")
    return int(rank), int(size)


def _share_of_task(options: argparse.Namespace) -> tuple[int, int]:
    """The option, else this task's share under srun, whose batch scripts do not know the number of tasks of a step."""
    if options.share is None and not (options.mpi or options.hostfile) and "SLURM_STEP_NUM_TASKS" in os.environ:
        try:
            return _share(f"{os.environ.get('SLURM_PROCID')}/{os.environ['SLURM_STEP_NUM_TASKS']}")
        except ConfigError as error:
            raise ConfigError(f"SLURM_PROCID/SLURM_STEP_NUM_TASKS in the environment: {error}") from error
    return options.share or (0, 1)


def _prepare(options: argparse.Namespace) -> int:
    """Tokenise one source into shards; continues after an interruption."""
    _reject_incomplete(options)
    options.agent_arguments = ["prepare", *words_of(_add_job_arguments, with_absolute_paths(options))]
    options.format = _format_of(options)
    options.source = options.name or options.source
    table: dict[str, dict] = {}
    lines = []
    try:
        if options.input is not None:
            table |= _prepare_tokens(options)
            lines.append(_prepare_text(options.source, table))
        if options.teacher is not None:
            table["teacher"] = _prepare_teacher(options)
            lines.append(_teacher_text(options.source, table["teacher"]))
    except BrokenExecutor:
        log("a worker was killed, perhaps for its memory; run prepare again, finished shards are kept")
        return EXIT_RESTART
    return print_result(options, table, "\n".join(lines))


def _reject_incomplete(options: argparse.Namespace) -> None:
    """Raises `ConfigError` for options that need another one, or do not go together."""
    is_packed = options.packing != "concatenate"
    if options.teacher is None and (options.input is None or options.tokenizer is None):
        raise ConfigError("prepare: expected --input and --tokenizer, or --teacher for tokens that are there")
    if (options.input is None) != (options.tokenizer is None):
        raise ConfigError("prepare: --input and --tokenizer go together; expected both, or neither with --teacher")
    if options.chat and options.min_tokens:
        raise ConfigError("--min-tokens: is for documents; expected it without --chat")
    if options.teacher is not None and options.sequence_length is None:
        raise ConfigError("--teacher: expected --sequence-length as well, that of the recipe")
    if options.teacher is not None and (options.mpi or options.hostfile):
        raise ConfigError("--teacher: expected --share RANK/SIZE on every host instead of --hostfile or --mpi")
    if options.teacher is None and (options.sequence_length or options.document_mask or is_packed):
        raise ConfigError(
            "--sequence-length, --document-mask and --packing: expected --teacher as well, tokens do not need them"
        )
    if is_packed and not options.document_mask:
        raise ConfigError(f"--packing {options.packing}: expected --document-mask as well, as in a recipe")


def _prepare_tokens(options: argparse.Namespace) -> dict[str, dict]:
    from tinyllama_ds.data.prepare.agents import prepare_on_hosts
    from tinyllama_ds.data.prepare.inputs import find_inputs
    from tinyllama_ds.data.prepare.prepare import Preparation, prepare, summarise

    job = as_dataclass(Preparation, with_absolute_paths(options))
    _print_notes(find_inputs(job.input, job.format))
    if options.hostfile is not None:
        hosts = [host.name for host in read_hostfile(options.hostfile)]
        for failure in prepare_on_hosts(job, hosts, options.agent_arguments):
            log(f"{failure}; finishing its share here")
    workers = max(1, options.workers or len(os.sched_getaffinity(0)))
    return summarise(prepare(job, workers, _share_of_task(options), options.mpi))


def _prepare_teacher(options: argparse.Namespace) -> dict:
    from tinyllama_ds.hf.teacher import Teaching, default_workers, teach

    job = as_dataclass(Teaching, with_absolute_paths(options))
    return teach(job, options.workers or default_workers(), _share_of_task(options))


def _teacher_text(source: str, row: dict) -> str:
    return (
        f"{source}/train: the {row['top_k']} most probable tokens of {row['teacher']} for {row['tokens']:,} tokens,"
        f" {row['bytes_per_token']} bytes per token, {row['shards']:,} shards"
    )


def _print_notes(inputs: "Inputs") -> None:
    """Print which files are held out or not read, before any is read."""
    for note in inputs.notes():
        log(note)


def _format_of(options: argparse.Namespace) -> "SourceFormat":
    from tinyllama_ds.data.prepare.conversations import ChatFormat
    from tinyllama_ds.data.prepare.sources import source_format

    if options.chat:
        return ChatFormat(options.text_field or "text", max_tokens=options.max_tokens)
    return source_format(options.source, options.text_field, options.subset, options.min_tokens)


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


COMMANDS = (
    ("demo-data", _add_demo_data, _demo_data),
    ("train-tokenizer", _add_train_tokenizer, _train_tokenizer),
    ("prepare", _add_prepare, _prepare),
)
