"""The command that writes a first recipe."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import add_shared, output_file
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.outputs import check_file, write_file

if TYPE_CHECKING:
    from tinyllama_ds.config.new_recipe import Draft


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    new = actions.add_parser("new", help="write a commented recipe with every key, and a DeepSpeed JSON for it")
    new.add_argument("file", type=output_file, metavar="FILE", help="TOML file to create; the JSON lies next to it")
    source = new.add_mutually_exclusive_group()
    source.add_argument("--like", metavar="NAME", help="with the values of a shipped recipe, or of a TOML file")
    source.add_argument("--from-hf", type=Path, metavar="FOLDER", help="with the model of a Hugging Face folder")
    add_shared(new, "--json")


def _recipe(options: argparse.Namespace) -> int:
    """Write a first recipe: `new` makes a commented one, and a DeepSpeed JSON that fits it."""
    from tinyllama_ds.config.new_recipe import config_text, recipe_text

    recipe = options.file
    if recipe.suffix != ".toml":
        raise ConfigError(f"{recipe}: is not the name of a recipe; expected one that ends with .toml")
    config = check_file(recipe.with_suffix(".json"))
    for path in (recipe, config):
        if path.exists():
            raise ConfigError(f"{path}: already exists; expected a new file")
    text = recipe_text(_draft(options))
    write_file(recipe, text)
    write_file(config, config_text())
    to_fill_in = [line.split()[1] for line in text.splitlines() if " # REQUIRED: " in line]
    arguments = f"--recipe {recipe} --deepspeed-config {config}"
    lines = [
        *(recipe, config),
        *([f"fill in {', '.join(to_fill_in)} in {recipe}, then"] if to_fill_in else []),
        f"tinyllama-ds plan {arguments}",
        "tinyllama-ds prepare --source SOURCE --input TEXTS --tokenizer TOKENIZER --output DATA  # of each source",
        f"tinyllama-ds pretrain {arguments} --data DATA --run-dir RUN",
    ]
    result = {"recipe": str(recipe), "deepspeed_config": str(config), "required": to_fill_in}
    return print_result(options, result, "\n".join(map(str, lines)))


def _draft(options: argparse.Namespace) -> "Draft":
    from tinyllama_ds.config.new_recipe import Draft, draft_like, draft_of_model

    name = options.file.stem
    if options.like is not None:
        return draft_like(name, options.like)
    if options.from_hf is None:
        return Draft(name)
    from tinyllama_ds.hf.import_model import CONFIG_FILE, read_config

    read_config(options.from_hf / CONFIG_FILE)  # raises for a model that our decoder is not
    return draft_of_model(name, options.from_hf / CONFIG_FILE)


COMMANDS = (("recipe", _add_recipe, _recipe),)
