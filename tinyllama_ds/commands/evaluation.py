"""The command that scores a model on tasks."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_ds.commands.arguments import POSITIVE, WholeNumber, add_shared, output_folder, words_of
from tinyllama_ds.commands.placement import local_placement
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.commands.trained.long_context import (
    add_long_context_arguments,
    check_long_context_arguments,
    long_context_outputs,
    measure_long_context,
)
from tinyllama_ds.distributed.session import run_in_session
from tinyllama_ds.errors import EXIT_FINISHED, ConfigError
from tinyllama_ds.evaluation.harness import Ranks, evaluate, language_model
from tinyllama_ds.evaluation.sandbox import open_sandbox
from tinyllama_ds.evaluation.scores import Evaluation, as_json, as_markdown, read_scores, scores_figure
from tinyllama_ds.evaluation.suites import HUMANEVAL, LONG_CONTEXT, suite_named
from tinyllama_ds.launch.launcher import SCORE, launcher_command, launcher_environment
from tinyllama_ds.outputs import check_folder, reporting_write_errors, write_figure, write_file

if TYPE_CHECKING:
    from tinyllama_ds.distributed.world import DistributedInfo

_PACKAGES = ("lm-eval", "transformers", "torch", "datasets", "tokenizers")
_COLLECTIVE_TIMEOUT = timedelta(days=1)  # a rank with shorter texts waits for the others; a dead one ends them all


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, which tasks, and how; the ranks are started with the same arguments."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="checkpoint, run directory, model folder, HF folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", help="commonsense, instruct, chinese: TinyLlama's published ones; or long-context")
    what.add_argument("--tasks", metavar="A,B", help="tasks or groups of lm-eval, and suites")
    what.add_argument("--task-file", nargs="+", metavar="YAML", help="task files of your own, in lm-eval's format")
    add("--shots", type=WholeNumber(0, 1000), metavar="N", help="examples in the prompt (default: the task's own)")
    add("--limit", type=POSITIVE, metavar="N", help="only the first N documents of each task, to try it out")
    add("--data-dir", type=Path, metavar="DIR", help="datasets on disk, without access to the hub")
    add("--batch-size", type=WholeNumber(1, 100_000), default=32, metavar="B", help="per rank")
    arithmetic = (
        "of weights and arithmetic (default: float32, as for the published scores; of long contexts on GPUs bfloat16)"
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=arithmetic)
    add("--device", choices=("cuda", "cpu"), help="default: cuda if available")
    add_shared(parser, "--num-gpus", help="ranks on this machine (default: its GPUs, else 1)")
    add("--allow-code-execution", action="store_true", help="HumanEval: run what the model writes, in a sandbox")
    add("--output", type=output_folder, metavar="DIR", help="default: RUN/evaluation/STEP, or evaluation/MODEL")
    add_shared(parser, "--json")
    add_long_context_arguments(parser)


def _evaluate(options: argparse.Namespace) -> int:
    """Score a model on tasks of lm-eval, next to TinyLlama's published scores."""
    prepare(options)
    from tinyllama_ds.distributed.world import read_world

    world = read_world()
    ranks = _wanted_ranks(options) if world.size == 1 else 1
    return evaluate_on_rank(options, world) if ranks == 1 else _start_ranks(ranks, options)


def prepare(options: argparse.Namespace) -> None:
    """Check the options, and decide whether there is a hub, before anything of Hugging Face is imported."""
    from tinyllama_ds.evaluation.tasks import require_lm_eval, set_offline_if_hub_unreachable

    _check_arguments(options)
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # whatever the GPUs are like
    if options.suite != LONG_CONTEXT:
        require_lm_eval()
        set_offline_if_hub_unreachable(options.data_dir)


def _check_arguments(options: argparse.Namespace) -> None:
    if options.suite and options.suite != LONG_CONTEXT:
        suite_named(options.suite)
    check_long_context_arguments(options)
    if options.shots is not None and options.suite:
        raise ConfigError("--shots is for --tasks and --task-file; a suite has those of the published table")
    if not options.model.exists():
        raise ConfigError(
            f"{options.model}: is missing; expected a checkpoint, a run directory or a Hugging Face folder"
        )


def _wanted_ranks(options: argparse.Namespace) -> int:
    placement = local_placement(options.num_gpus)
    return 1 if options.num_gpus is None and placement.on_cpu else placement.world_size


def _start_ranks(ranks: int, options: argparse.Namespace) -> int:
    """Run this command on every rank, under the deepspeed launcher."""
    placement = local_placement(ranks)
    command = launcher_command(placement, words_of(add_evaluate_arguments, options), SCORE)
    return run_in_session(command, launcher_environment(placement))


def evaluate_on_rank(options: argparse.Namespace, world: "DistributedInfo") -> int:
    """What every rank does. An error of all ranks is printed by rank 0. Collective."""
    import torch

    from tinyllama_ds.bars import bars_as_lines
    from tinyllama_ds.distributed.world import wait_for_turn

    if options.device == "cpu":
        world = replace(world, device=torch.device("cpu"))
    elif options.device == "cuda" and world.device.type != "cuda":
        raise ConfigError("--device cuda: this machine has no GPU that PyTorch sees")
    try:
        with bars_as_lines():
            return _evaluate_on_rank(options, world)
    except ConfigError:
        wait_for_turn(world)
        raise


def _evaluate_on_rank(options: argparse.Namespace, world: "DistributedInfo") -> int:
    if not world.is_rank0:
        os.environ["TQDM_DISABLE"] = "1"
    where = _output_folder(options)
    check_folder(where)
    if options.dtype is None:
        is_long = options.suite == LONG_CONTEXT and world.device.type == "cuda"
        options.dtype = "bfloat16" if is_long else "float32"
    found = (_long_context if options.suite == LONG_CONTEXT else _scores)(options, world)
    return _write(options, found, where) if world.is_rank0 else EXIT_FINISHED


def _scores(options: argparse.Namespace, world: "DistributedInfo") -> dict[str, Any]:
    names = {benchmark.task for benchmark in suite_named(options.suite).benchmarks} if options.suite else None
    ranks = _join(world)
    tasks = _load_tasks(options, world)
    model, tokenizer, tokens = _load_model(options, world)
    results = evaluate(lambda: language_model(model, tokenizer, options.batch_size), tasks, ranks, options.limit)
    scores, versions = read_scores(results, names), _versions(*_PACKAGES)
    settings = _settings(options, world)
    return as_json(Evaluation(str(options.model), tokens, options.suite, scores, settings, versions), results)


def _long_context(options: argparse.Namespace, world: "DistributedInfo") -> dict[str, Any]:
    ranks = _join(world)
    model, tokenizer, tokens = _load_model(options, world)
    return {
        "model": str(options.model),
        "tokens": tokens,
        "suite": options.suite,
        "long_context": measure_long_context(options, model, tokenizer, ranks),
        "settings": {"dtype": options.dtype, "ranks": world.size, "device": world.device.type},
        "versions": _versions("transformers", "torch", "tokenizers"),
    }


def _versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in packages}


def _join(world: "DistributedInfo") -> Ranks:
    from tinyllama_ds.distributed.collectives import gather_from_ranks
    from tinyllama_ds.train.engine import start_process_group

    if world.size == 1:
        return Ranks()
    start_process_group(world, _COLLECTIVE_TIMEOUT)
    return Ranks(world.rank, world.size, gather_from_ranks)


def _load_tasks(options: argparse.Namespace, world: "DistributedInfo") -> dict[str, Any]:
    from tinyllama_ds.evaluation.tasks import benchmarks_of, load_named

    names = [options.suite] if options.suite else options.task_file or options.tasks.split(",")
    passes: Callable[[str], bool] | None = None
    if options.allow_code_execution and HUMANEVAL in benchmarks_of(names):
        # Every rank has all completions; one of them runs them.
        passes = open_sandbox().passes if world.is_rank0 else lambda program: False
    return load_named(names, options.data_dir, passes, options.shots)


def _load_model(options: argparse.Namespace, world: "DistributedInfo") -> tuple[Any, Any, int | None]:
    """transformers' model and tokenizer, and the tokens that it was trained on, where that is known."""
    import torch

    from tinyllama_ds.hf.convert import load_hf_folder

    dtype = getattr(torch, options.dtype)
    if not (options.model / "config.json").is_file():
        return _load_stored(options.model, dtype, world)
    model, tokenizer = load_hf_folder(options.model, dtype)
    return model.to(world.device), tokenizer, None


def _load_stored(path: Path, dtype: Any, world: "DistributedInfo") -> tuple[Any, Any, int | None]:
    """Rank 0 puts the weights of all shards together and sends them on: once in memory, not once per rank."""
    from tinyllama_ds.commands.trained.stored import open_stored
    from tinyllama_ds.distributed.collectives import broadcast_state_dict
    from tinyllama_ds.hf.convert import hf_model, hf_tokenizer
    from tinyllama_ds.hf.weights import parameter_shapes

    stored = open_stored(path)
    weights = {name: tensor.to(dtype, copy=True) for name, tensor in stored.tensors} if world.is_rank0 else {}
    if world.size > 1:
        weights = broadcast_state_dict(weights, parameter_shapes(stored.config), dtype, world)
    model = hf_model(weights, stored.config, stored.tokenizer).to(world.device)
    return model, hf_tokenizer(stored.tokenizer, stored.config.max_position_embeddings), stored.tokens


def _settings(options: argparse.Namespace, world: "DistributedInfo") -> dict[str, Any]:
    settings = {
        "decoding": "greedy",
        "dtype": options.dtype,
        "batch size": options.batch_size,
        "ranks": world.size,
        "device": world.device.type,
        "seeds": "0, 1234, 1234, 1234",
    }
    if options.limit:
        settings["limit"] = f"first {options.limit} documents of each task only"
    return settings


def _output_folder(options: argparse.Namespace) -> Path:
    if options.output is not None:
        return options.output
    from tinyllama_ds.checkpoint.format import resolve_checkpoint
    from tinyllama_ds.hf.model_folder import is_model_folder

    if (options.model / "config.json").is_file() or is_model_folder(options.model):
        return Path("evaluation") / options.model.resolve().name

    checkpoint = resolve_checkpoint(options.model).resolve()
    return checkpoint.parents[1] / "evaluation" / checkpoint.name


def _write(options: argparse.Namespace, found: dict[str, Any], where: Path) -> int:
    """Print the scores, whatever becomes of the files."""
    stem = options.suite or "tasks"
    is_long = stem == LONG_CONTEXT
    text, figure = long_context_outputs(found) if is_long else (as_markdown(found), scores_figure(found))
    sys.stderr.flush()
    code = print_result(options, found, f"{text}\n{where / stem}.md, .json and .png")
    with reporting_write_errors(where):
        where.mkdir(parents=True, exist_ok=True)
    write_file(where / f"{stem}.md", text)
    write_file(where / f"{stem}.json", json.dumps(found, indent=1, default=str) + "\n")
    write_figure(figure, where / f"{stem}.png")
    return code


COMMANDS = (("evaluate", add_evaluate_arguments, _evaluate),)
