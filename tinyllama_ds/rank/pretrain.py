"""Train on this rank; `tinyllama-ds pretrain` starts one process of it per GPU."""

from tinyllama_ds.commands.arguments import parse_rank_arguments
from tinyllama_ds.commands.training import add_run_arguments, run_options
from tinyllama_ds.planning.fit import estimate_memory
from tinyllama_ds.train.engine import hard_exit
from tinyllama_ds.train.pretrain import pretrain


def main() -> None:
    """Parse and train; does not return."""
    options = parse_rank_arguments(__doc__, add_run_arguments)
    hard_exit(pretrain(run_options(options), estimate_memory))


if __name__ == "__main__":
    main()
