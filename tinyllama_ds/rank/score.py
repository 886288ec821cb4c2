"""Score a model on tasks on this rank: `tinyllama-ds evaluate` starts it, and torchrun can."""

from tinyllama_ds.commands.arguments import parse_rank_arguments
from tinyllama_ds.commands.evaluation import add_evaluate_arguments, evaluate_on_rank, prepare
from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.errors import EXIT_CONFIG, ConfigError, log
from tinyllama_ds.train.engine import hard_exit

if __name__ == "__main__":
    options = parse_rank_arguments(__doc__, add_evaluate_arguments)
    try:
        prepare(options)
        hard_exit(evaluate_on_rank(options, read_world()))
    except ConfigError as error:
        log(error)
        hard_exit(EXIT_CONFIG)
