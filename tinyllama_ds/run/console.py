"""The console of a run: lines above a progress bar. Rank 0 writes to it, the other ranks have a silent one."""

from contextlib import suppress
from typing import TextIO

from tinyllama_ds.bars import progress


class SilentConsole:
    """The console of the other ranks."""

    def log_line(self, text: str) -> None:
        """Print a line above the progress bar."""

    def advance(self, step: int, text: str) -> None:
        """Move the progress bar to a step, with the newest metrics beside it."""

    def close(self) -> None:
        """Close the progress bar."""


class Console(SilentConsole):
    """That of rank 0. A console that cannot be written, such as a log file on a full disk, does not stop the run."""

    def __init__(self, total_steps: int, first_step: int, terminal: TextIO | None = None) -> None:
        """`terminal` gets the progress bar; without one it is printed as lines on stderr."""
        self._bar = progress(
            file=terminal, total=total_steps, initial=first_step, desc="pretrain", unit="step", dynamic_ncols=True,
            mininterval=1,
        )  # fmt: skip

    def log_line(self, text: str) -> None:
        with suppress(OSError):
            self._bar.clear()  # drawn again at the next step
            print(text, flush=True)

    def advance(self, step: int, text: str) -> None:
        with suppress(OSError):
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        with suppress(OSError):
            self._bar.close()
