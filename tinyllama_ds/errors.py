"""The exit codes that other programs rely on, and the exceptions whose messages users read."""

import json
from collections.abc import Callable

EXIT_FINISHED = 0
EXIT_RESTART = 75  # saved, please restart
EXIT_ROLLBACK = 76  # internal: the supervisor restarts the run without the samples before a spike
EXIT_CONFIG = 78  # wrong configuration or input, do not restart
EXIT_NUMERICS = 79  # non-finite loss or gradients, or damaged weights or tokens; needs manual inspection

_MOST_PROBLEMS = 20  # in one message
_MOST_CHARACTERS = 80  # of a value


class ConfigError(Exception):
    """Wrong configuration or input: one sentence that names the file, key, line or host and what was expected.

    Raised before anything is changed; every command turns it into exit code 78.
    """

    def __str__(self) -> str:
        """On one line, also where it quotes a library's message of several lines."""
        return " ".join(super().__str__().split("\n"))


class OutOfMemory(ConfigError):
    """The GPU of one rank has too little memory: one sentence that names the rank and the part, and what needs less.

    Raised on that rank, while the others wait for it; the run ends with exit code 78 and is not restarted.
    """


class DataError(Exception):
    """Tokens that cannot be what was prepared: one sentence that names the shard and the place, raised during training.

    Raised on the one rank that read them; the run ends with exit code 79 and is not restarted.
    """


class NumericsError(Exception):
    """Non-finite or diverging loss, gradients or weights: one sentence that names the step or parameter, on all ranks.

    Nothing is saved after it; the run ends with exit code 79 and is not restarted.
    """


def raise_problems(place: object, problems: list[str]) -> None:
    """Raise one `ConfigError` with all problems of a file, if there are any."""
    if len(problems) == 1:
        raise ConfigError(f"{place}: {problems[0]}")
    if problems:
        listed = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems[:_MOST_PROBLEMS], start=1))
        more = len(problems) - _MOST_PROBLEMS
        raise ConfigError(f"{place}: {len(problems)} problems: {listed}{f'; and {more} more' if more > 0 else ''}")


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
    """Text with control characters escaped, as training data may hold any."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )
