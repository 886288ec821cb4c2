"""`tinyllama-ds <command>`: parsing and calling. Heavy imports happen inside the commands."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds import __version__
from tinyllama_ds.errors import EXIT_FINISHED, EXIT_REFUSED, EXIT_RESTART, Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from tinyllama_ds.data.order import SampleOrder
    from tinyllama_ds.data.shards import Manifest, TokenStream
    from tinyllama_ds.data.tokenizer import Tokenizer
    from tinyllama_ds.launch.launcher import Placement
    from tinyllama_ds.launch.supervisor import Supervised
    from tinyllama_ds.model.config import LlamaConfig
    from tinyllama_ds.plan import RunPlan
    from tinyllama_ds.training.run import Options


_START_SECONDS = 1800.0  # for imports, loading, compiling and the first step


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call, and turn a `Refusal` into one sentence and exit code 78."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except Refusal as refusal:
        print(f"tinyllama-ds: {refusal}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tinyllama-ds", description="Raw text to a TinyLlama-class model.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, add_arguments, command in (
        ("demo-data", _add_demo_data, _demo_data),
        ("train-tokenizer", _add_train_tokenizer, _train_tokenizer),
        ("prepare", _add_prepare, _prepare),
        ("import-megatron", _add_import, _import_megatron),
        ("import-litpkds", _add_import, _import_litpkds),
        ("audit", _add_audit, _audit),
        ("data", _add_data, _data),
        ("pretrain", _add_pretrain, _pretrain),
        ("export", _add_export, _export),
        ("generate", _add_generate, _generate),
        ("report", _add_report, _report),
        ("bench", _add_bench, _bench),
    ):
        help_text = (command.__doc__ or "").splitlines()[0]
        child = commands.add_parser(name, help=help_text, description=help_text)
        add_arguments(child)
        child.set_defaults(command=command)
    return parser


def _print_result(options: argparse.Namespace, result: dict, text: str) -> int:
    print(json.dumps(result) if options.json else text)
    return EXIT_FINISHED


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


# --- data ---------------------------------------------------------------------------------------------------------


def _add_demo_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUT", help="directory to create")
    _add_json(parser)


def _demo_data(options: argparse.Namespace) -> int:
    """Write a raw demo corpus in the published formats, made from the Python installation."""
    from tinyllama_ds.data.demo_corpus import make_demo_corpus

    made = make_demo_corpus(options.output)
    lines = [f"{options.output / name}: {counts}" for name, counts in made.items()]
    return _print_result(options, made, "\n".join(lines) or f"{options.output}: already there")


def _add_train_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="DIR", help="raw corpora")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="number of pieces (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="tokenizer.model")
    parser.add_argument("--text-field", help="where the text is, for corpora of your own (default: text)")
    _add_json(parser)


def _train_tokenizer(options: argparse.Namespace) -> int:
    """Train a sentencepiece tokenizer with Llama's settings."""
    from tinyllama_ds.data.tokenizer import train_tokenizer

    if options.output.exists():
        raise Refusal(f"{options.output}: already exists; expected a new file")
    tokenizer = train_tokenizer(_texts(options.input, options.text_field), options.vocab_size, options.output)
    result = {"tokenizer": str(options.output), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    return _print_result(options, result, f"{options.output}: {tokenizer.vocab_size:,} pieces")


def _texts(directories: list[Path], text_field: str | None) -> Iterator[str]:
    """Texts of all corpora by turns, so that each has its share of what the tokenizer sees."""
    readers = [_texts_of(directory, text_field) for directory in directories]
    while readers:
        for reader in list(readers):
            text = next(reader, None)
            if text is None:
                readers.remove(reader)
            else:
                yield text


def _texts_of(directory: Path, text_field: str | None) -> Iterator[str]:
    from tinyllama_ds.data.sources import find_inputs, read_texts, source_format

    fmt = source_format(directory.name, text_field)
    for path in find_inputs(directory, fmt).get("train", []):
        yield from read_texts(path, fmt)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", required=True, help="slimpajama, starcoderdata, proof-pile-2, skypile, or a name of your own"
    )
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="raw files, or one file")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="tokenizer.model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the data directory")
    parser.add_argument("--text-field", help="where the text is, for corpora of your own (default: text)")
    parser.add_argument(
        "--subset",
        nargs="+",
        metavar="NAME",
        help="only these parts: SlimPajama's set names, or folders (languages of StarCoderData)",
    )
    parser.add_argument(
        "--max-bad-records",
        type=_count,
        default=0,
        metavar="N",
        help="list and leave out up to N (default: %(default)s)",
    )
    parser.add_argument("--encoder", choices=("auto", "gigatoken", "sentencepiece"), default="auto")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--shard-bytes", type=int, default=256 * 2**20, metavar="N", help="about this many per shard (default: 256 MiB)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, metavar="H", help="work on all these hosts, through ssh")
    where.add_argument("--mpi", action="store_true", help="work on the ranks of mpirun ... python -m mpi4py.futures")
    where.add_argument(
        "--share", type=_share, default=(0, 1), metavar="RANK/SIZE", help="make only every SIZE-th shard, from RANK on"
    )
    _add_json(parser)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    rank, _, size = text.partition("/")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form RANK/SIZE, such as 0/4 to 3/4")
    return int(rank), int(size)


def _prepare(options: argparse.Namespace) -> int:
    """Tokenise one source into shards; starts again where it stopped."""
    from concurrent.futures import BrokenExecutor

    from tinyllama_ds.data.agents import prepare_on_hosts
    from tinyllama_ds.data.prepare import Preparation, prepare, summarise
    from tinyllama_ds.data.sources import count_other_files, source_format
    from tinyllama_ds.launch.hostfile import read_hostfile

    job = Preparation(
        source=options.source,
        input=options.input.absolute(),
        format=source_format(options.source, options.text_field, options.subset),
        tokenizer=options.tokenizer.absolute(),
        output=options.output.absolute(),
        encoder=options.encoder,
        max_bad_records=options.max_bad_records,
        shard_bytes=options.shard_bytes,
    )
    if options.hostfile is not None:
        hosts = [host.name for host in read_hostfile(options.hostfile)]
        for failure in prepare_on_hosts(job, hosts, _agent_arguments(options)):
            print(f"{failure}; finishing its share here", file=sys.stderr)
    workers = max(1, options.workers or os.cpu_count() or 1)
    try:
        table = summarise(prepare(job, workers, options.share, options.mpi))
    except BrokenExecutor:
        print("tinyllama-ds: a worker was killed, perhaps for memory; start again, shards are kept", file=sys.stderr)
        return EXIT_RESTART
    if others := count_other_files(options.input):
        print(f"{options.input}: {others:,} files of other kinds were not read", file=sys.stderr)
    return _print_result(options, table, _prepare_text(options.source, table))


def _agent_arguments(options: argparse.Namespace) -> list[str]:
    """The same preparation on another host, paths made absolute."""
    arguments = ["prepare", "--source", options.source, "--input", str(options.input.absolute())]
    arguments += ["--tokenizer", str(options.tokenizer.absolute()), "--output", str(options.output.absolute())]
    arguments += ["--encoder", options.encoder, "--max-bad-records", str(options.max_bad_records)]
    arguments += ["--shard-bytes", str(options.shard_bytes)]
    arguments += ["--text-field", options.text_field] if options.text_field else []
    arguments += ["--workers", str(options.workers)] if options.workers else []
    return arguments + (["--subset", *options.subset] if options.subset else [])


def _prepare_text(source: str, table: dict[str, dict]) -> str:
    lines = []
    for split, row in table.items():
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in row["rejected"].items()) or "none"
        encoders = ", ".join(f"{count:,} by {name}" for name, count in row["encoders"].items())
        lines.append(
            f"{source}/{split}: {row['files']:,} files ({encoders}), {row['records']:,} records,"
            f" {row['documents']:,} documents, rejected: {rejected}, {len(row['faults']):,} bad;"
            f" {row['tokens']:,} tokens, {row['bytes_per_token']:.2f} bytes per token, {row['shards']:,} shards"
        )
        lines += [f"  bad: {fault}" for fault in row["faults"]] + [f"  {fallback}" for fallback in row["fallbacks"]]
    return "\n".join(lines)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", type=Path, nargs="+", metavar="FILE", help="in the order in which they are joined")
    parser.add_argument("--source", required=True, help="the name that recipes give it")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="tokenizer.model", help="what made the tokens")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the data directory")
    _add_json(parser)


def _import_megatron(options: argparse.Namespace) -> int:
    """Make Megatron's .idx files (their .bin beside them) usable for training, without a copy."""
    from tinyllama_ds.data.imports import Import, import_megatron

    job = Import(options.source, options.split, options.tokenizer, options.output)
    return _print_imported(options, import_megatron(job, options.inputs))


def _import_litpkds(options: argparse.Namespace) -> int:
    """Turn the LITPKDS chunks of TinyLlama's own scripts into shards."""
    from tinyllama_ds.data.imports import Import, import_litpkds

    job = Import(options.source, options.split, options.tokenizer, options.output)
    return _print_imported(options, import_litpkds(job, options.inputs))


def _print_imported(options: argparse.Namespace, manifests: "list[Manifest]") -> int:
    result = {
        "shards": len(manifests),
        "documents": sum(manifest.documents for manifest in manifests),
        "tokens": sum(manifest.tokens for manifest in manifests),
        "filler_tokens": sum(manifest.source_format.get("filler_tokens_left_out", 0) for manifest in manifests),
    }
    text = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in result.items())
    return _print_result(options, result, f"{options.source}/{options.split}: {text}")


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument("--recipe", help="also prove that this recipe trains on it as it says")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument(
        "--raw", action="append", default=[], metavar="SOURCE=DIR", help="compare random documents with the raw input"
    )
    parser.add_argument(
        "--samples", type=_count, default=20, help="documents per shard to compare (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="HTML", help="default: DATA_DIR/audit.html")
    _add_json(parser)


def _audit(options: argparse.Namespace) -> int:
    """Check every token of a data directory, and that a recipe trains on all of it as it says."""
    from tinyllama_ds.data.audit import audit_data
    from tinyllama_ds.data.audit_page import audit_page, verdict
    from tinyllama_ds.data.coverage import check_coverage
    from tinyllama_ds.plan import micro_batch_of

    coverage = None
    if options.recipe is not None:
        plan, order, _ = _planned_order(options.recipe, options.data)
        micro_batch_of(plan, None, options.world_size)  # refuses a number of ranks that no batch divides over
        coverage = check_coverage(order, [stage.batch for stage in plan.stages], options.world_size)
    audit = audit_data(options.data, _raw_inputs(options.raw), options.samples, options.workers)
    output = options.output or options.data / "audit.html"
    output.write_text(audit_page(audit, coverage, f"Audit of {options.data}"), encoding="utf-8")
    problems = audit.problems + (coverage.problems if coverage else [])
    warnings = audit.warnings + (coverage.warnings if coverage else [])
    result = {"good": not problems, "problems": problems, "warnings": warnings, "page": str(output)}
    _print_result(options, result, f"{verdict(audit, coverage)}\n{output}")
    return EXIT_REFUSED if problems else EXIT_FINISHED


def _raw_inputs(pairs: list[str]) -> dict[str, Path]:
    named = [pair.partition("=") for pair in pairs]
    for source, separator, directory in named:
        if not separator or not Path(directory).exists():
            raise Refusal(f"--raw {source}{separator}{directory}: expected SOURCE=DIR with a directory that exists")
    return {source: Path(directory) for source, _, directory in named}


def _planned_order(recipe_name: str, data: Path) -> "tuple[RunPlan, SampleOrder, dict[str, TokenStream]]":
    """What a recipe makes of a data directory."""
    from tinyllama_ds.data.order import MixtureStage, SampleOrder
    from tinyllama_ds.data.shards import TokenStream
    from tinyllama_ds.plan import RunPlan
    from tinyllama_ds.recipe import load_recipe

    recipe = load_recipe(recipe_name)
    plan = RunPlan(recipe)
    streams = {name: TokenStream(data / name / "train") for name in recipe.sources}
    sizes = {name: stream.num_samples(recipe.sequence_length) for name, stream in streams.items()}
    mixtures = [MixtureStage(stage.samples, stage.weights, stage.ramp_samples) for stage in plan.stages]
    return plan, SampleOrder(recipe.seed, sizes, mixtures), streams


def _add_data(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    show = actions.add_parser("show", help="print the texts that a step trains on")
    show.add_argument("step", type=int, metavar="STEP", help="from 0")
    show.add_argument("--recipe", required=True)
    show.add_argument("--data", type=Path, required=True, metavar="DIR")
    show.add_argument("--limit", type=_count, default=8, metavar="N", help="samples to print (default: %(default)s)")
    _add_json(show)


def _data(options: argparse.Namespace) -> int:
    """Look into prepared data: `show` prints the texts that a step trains on."""
    from tinyllama_ds.data.show import show_samples
    from tinyllama_ds.data.tokenizer import TOKENIZER_FILE, Tokenizer

    plan, order, streams = _planned_order(options.recipe, options.data)
    if not 0 <= options.step < plan.total_steps:
        raise Refusal(f"step {options.step}: the recipe {options.recipe!r} has steps 0 to {plan.total_steps - 1}")
    step = plan.step(options.step)
    positions = range(step.first_position, step.first_position + min(options.limit, step.batch))
    tokenizer = Tokenizer(options.data / TOKENIZER_FILE)
    shown = list(show_samples(streams, order, positions, plan.sequence_length, tokenizer))
    lines = [
        f"=== position {sample.position}: {sample.source}, epoch {sample.epoch}, sample {sample.sample},"
        f" {sample.place}\n{sample.text}"
        for sample in shown
    ]
    return _print_result(options, {"samples": [asdict(sample) for sample in shown]}, "\n".join(lines))


# --- training -----------------------------------------------------------------------------------------------------


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `tinyllama-ds pretrain` and `scripts/pretrain.py` share."""
    parser.add_argument("--recipe", required=True, help="name of a shipped recipe, or a TOML file")
    parser.add_argument(
        "--deepspeed-config", "--deepspeed_config", type=Path, required=True, metavar="JSON", help="DeepSpeed config"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data directory made by prepare")
    parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="where the run lives")
    parser.add_argument(
        "--resume", choices=("auto", "must", "never"), default="auto", help="from the newest checkpoint (%(default)s)"
    )
    parser.add_argument(
        "--attention", default="auto", help="auto, flash_attention_2, sdpa, blocked ... (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the decoder blocks one by one")
    parser.add_argument(
        "--activation-checkpointing",
        type=int,
        default=0,
        metavar="K",
        help="to save memory, compute every K-th block again in the backward pass; 1 is all, 0 none (default)",
    )


def run_options(namespace: argparse.Namespace) -> "Options":
    """The typed form of `add_run_arguments`."""
    from tinyllama_ds.training.run import Options

    return Options(
        recipe=namespace.recipe,
        deepspeed_config=namespace.deepspeed_config,
        data=namespace.data,
        run_dir=namespace.run_dir,
        resume=namespace.resume,
        attention=namespace.attention,
        compile=namespace.compile,
        activation_checkpointing=namespace.activation_checkpointing,
    )


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=Path, metavar="H", help="machines, lines of 'host slots=N'")
    where.add_argument("--num-gpus", type=int, metavar="N", help="ranks on this machine (default: its GPUs, else 2)")
    parser.add_argument(
        "--step-timeout", type=float, default=600, metavar="SECONDS", help="restart a run that is stuck for so long"
    )
    parser.add_argument("--max-wall-time", type=float, metavar="MINUTES", help="then save and exit with code 75")


def _pretrain(options: argparse.Namespace) -> int:
    """Train under the deepspeed launcher; restarts and resumes by itself."""
    from tinyllama_ds.launch.launcher import start_launcher
    from tinyllama_ds.launch.lock import hold_run
    from tinyllama_ds.launch.supervisor import RankSide, Watch, supervise
    from tinyllama_ds.training.checkpoint import newest_progress
    from tinyllama_ds.training.faults import RESTART_VARIABLE
    from tinyllama_ds.training.heartbeat import HEARTBEAT_VARIABLE, STACKS_SIGNAL, SUPERVISOR_VARIABLE
    from tinyllama_ds.training.run import STATUS_FILE
    from tinyllama_ds.training.stop import STOP_FILE

    placement = _placement(options)
    _check_run(options, placement)
    watch = Watch(
        status_file=options.run_dir / STATUS_FILE,
        stop_file=options.run_dir / STOP_FILE,
        committed=lambda: newest_progress(options.run_dir),
        step_seconds=options.step_timeout,
        start_seconds=max(_START_SECONDS, options.step_timeout),
        max_seconds=options.max_wall_time and 60 * options.max_wall_time,
    )
    ranks = RankSide(SUPERVISOR_VARIABLE, HEARTBEAT_VARIABLE, RESTART_VARIABLE, STACKS_SIGNAL)
    arguments = _run_arguments(options)
    with hold_run(options.run_dir) as lock:
        supervised = supervise(lambda variables: start_launcher(placement, arguments, variables), watch, lock, ranks)
    _say_goodput(options.run_dir, supervised)
    return supervised.code


def _check_run(options: argparse.Namespace, placement: "Placement") -> None:
    import torch

    from tinyllama_ds.training.engine import supports_fast_bf16
    from tinyllama_ds.training.run import check_run_directory, resolve_run

    device_type = "cpu" if placement.on_cpu else "cuda"
    bf16 = supports_fast_bf16(torch.device(device_type))
    check_run_directory(resolve_run(run_options(options), placement.world_size, device_type, bf16))


def _say_goodput(run_dir: Path, supervised: "Supervised") -> None:
    from tinyllama_ds.evaluation.report import read_metrics

    if not supervised.tokens:
        return
    peak = max(row.get("Speed/TokensPerSecond", 0.0) for row in read_metrics(run_dir))
    goodput = supervised.tokens / (peak * supervised.seconds)
    print(
        f"goodput {goodput:.1%}: {supervised.tokens:,} tokens committed in {supervised.seconds:,.0f} s, start-up,"
        f" validation, saving and {supervised.restarts} restarts included, at a peak of {peak:,.0f} tokens/s"
    )


def _placement(options: argparse.Namespace) -> "Placement":
    import torch

    from tinyllama_ds.launch.hostfile import read_hostfile
    from tinyllama_ds.launch.launcher import Placement

    on_cpu = not torch.cuda.is_available()
    if options.hostfile is not None:
        return Placement(options.hostfile, read_hostfile(options.hostfile), 0, on_cpu)
    available = min(2, os.cpu_count() or 1) if on_cpu else torch.cuda.device_count()
    wanted = available if options.num_gpus is None else options.num_gpus
    if wanted < 1 or (not on_cpu and wanted > available):
        raise Refusal(f"--num-gpus {wanted}: this machine has {available}")
    return Placement(None, [], wanted, on_cpu)


def _run_arguments(options: argparse.Namespace) -> list[str]:
    """The same run arguments for scripts/pretrain.py, paths made absolute for launchers that change directory."""
    recipe = options.recipe if not options.recipe.endswith(".toml") else str(Path(options.recipe).absolute())
    arguments = ["--deepspeed_config", str(options.deepspeed_config.absolute()), "--recipe", recipe]
    arguments += ["--data", str(options.data.absolute()), "--run-dir", str(options.run_dir.absolute())]
    arguments += ["--resume", options.resume, "--attention", options.attention]
    arguments += ["--activation-checkpointing", str(options.activation_checkpointing)]
    return arguments + (["--compile"] if options.compile else [])


# --- what comes out -----------------------------------------------------------------------------------------------


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("output", type=Path, metavar="OUT", help="Hugging Face folder to create")
    _add_json(parser)


def _export(options: argparse.Namespace) -> int:
    """Write a Hugging Face folder, after proving that transformers gives our logits and token ids."""
    from tinyllama_ds.convert import export

    weights, config, tokenizer = _load_checkpoint(options.checkpoint)
    difference = export(weights, config, tokenizer, options.output)
    result = {"output": str(options.output), "largest_logit_difference": difference}
    text = f"{options.output}: token ids equal, largest difference of logits {difference:.1e}"
    return _print_result(options, result, text)


def _load_checkpoint(path: Path) -> "tuple[dict[str, Tensor], LlamaConfig, Tokenizer]":
    from tinyllama_ds.data.tokenizer import TOKENIZER_FILE, Tokenizer
    from tinyllama_ds.model.config import LlamaConfig
    from tinyllama_ds.training.checkpoint import consolidated_weights, resolve_checkpoint

    checkpoint = resolve_checkpoint(path)
    manifest, weights = consolidated_weights(checkpoint)
    return weights, LlamaConfig(**manifest.model), Tokenizer(checkpoint.parents[1] / TOKENIZER_FILE)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("prompt", metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    _add_json(parser)


def _generate(options: argparse.Namespace) -> int:
    """Continue a text from a checkpoint or a Hugging Face folder."""
    from tinyllama_ds.generate import Sampling, generate, load_hf_folder, serve_weights

    is_hf_folder = (options.model / "config.json").is_file()
    served = load_hf_folder(options.model) if is_hf_folder else serve_weights(*_load_checkpoint(options.model))
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    text = generate(served, options.prompt, sampling)
    return _print_result(options, {"prompt": options.prompt, "text": text}, text)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: RUN/report.png")
    _add_json(parser)


def _report(options: argparse.Namespace) -> int:
    """Draw the curves of a run, and print where it stands."""
    from tinyllama_ds.evaluation.report import draw, read_metrics, summarise

    rows = read_metrics(options.run)
    output = options.output or options.run / "report.png"
    draw(rows, output, str(options.run))
    summary = summarise(rows)
    text = "\n".join(f"{name:<40} {value:>14,.4g}" for name, value in summary.items())
    return _print_result(options, summary | {"picture": str(output)}, f"{text}\n{output}")


# --- speed --------------------------------------------------------------------------------------------------------


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tinyllama-1.1b", help="named size (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="T", help="default: %(default)s")
    parser.add_argument(
        "--deepspeed-config", type=Path, nargs="+", required=True, metavar="JSON", help="ZeRO files to compare"
    )
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[8], metavar="B", help="default: 8")
    parser.add_argument("--attention", nargs="+", default=["auto"], help="backends (default: auto)")
    parser.add_argument("--compile", choices=("on", "off", "both"), default="both", help="default: %(default)s")
    parser.add_argument("--activation-checkpointing", type=int, default=0, metavar="K", help="as in pretrain")
    parser.add_argument("--accumulation", type=int, default=4, help="micro batches per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps (default: %(default)s)")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="ranks (default: this machine's GPUs, else 2)")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="for bench.json and bench.png (%(default)s)")
    _add_json(parser)


def _bench(options: argparse.Namespace) -> int:
    """Measure tokens/s, MFU, memory and the split of a step over a grid of settings."""
    from tqdm import tqdm

    from tinyllama_ds import bench
    from tinyllama_ds.launch.launcher import MEASURE_SCRIPT, launcher_command, launcher_environment

    options.hostfile = None
    placement = _placement(options)
    for config in options.deepspeed_config:
        if not config.is_file():
            raise Refusal(f"{config}: the DeepSpeed config is missing")
    compiled = {"on": [True], "off": [False], "both": [False, True]}[options.compile]
    settings = bench.grid(options.deepspeed_config, options.micro_batch, options.attention, compiled)
    shared = {
        key: getattr(options, key)
        for key in ("model", "sequence_length", "activation_checkpointing", "accumulation", "steps")
    }
    measured = bench.measure_all(
        [setting | shared for setting in settings],
        lambda arguments: launcher_command(placement, arguments, MEASURE_SCRIPT),
        launcher_environment(placement),
    )
    rows = list(tqdm(measured, total=len(settings), desc="bench", unit="setting"))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    title = f"{options.model}, {options.sequence_length} tokens, {placement.world_size} ranks"
    bench.draw(rows, options.output / "bench.png", title)
    text = f"{bench.table(rows)}\n\n{bench.advice(rows)}\n{options.output / 'bench.png'}"
    return _print_result(options, {"rows": rows}, text)


if __name__ == "__main__":
    sys.exit(main())
