"""The command that finishes a model from any checkpoint of a run."""

import argparse
from pathlib import Path

from tinyllama_ds.commands.arguments import Number, add_shared, token_count
from tinyllama_ds.commands.placement import add_placement_arguments
from tinyllama_ds.commands.training import add_kernel_arguments, add_supervision_arguments, pretrain
from tinyllama_ds.errors import log


def _add_decay(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints; it is only read")
    add(
        "--at",
        type=token_count,
        metavar="TOKENS",
        help="from its newest checkpoint of at most so many, 300B (default: all)",
    )
    add("--over", type=token_count, required=True, metavar="TOKENS", help="length of the decay, 30B; a tenth is usual")
    add("--decay-type", choices=("1-sqrt", "linear", "cosine"), default="1-sqrt", help="shape of the decay")
    add("--min-lr-ratio", type=Number(most=0.999, least=0.0), default=0.0, metavar="R", help="of the peak, at the end")
    add_shared(parser, "--data", "--run-dir")
    add_kernel_arguments(parser)
    add_placement_arguments(parser)
    add_supervision_arguments(parser)


def _decay(options: argparse.Namespace) -> int:
    """Train a branch of a run in which the learning rate falls to its minimum: a finished model from any checkpoint."""
    from tinyllama_ds.run.decay import plan_decay, write_once

    run_dir = options.run_dir
    decay = plan_decay(options.run, run_dir.name, options.at, options.over, options.decay_type, options.min_lr_ratio)
    recipe, config = Path(f"{run_dir}.toml"), Path(f"{run_dir}.json")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    write_once(recipe, decay.recipe)
    write_once(config, decay.deepspeed_config)
    log(f"{decay.checkpoint}: {decay.at:,} tokens, then a decay over {decay.over:,}; see {recipe} and {config}")
    branch = {"recipe": str(recipe), "deepspeed_config": config, "branch_from": decay.checkpoint}
    branch |= {"init_from": None, "without": None}
    return pretrain(argparse.Namespace(**vars(options) | branch | {"resume": "auto", "allow_change": []}))


COMMANDS = (("decay", _add_decay, _decay),)
