"""Measure the network on this rank, for `tinyllama-ds doctor`."""

from tinyllama_ds.benchmark.all_reduce import main
from tinyllama_ds.commands.arguments import parse_rank_arguments
from tinyllama_ds.train.engine import hard_exit

if __name__ == "__main__":
    parse_rank_arguments(__doc__)
    hard_exit(main())
