"""In which line of a TOML or JSON file each key is: parsers give values alone, and people look for lines."""

import json
import re
import tomllib
from collections import Counter
from pathlib import Path

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.inputs import read_text

KeyPath = tuple[int | str, ...]  # from the top of a file: keys, and places in arrays
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:\n]')
_TOML_TEXTS = re.compile(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'')  # of several lines
_TOML_TABLE = re.compile(r"\s*(\[\[?)([^\[\]]+)\]")
_TOML_KEY = re.compile(r"\s*([^\s#\[{=][^#\[{=]*)=")


def key_path(path: KeyPath) -> str:
    """A path as people write it: `stages[0].tokens`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def json_lines(text: str) -> dict[KeyPath, int]:
    """The line of every key of a valid JSON text, from 1; none where all of it is in one line."""
    lines: dict[KeyPath, int] = {}
    path: list[int | str] = []
    line, key = 1, ""
    for token in _JSON_TOKEN.findall(text.rstrip()):
        if token == "\n":
            line += 1
        elif token in "{[":
            path.append("" if token == "{" else 0)
        elif token in "}]":
            path.pop()
        elif token == ":":
            path[-1] = json.loads(key)
            lines[tuple(path)] = line
        elif token == ",":
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else ""
        else:
            key = token
    return lines if line > 1 else {}


def read_toml(path: Path, what: str) -> tuple[dict, dict[KeyPath, int]]:
    """The content of a TOML file and the lines of its keys; `what` it is, with its article: "the recipe".

    Raises `ConfigError` where it cannot be read, or is not valid.
    """
    text = read_text(path, what)
    try:
        raw = tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid TOML (its arrays or tables are nested too deeply)") from error
    return raw, toml_lines(text)


def toml_lines(text: str) -> dict[KeyPath, int]:
    """The line of every table and key that begins a line of a valid TOML text, from 1."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    entries: Counter[KeyPath] = Counter()  # of arrays of tables
    text = _TOML_TEXTS.sub(lambda found: "\n" * found[0].count("\n"), text)
    for number, line in enumerate(text.split("\n"), start=1):
        if found := _TOML_TABLE.match(line):
            table = _names(found[2])
            if found[1] == "[[":
                entries[table] += 1
                table = (*table, entries[table] - 1)
            lines.setdefault(table, number)
        elif found := _TOML_KEY.match(line):
            lines.setdefault((*table, *_names(found[1])), number)
    return lines


def _names(dotted: str) -> KeyPath:
    """The names of `a."b c"`; none of what is part of a value."""
    names: list[str] = []
    try:
        raw = tomllib.loads(f"{dotted} = 0")
    except ValueError:
        return ()
    while isinstance(raw, dict):
        name, raw = next(iter(raw.items()))
        names.append(name)
    return tuple(names)
