"""Files and folders that a command writes: checked before the work, and written as a whole or not at all."""

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import sync, temporary_name, write_durably

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
_DPI = 110


def check_file(given: str | Path) -> Path:
    """The path of a file that can be made or replaced, else `ConfigError`. Changes nothing."""
    path = Path(given)
    with reporting_write_errors(path):
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise ConfigError(f"{path}: is a directory; expected the name of a file to write")
        if _is_special(target):
            os.close(os.open(target, os.O_WRONLY | os.O_NONBLOCK))
            return path
        _check_directory(path, target.parent)
        temporary_name(target).exists()  # raises where the name is too long
    return path


def check_new_file(given: str | Path) -> Path:
    """The same for a file that is never replaced: one that exists is an error."""
    path = check_file(given)
    if path.exists():
        raise ConfigError(f"{path}: already exists; expected the name of a new file")
    return path


def check_picture(given: str | Path) -> Path:
    """The same for a picture, whose suffix is its format."""
    if Path(given).suffix.lower() not in PICTURE_SUFFIXES:
        raise ConfigError(
            f"{given}: is not the name of a picture; expected one that ends with {', '.join(PICTURE_SUFFIXES)}"
        )
    return check_file(given)


def check_folder(given: str | Path) -> Path:
    """The path of a folder in which files can be made, else `ConfigError`; its parents may be missing."""
    path = Path(given)
    with reporting_write_errors(path):
        place = Path(os.path.realpath(path))
        while not place.exists():
            place = place.parent
        _check_directory(path, place)
    return path


def write_file(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole, or leave it as it was and raise `ConfigError` with the reason, such as a full disk."""
    raw = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with reporting_write_errors(path):
        target = Path(os.path.realpath(path))
        if _is_special(target):
            target.write_bytes(raw)
        else:
            write_durably(target, raw)


def write_figure(figure: "Figure", path: Path) -> None:
    """The same with a picture, in the format of its suffix."""
    write_file(path, drawn(figure, path.suffix[1:].lower()))


def drawn(figure: "Figure", kind: str = "png") -> bytes:
    """A figure as the content of a file. A dollar sign in a name does not begin a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=_DPI)
    return file.getvalue()


@contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the system, raised by Python or a library in Rust, into a `ConfigError` that names the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers raise classes of their own
        if number is None or isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be written: {os.strerror(int(number[1]))}") from error


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name once it is complete and on the disk, or leaves nothing.

    Raises `ConfigError` where it exists.
    """
    if output.exists():
        raise ConfigError(f"{output}: already exists; expected a new folder")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with reporting_write_errors(output):
            partial.mkdir(parents=True)
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
            partial.rename(output)
            sync(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """A file to write under a temporary name, which appears under its own once it is on the disk, or leaves nothing.

    Raises `ConfigError` where it exists or cannot be made.
    """
    check_new_file(output)
    partial = temporary_name(output)
    try:
        with reporting_write_errors(output):
            yield partial
            sync(partial)
            partial.rename(output)
            sync(output.parent)
    finally:
        partial.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which is written to and not replaced."""
    return path.exists() and not path.is_file()


def _check_directory(path: Path, directory: Path) -> None:
    """By making a file without a name there: permissions alone do not show storage that is mounted read-only."""
    if not directory.exists():
        raise ConfigError(f"{path}: cannot be written: the directory {directory} is missing")
    if not directory.is_dir():
        raise ConfigError(f"{path}: cannot be written: {directory} is not a directory")
    with tempfile.TemporaryFile(dir=directory):
        pass
