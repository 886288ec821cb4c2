"""What the command line of `pretrain` says reaches the ranks, which read it again from their own."""

import argparse
from pathlib import Path

from tinyllama_ds.commands.arguments import WholeNumber
from tinyllama_ds.commands.training import _run_arguments, add_run_arguments, run_options


def test_every_option_reaches_the_ranks() -> None:
    """An option that `_run_arguments` forgets would be dropped in silence."""
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    said, dropped = [], []
    for action in parser._actions:
        if action.dest != "help":
            said += [action.option_strings[-1], *value_unlike_the_default(action)]
    here = parser.parse_args(said)
    on_a_rank = parser.parse_args(_run_arguments(here))
    for name, value in vars(here).items():
        assert value != parser.get_default(name), name
        if absolute(getattr(on_a_rank, name)) != absolute(value):
            dropped.append(name)
    assert dropped == []
    assert vars(run_options(on_a_rank)).keys() == vars(here).keys()  # and none is forgotten on the way to the run


def value_unlike_the_default(action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return []
    if action.choices:
        return [next(choice for choice in action.choices if choice != action.default)]
    return ["3"] if isinstance(action.type, WholeNumber) else ["some.toml"]


def absolute(value: object) -> object:
    return str(Path(value).absolute()) if isinstance(value, Path) or value == "some.toml" else value
