"""Argument types of the command lines: numbers have ranges; an error is one sentence and exit code 78."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tinyllama_ds.errors import EXIT_CONFIG, ConfigError, shown
from tinyllama_ds.outputs import check_file, check_folder, check_picture
from tinyllama_ds.shipped import shipped_config, shipped_hostfile

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse's parser with errors of one sentence and exit code 78."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> Any:
        for argument in sys.argv[1:] if args is None else args:
            try:
                argument.encode()
            except UnicodeEncodeError:
                self.error(f"{argument!a} is not UTF-8; expected text and paths in UTF-8")
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """With the default of every option that has one, unless its help mentions it."""
        for action in self._actions:
            is_value = type(action.default) in (str, int, float) and action.default not in ("", argparse.SUPPRESS)
            if is_value and action.help and "default" not in action.help:
                action.help += " (default: %(default)s)"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        named = re.sub(r"^argument (\S+): (.+): expected ", r"\1 \2: expected ", message, count=1, flags=re.DOTALL)
        sentence = named.removeprefix("argument ").replace("\r", "\\r").replace("\n", "\\n")
        self.exit(EXIT_CONFIG, f"tinyllama-ds: {sentence}; see {self.prog} --help\n")


@dataclass(frozen=True)
class WholeNumber:
    """An argument type: an integer of a range."""

    least: int = 1
    most: int = 1_000_000_000

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _wrong(text, f"a whole number from {self.least} to {self.most}") from None
        if value < self.least:
            raise _wrong(text, f"{self.least} or more")
        if value > self.most:
            raise _wrong(text, f"{self.most} or less")
        return value


def _wrong(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{shown(text)[1:-1] if text.strip() else repr(text)}: expected {expected}")


@dataclass(frozen=True)
class Number:
    """An argument type: a finite number above `above`, or from `least` on, up to `most`."""

    most: float
    least: float | None = None
    above: float = 0.0

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        is_low = value <= self.above if self.least is None else value < self.least
        if is_low or not value <= self.most:
            bound = f"above {self.above:g}" if self.least is None else f"from {self.least:g} on"
            raise _wrong(text, f"a number {bound}, {self.most:,.15g} at most")
        return value


@dataclass(frozen=True)
class Size:
    """An argument type: a number with its unit, such as 40GiB, as text."""

    units: tuple[str, ...]

    def __call__(self, text: str) -> str:
        match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?([A-Za-z]+)", text.strip(), re.ASCII)
        if match is None or match[2].lower() not in map(str.lower, self.units) or not float(match[1]) > 0:
            raise _wrong(text, f"a size such as 40{self.units[0]}, in {', '.join(self.units)}")
        return text.strip()


_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def token_count(text: str) -> int:
    """An argument type: a number of tokens, also as 300B or 1.5T."""
    match = re.fullmatch(r"(\d[\d_,]{0,20}(?:\.\d{1,6})?)([KMBT]?)", text.strip().upper(), re.ASCII)
    count = round(float(re.sub("[_,]", "", match[1])) * _MULTIPLES[match[2]]) if match else 0
    if not 1 <= count <= 10**15:
        raise _wrong(text, "a number of tokens, such as 300B, 1.5T or 2_000_000")
    return count


def argument_type(convert: Callable[[str], T]) -> Callable[[str], T]:
    """An argument type of a function that raises `ConfigError` for a wrong text."""

    def checked(text: str) -> T:
        try:
            return convert(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


deepspeed_config = argument_type(shipped_config)  # a DeepSpeed JSON by its path, or a shipped one by its name
hostfile = argument_type(shipped_hostfile)
output_file = argument_type(check_file)  # that can be written, or replaced
output_picture = argument_type(check_picture)
output_folder = argument_type(check_folder)  # in which files can be made; it need not exist

POSITIVE = WholeNumber()
COUNT = WholeNumber(0)
RANKS = WholeNumber(1, 1024)  # of one machine, or processes
SEED = WholeNumber(0, 2**63 - 1)
PORT = WholeNumber(1, 65_534)  # the lifeline takes the next one
SHARE = Number(most=1.0)
SECONDS = Number(most=1e8)
MINUTES = Number(most=1e6)
MEMORY_SIZE = Size(("GiB", "GB"))
FILE_SIZE = Size(("GB", "MB", "KB", "TB"))

_SHARED: dict[str, dict[str, Any]] = {
    "--recipe": {"required": True, "help": "name of a shipped recipe, or a TOML file"},
    "--deepspeed-config": {
        "type": deepspeed_config,
        "required": True,
        "metavar": "JSON",
        "help": "DeepSpeed config, or the name of a shipped one",
    },
    "--data": {"type": Path, "required": True, "metavar": "DIR", "help": "data directory made by prepare"},
    "--run-dir": {"type": Path, "required": True, "metavar": "DIR", "help": "directory of the run"},
    "--output": {"type": output_folder, "required": True, "metavar": "DIR", "help": "the data directory"},
    "--source": {"required": True, "help": "the name that recipes give it"},
    "--tokenizer": {"type": Path, "required": True, "metavar": "FILE", "help": "tokenizer.model or tokenizer.json"},
    "--text-field": {"help": "where the text is, for corpora of your own (default: text)"},
    "--hostfile": {"type": hostfile, "metavar": "H", "help": "lines of 'host slots=N'; or a shipped one by name"},
    "--num-gpus": {"type": RANKS, "metavar": "N", "help": "ranks on this machine (default: its GPUs, else 2)"},
    "--attention": {"default": "auto", "help": "auto, flash_attention_2, varlen, sdpa, blocked ..."},
    "--compile": {
        "choices": ("auto", "on", "off"),
        "default": "auto",
        "help": "torch.compile each decoder block; auto (the default): on GPUs, if it works",
    },
    "--activation-checkpointing": {
        "type": WholeNumber(0, 10_000),
        "default": 0,
        "metavar": "K",
        "help": "recompute every K-th block in the backward pass to save memory; 1: all, 0: none (default)",
    },
    "--activation-offloading": {
        "action": "store_true",
        "help": "keep the inputs of recomputed blocks in pinned host memory until the backward pass; on GPUs",
    },
    "--sequence-parallel": {
        "type": RANKS,
        "default": 1,
        "metavar": "N",
        "help": "N ranks of a host share each sequence (Ulysses), for long ones or few; 1: none (default)",
    },
    "--json": {"action": "store_true", "help": "print the result as JSON"},
}


def add_shared(parser: "argparse._ActionsContainer", *names: str, aliases: Sequence[str] = (), **changes: Any) -> None:
    """Add options that several commands have, with what differs in this one, such as the help."""
    for name in names:
        parser.add_argument(name, *aliases, **_SHARED[name] | changes)


def words_of(add_arguments: Callable[[argparse.ArgumentParser], None], options: argparse.Namespace) -> list[str]:
    """The command line from which a parser of these arguments gets the same values; defaults are omitted.

    It is generated from the declared arguments, so that none can be forgotten on the way to the ranks.
    """
    parser = Parser()
    add_arguments(parser)
    positional, optional = [], []
    for action in parser._actions:  # argparse has no public list of them
        value = getattr(options, action.dest, action.default)
        if value in (action.default, None):
            continue
        words = [str(each) for each in (value if isinstance(value, list) else [value])]
        if not action.option_strings:
            positional += words
        elif action.nargs == 0:
            optional.append(action.option_strings[0])
        elif action.nargs is None:  # one value, as often as it was given
            optional += [part for word in words for part in (action.option_strings[0], word)]
        else:
            optional += [action.option_strings[0], *words]
    return positional + optional


def with_absolute_paths(options: argparse.Namespace) -> argparse.Namespace:
    """The same options for ranks that a launcher may start in another directory."""

    def absolute(value: Any) -> Any:
        is_path = isinstance(value, Path) or (isinstance(value, str) and value.endswith(".toml"))
        return type(value)(Path(value).absolute()) if is_path else value

    return argparse.Namespace(**{name: absolute(value) for name, value in vars(options).items()})


def as_dataclass(kind: type[T], options: argparse.Namespace) -> T:
    """A dataclass of the options that have the names of its fields."""
    values = {field.name: getattr(options, field.name) for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def parse_rank_arguments(
    description: str | None, *add_arguments: Callable[[argparse.ArgumentParser], None]
) -> argparse.Namespace:
    """Parse the command line of a rank."""
    parser = Parser(description=description)
    for add in add_arguments:
        add(parser)
    parser.add_argument("--local_rank", type=COUNT, help="appended by the launcher; the environment is what counts")
    return parser.parse_args()
