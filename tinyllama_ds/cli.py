"""`tinyllama-ds <command>`: parsing and calling. Heavy imports happen inside the commands."""

import argparse
import sys
from collections.abc import Sequence

from tinyllama_ds import __version__
from tinyllama_ds.commands import cluster, data, evaluation, model, planning, training
from tinyllama_ds.errors import EXIT_REFUSED, Refusal


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call, and turn a `Refusal` into one sentence and exit code 78."""
    options = command_parser().parse_args(arguments)
    try:
        return options.command(options)
    except Refusal as refusal:
        print(f"tinyllama-ds: {refusal}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130


def command_parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    parser = argparse.ArgumentParser(prog="tinyllama-ds", description="Raw text to a TinyLlama-class model.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    rooms = (data, planning, cluster, training, model, evaluation)
    for name, add_arguments, command in (entry for room in rooms for entry in room.COMMANDS):
        help_text = (command.__doc__ or "").splitlines()[0]
        child = commands.add_parser(name, help=help_text, description=help_text)
        add_arguments(child)
        child.set_defaults(command=command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
