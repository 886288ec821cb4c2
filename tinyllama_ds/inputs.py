"""Small text files that a user names, read as a whole, or a `ConfigError` with the reason."""

from pathlib import Path

from tinyllama_ds.errors import ConfigError

_MOST_BYTES = 16 * 2**20  # a recipe or a hostfile is some lines long; devices and shards have no limit


def read_text(path: Path, what: str, *, keep_mark: bool = False) -> str:
    """The text of a file of UTF-8, without a byte order mark; `what` it is, with its article: "the recipe".

    Raises `ConfigError` where it is missing, a directory, not readable, too large, or not UTF-8, which names the line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: {what} is missing") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a directory; expected {what}, which is a file") from error
    except OSError as error:
        raise ConfigError(f"{path}: {what} cannot be read: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB, which is too long for {what}")
    try:
        return content.decode("utf-8" if keep_mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: byte {content[error.start]:#04x} is not UTF-8; expected {what} in UTF-8"
        ) from error
