"""Progress bars: a bar on a terminal; in a file one line per minute and one at the end."""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS = 60.0
_BAR = re.compile(r"\|[^|]*\| ?")  # between percentage and numbers


def progress(iterable: Iterable | None = None, *, file: TextIO | None = None, **options: Any) -> tqdm:
    """tqdm with its arguments, on stderr or another file."""
    file = file or sys.stderr
    return tqdm(iterable, file=file if file.isatty() else ProgressLines(file), **options)


@contextmanager
def bars_as_lines() -> Iterator[None]:
    """The same for the bars that libraries draw on stderr."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(ProgressLines(sys.stderr)):
        yield


class ProgressLines:
    """A text file that writes a few frames of a progress bar as lines, and all other text unchanged."""

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._shown = clock()
        self._frame = ""
        self._is_within_line = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """A frame begins with a carriage return. A line end after the last one keeps it; between bars that
        are drawn below each other there are line ends, too."""
        if text.startswith("\r"):
            self._frame = " ".join(_BAR.sub(" ", text, count=1).split())
            if self._frame and not self._is_complete() and self._clock() - self._shown >= _SECONDS:
                self._show()
        elif text == "\n" and self._frame and not self._is_within_line:
            if self._is_complete():
                self._show()
        elif text.strip("\n") != "\x1b[A" and text:  # with which tqdm goes from one bar to another
            self._file.write(text)
            self._is_within_line = not text.endswith("\n")
        return len(text)

    def _is_complete(self) -> bool:
        """Whether the frame is the last one, which is shown at its line end."""
        return " 100% " in f" {self._frame}"

    def _show(self) -> None:
        self._file.write(f"{self._frame}\n")
        self._file.flush()
        self._shown, self._frame = self._clock(), ""
