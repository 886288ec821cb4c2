"""The console of a run, and its copy in `logs/`: rank 0 prints lines above a progress bar."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from tinyllama_ds.bars import progress
from tinyllama_ds.layout import LOGS


class Console:
    """Prints on rank 0. A console that cannot be written, such as a log file on a full disk, does not stop the run."""

    def __init__(
        self, total_steps: int, first_step: int, terminal: TextIO | None = None, is_silent: bool = False
    ) -> None:
        """`terminal` gets the progress bar; without one it is printed as lines on stderr. Ranks but 0 are silent."""
        self._bar = progress(
            file=terminal, total=total_steps, initial=first_step, desc="pretrain", unit="step", dynamic_ncols=True,
            mininterval=1, disable=is_silent,
        )  # fmt: skip

    def log_line(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._bar.disable:
            return
        with suppress(OSError):
            self._bar.clear()  # drawn again at the next step
            print(text, flush=True)

    def advance(self, step: int, text: str) -> None:
        """Move the progress bar to a step, with the newest metrics next to it."""
        with suppress(OSError):
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Close the progress bar."""
        with suppress(OSError):
            self._bar.close()


def log_to(run_dir: Path, rank: int) -> TextIO | None:
    """Copy stdout and stderr to `logs/rank_N.log` from now on, with the output of native libraries and of a crash.

    Returns the original stderr if it is a terminal: what is written to it, a progress bar, is not copied. `tee` is a
    process of its own, so that the last output of a rank that was killed is copied too.
    """
    terminal = os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1) if sys.stderr.isatty() else None
    directory = run_dir / LOGS
    directory.mkdir(parents=True, exist_ok=True, mode=0o750)
    tees = [
        subprocess.Popen(["tee", "-a", "-i", directory / f"rank_{rank}.log"], stdin=subprocess.PIPE, stdout=stream)
        for stream in (1, 2)
    ]
    for stream, tee in zip((sys.stdout, sys.stderr), tees, strict=True):
        assert tee.stdin is not None
        stream.flush()
        os.dup2(tee.stdin.fileno(), stream.fileno())
        tee.stdin.close()
    return terminal
