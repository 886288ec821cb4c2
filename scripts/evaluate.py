#!/usr/bin/env python
"""What `tinyllama-ds evaluate` starts on every rank; torchrun can start it too."""

import sys

from tinyllama_ds.commands.arguments import COUNT, Parser
from tinyllama_ds.commands.evaluation import add_evaluate_arguments, evaluate_on_rank, prepare
from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.errors import EXIT_CONFIG, ConfigError
from tinyllama_ds.train.engine import hard_exit

if __name__ == "__main__":
    parser = Parser(description=__doc__)
    add_evaluate_arguments(parser)
    parser.add_argument("--local_rank", type=COUNT, help="appended by the launcher; the environment is what counts")
    options = parser.parse_args()
    try:
        prepare(options)
        hard_exit(evaluate_on_rank(options, read_world()))
    except ConfigError as error:
        print(f"tinyllama-ds: {error}", file=sys.stderr)
        hard_exit(EXIT_CONFIG)
