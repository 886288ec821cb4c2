"""`tinyllama-ds <command>`: parsing and calling. Heavy imports happen inside the commands."""

import argparse
import errno
import io
import signal
import sys
from collections.abc import Sequence

from tinyllama_ds import __version__
from tinyllama_ds.commands import (
    audit,
    benchmark,
    cluster,
    evaluation,
    import_tokens,
    model,
    planning,
    prepare,
    recipe,
    report,
    training,
)
from tinyllama_ds.commands.anytime import decay, ladder
from tinyllama_ds.commands.arguments import Parser
from tinyllama_ds.commands.printing import write_no_more
from tinyllama_ds.commands.trained import generation, prefer
from tinyllama_ds.errors import EXIT_CONFIG, ConfigError, log

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # which name no file


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, call, and turn a `ConfigError`, or a file that the system denies, into one sentence and exit code 78."""
    options = command_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever a model writes, on whatever terminal
    try:
        code = options.command(options)
        sys.stdout.flush()
    except ConfigError as config_error:
        log(config_error)
        return EXIT_CONFIG
    except BrokenPipeError:
        write_no_more()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        log(f"{error.filename or 'output'}: {error.strerror}")
        write_no_more()
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 130
    return code


def command_parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    parser = Parser(prog="tinyllama-ds", description="Raw text to a TinyLlama-class model.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    modules = (
        prepare,
        import_tokens,
        audit,
        recipe,
        planning,
        cluster,
        training,
        decay,
        ladder,
        benchmark,
        model,
        generation,
        prefer,
        report,
        evaluation,
    )
    for name, add_arguments, command in (entry for module in modules for entry in module.COMMANDS):
        help_text = (command.__doc__ or "").splitlines()[0]
        child = commands.add_parser(name, help=help_text, description=help_text)
        add_arguments(child)
        child.set_defaults(command=command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
