"""What messages and pages tell a user to type exists: options and commands of ours, and files of the checkout."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllama_ds.cli import command_parser

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tinyllama_ds").rglob("*.py"))
# Words of other programs' command lines, or of style sheets, and nothing for a user to type.
NO_HINTS = {"evaluation/sandbox.py", "launch/launcher.py", "page.py"}
OTHERS = {
    "data/prepare/inputs.py": {"--keep"},  # of gunzip
    "data/prepare/reading.py": {"--long"},  # of zstd
    "commands/arguments.py": {"--local_rank"},
    "commands/trained/prefer.py": {"--folder", "--work"},  # of the ranks  # of ranks
    "hardware/devices.py": {"--query-gpu", "--format", "--gpus-per-task"},  # of nvidia-smi and srun
    "launch/machines.py": {"--nodes", "--ntasks", "--nodelist"},  # of srun
    "rank/__init__.py": {"--module"},  # of deepspeed
    "launch/probe.py": {"--always", "--dirty"},  # of git
}


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers_of(child)


PARSERS = {parser.prog: parser for parser in parsers_of(command_parser())}
OPTIONS = {option for parser in PARSERS.values() for action in parser._actions for option in action.option_strings}


def texts_of(path: Path) -> Iterator[str]:
    """All strings of a file, parts of f-strings with a gap where a value stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_name_options_and_commands_that_there_are(path: Path) -> None:
    name = str(path.relative_to(ROOT / "tinyllama_ds"))
    for text in texts_of(path) if name not in NO_HINTS else ():
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            assert option in OPTIONS | OTHERS.get(name, set()), f"{path}: {option} in {text!r}"
        for command in re.findall(r"(?<![/\w])tinyllama-ds ([a-z][a-z-]*)", text):
            assert f"tinyllama-ds {command}" in PARSERS, f"{path}: {command} in {text!r}"
        for option, command in named_together(text):
            known = {option for action in PARSERS[command]._actions for option in action.option_strings}
            assert option in known, f"{path}: {option} of {command} in {text!r}"


def named_together(text: str) -> Iterator[tuple[str, str]]:
    """Options that follow the name of their command: `evaluate --task-file`, `pretrain --a X --b`."""
    names = "|".join(prog.split()[-1] for prog in PARSERS if " " in prog)
    for command, rest in re.findall(rf"(?<![\w-])({names})((?: (?:[A-Za-z]+ )?--[a-z][\w-]*)+)", text):
        for option in re.findall(r"--[a-z][\w-]*", rest):
            yield option, next(prog for prog in PARSERS if prog.split()[-1] == command)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_name_files_that_there_are(path: Path) -> None:
    for text in texts_of(path):
        for file in re.findall(r"\b((?:docs|scripts|ds_configs|hostfiles)/[\w.-]+\.\w+)", text):
            assert (ROOT / file).is_file(), f"{path}: {file} in {text!r}"
