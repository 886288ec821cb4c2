"""Measure one setting of `tinyllama-ds bench` on this rank."""

from tinyllama_ds.benchmark.measure import Setting, main
from tinyllama_ds.commands.arguments import as_dataclass, parse_rank_arguments
from tinyllama_ds.commands.benchmark import add_setting_arguments, add_step_arguments
from tinyllama_ds.train.engine import hard_exit

if __name__ == "__main__":
    options = parse_rank_arguments(__doc__, add_setting_arguments, add_step_arguments)
    hard_exit(main(as_dataclass(Setting, options), options.output))
