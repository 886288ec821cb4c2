#!/usr/bin/env python
"""What the deepspeed launcher (or torchrun) starts on every rank; see `--help`."""

from tinyllama_ds.commands.arguments import COUNT, Parser
from tinyllama_ds.commands.training import add_run_arguments, run_options
from tinyllama_ds.planning.fit import estimate_memory
from tinyllama_ds.train.engine import hard_exit
from tinyllama_ds.train.pretrain import pretrain

if __name__ == "__main__":
    parser = Parser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--local_rank", type=COUNT, help="appended by the launcher; the environment is what counts")
    hard_exit(pretrain(run_options(parser.parse_args()), estimate_memory))
