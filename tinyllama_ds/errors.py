"""Exit codes, which other programs rely on, and the exceptions that become messages to users."""

import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

EXIT_FINISHED = 0
EXIT_RESTART = 75  # saved; restart to continue
EXIT_ROLLBACK = 76  # internal: the supervisor restarts the run without the samples of a spike
EXIT_CONFIG = 78  # invalid configuration or input; do not restart
EXIT_NUMERICS = 79  # non-finite loss or gradients; needs inspection

_OLD_NAMES = {
    "Refusal": "ConfigError",
    "EXIT_REFUSED": "EXIT_CONFIG",
    "BadData": "DataError",
    "BadNumbers": "NumericsError",
}
_MOST_PROBLEMS = 20  # in one message
_MOST_CHARACTERS = 80  # of a value


class ConfigError(Exception):
    """Invalid configuration or input: one sentence that names the file, key, line or host and what was expected.

    Raised before anything is changed; every command converts it to exit code 78.
    """

    def __str__(self) -> str:
        """On one line, even if it quotes several lines of a library."""
        return " ".join(super().__str__().split("\n"))


class OutOfMemory(ConfigError):
    """The GPU of one rank ran out of memory: one sentence that names the rank, the part, and what needs less.

    Printed by that rank, as the others wait for it; the run ends with exit code 78 and is not restarted.
    """


class DataError(Exception):
    """Corrupt token data found during training: one sentence that names the shard and the position.

    Raised on the rank that read it; the run ends with exit code 79 and is not restarted.
    """


class NumericsError(Exception):
    """Non-finite or diverged loss, gradients or weights: one sentence that names the step or parameter.

    Raised on all ranks; no checkpoint is saved, and the run ends with exit code 79 and is not restarted.
    """


def log(text: object) -> None:
    """Print a line for the user on stderr; a log file on a full disk does not end a run."""
    with contextlib.suppress(OSError):
        print(f"tinyllama-ds: {text}", file=sys.stderr, flush=True)


def raise_problems(place: object, problems: list[str]) -> None:
    """Raise one `ConfigError` with all problems of a file, if there are any."""
    if len(problems) == 1:
        raise ConfigError(f"{place}: {problems[0]}")
    if problems:
        listed = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems[:_MOST_PROBLEMS], start=1))
        more = len(problems) - _MOST_PROBLEMS
        raise ConfigError(f"{place}: {len(problems)} problems: {listed}{f'; and {more} more' if more > 0 else ''}")


def all_of(*calls: Callable[[], Any]) -> list:
    """The results of all calls; raises one `ConfigError` with the sentences of all that raise one."""
    results, sentences = [], []
    for call in calls:
        try:
            results.append(call())
        except ConfigError as error:
            sentences.append(str(error))
    if sentences:
        raise ConfigError("; ".join(sentences))
    return results


def shown(value: object) -> str:
    """A wrong value as a message shows it, on one line of limited length."""
    return _shorten(repr, value)


def shown_as_json(value: object) -> str:
    """A wrong value of a JSON or TOML file as the file has it, on one line of limited length."""
    return _shorten(lambda value: json.dumps(value, default=repr), value)


def _shorten(write: Callable[[object], str], value: object) -> str:
    try:
        text = write(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"a value with a number of too many digits ({type(value).__name__})"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def printable(text: str) -> str:
    """Text with control characters escaped, as training data may contain any."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def __getattr__(name: str) -> object:
    """The names of version 0.2, for one more version."""
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {_OLD_NAMES[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_OLD_NAMES[name]]
