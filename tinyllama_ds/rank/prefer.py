"""Tune a model on preferences on this rank: `tinyllama-ds prefer` starts one process of it per GPU."""

from tinyllama_ds.commands.arguments import as_dataclass, parse_rank_arguments
from tinyllama_ds.commands.trained.prefer import add_tuning_arguments
from tinyllama_ds.distributed.world import read_world, wait_for_turn
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, ConfigError, log
from tinyllama_ds.preference.tuning import Tuning, tune
from tinyllama_ds.train.engine import hard_exit

if __name__ == "__main__":
    tuning = as_dataclass(Tuning, parse_rank_arguments(__doc__, add_tuning_arguments))
    world = read_world()
    try:
        tune(tuning, world)
        hard_exit(EXIT_FINISHED)
    except ConfigError as error:
        wait_for_turn(world)
        log(error)
        hard_exit(EXIT_CONFIG)
