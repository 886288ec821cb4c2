"""Every command in the README and the docs parses, and every path that they name exists."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from tinyllama_ds.cli import command_parser
from tinyllama_ds.commands.training import add_run_arguments

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "ON_GPU.md"),
    *(page for folder in ("docs", "ds_configs", "hostfiles") for page in sorted((ROOT / folder).glob("*.md"))),
]


def commands_of(page: Path) -> list[list[str]]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)
        for line in lines
        if line.startswith(("tinyllama-ds ", "deepspeed ", "torchrun "))
    ]


COMMANDS = [
    pytest.param(command, id=f"{page.name}-{n}") for page in PAGES for n, command in enumerate(commands_of(page))
]

# DeepSpeed configs that commands of the pages write.
WRITTEN = {
    Path(command[3]).with_suffix(".json")
    for page in PAGES
    for command in commands_of(page)
    if command[1:3] == ["recipe", "new"]
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: list[str]) -> None:
    if command[0] == "tinyllama-ds":
        parsed = command_parser().parse_args(command[1:])
    else:
        program = next(part for part in command if part in ("scripts/pretrain.py", "tinyllama_ds.rank.pretrain"))
        parser = argparse.ArgumentParser()
        add_run_arguments(parser)
        parsed = parser.parse_args(command[command.index(program) + 1 :])
    for name in ("deepspeed_config", "hostfile"):
        given = getattr(parsed, name, None)
        for path in given if isinstance(given, list) else [given]:
            assert path is None or path in WRITTEN or (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    for target in targets:
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|scripts|docs|tinyllama_ds)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_readme_names_every_shipped_zero_config() -> None:
    table = (ROOT / "ds_configs" / "README.md").read_text()
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert f"`{path.name}`" in table, path.name
