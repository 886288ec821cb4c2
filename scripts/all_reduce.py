#!/usr/bin/env python
"""What `tinyllama-ds doctor` starts on every rank to measure the network."""

from tinyllama_ds.benchmark.all_reduce import main
from tinyllama_ds.commands.arguments import COUNT, Parser, WholeNumber
from tinyllama_ds.train.engine import hard_exit

if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--mebibytes", type=WholeNumber(1, 16_384), default=64)
    parser.add_argument("--local_rank", type=COUNT, help="appended by the launcher; the environment is what counts")
    hard_exit(main(parser.parse_args().mebibytes))
