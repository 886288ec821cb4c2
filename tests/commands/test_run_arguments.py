"""The command line of `pretrain` reaches the ranks, which parse it again."""

import argparse
import shlex
from pathlib import Path

import pytest

from tinyllama_ds.cli import main
from tinyllama_ds.commands import training
from tinyllama_ds.commands.arguments import Parser, WholeNumber, parse_rank_arguments, with_absolute_paths, words_of
from tinyllama_ds.commands.benchmark import add_step_arguments
from tinyllama_ds.commands.evaluation import add_evaluate_arguments
from tinyllama_ds.commands.training import add_run_arguments, run_options

CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero1.json"


def add_mixed_arguments(parser: argparse.ArgumentParser) -> None:
    """Of every kind that argparse has and a command here may take."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--task-file", nargs="+")
    parser.add_argument("--allow-change", action="append", default=[])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--steps", type=WholeNumber(), default=3)
    parser.add_argument("--seed", type=WholeNumber(0), default=1)


def parsed(add: object, words: list[str]) -> argparse.Namespace:
    parser = Parser()
    add(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        ["run"],
        ["run", "--deterministic", "--seed", "0", "--steps", "3"],
        ["run", "--task-file", "a.yaml", "b.yaml", "--allow-change", "data", "--allow-change", "recipe.seed"],
    ],
)
def test_a_command_line_is_made_again_from_its_values(words: list[str]) -> None:
    here = parsed(add_mixed_arguments, words)
    again = words_of(add_mixed_arguments, here)
    assert parsed(add_mixed_arguments, again) == here
    assert "--steps" not in again, "a default needs no words"


@pytest.mark.parametrize("add", [add_run_arguments, add_step_arguments, add_evaluate_arguments])
def test_every_option_reaches_the_ranks(add: object) -> None:
    parser = Parser()
    add(parser)
    exclusive = {action for group in parser._mutually_exclusive_groups for action in group._group_actions[1:]}
    words = []
    for action in parser._actions:
        if action.dest != "help" and action not in exclusive:
            words += [*action.option_strings[-1:], *value_unlike_the_default(action)]
    here = parser.parse_args(words)
    for name, value in vars(here).items():
        assert value != parser.get_default(name) or name in {action.dest for action in exclusive}, name
    assert parsed(add, words_of(add, here)) == here


def value_unlike_the_default(action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return []
    if action.choices:
        return [next(choice for choice in action.choices if choice != action.default)]
    return [str(max(5, action.type.least))] if isinstance(action.type, WholeNumber) else ["some.toml"]


def test_an_option_is_declared_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A new one in the parser is on the command line of the ranks, and there in what they parse: nothing else is
    edited.
    """

    def with_another(parser: argparse.ArgumentParser) -> None:
        add_run_arguments(parser)
        parser.add_argument("--brand-new", type=WholeNumber())

    monkeypatch.setattr(training, "add_run_arguments", with_another)
    monkeypatch.setattr(training, "_check_run", lambda options, placement: None)
    monkeypatch.setattr(training, "_check_engine", lambda options, placement, run: None)
    arguments = [
        "--recipe",
        "demo",
        "--deepspeed-config",
        "zero1",
        "--data",
        "data",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert main(["pretrain", *arguments, "--num-gpus", "2", "--dry-run", "--brand-new", "7"]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr("sys.argv", command[command.index("tinyllama_ds.rank.pretrain") :])
    on_a_rank = parse_rank_arguments(None, with_another)
    assert on_a_rank.brand_new == 7
    assert on_a_rank.deepspeed_config == CONFIG
    assert on_a_rank.data == Path("data").absolute()
    options = run_options(on_a_rank)
    assert (options.recipe, options.allow_change) == ("demo", ())


def test_paths_are_those_of_the_working_directory_that_the_command_was_given_in() -> None:
    arguments = ["--recipe", "mine.toml", "--deepspeed-config", "a.json", "--data", "d", "--run-dir", "r"]
    options = with_absolute_paths(parsed(add_run_arguments, arguments))
    assert options.recipe == str(Path.cwd() / "mine.toml")
    assert options.run_dir == Path.cwd() / "r"
