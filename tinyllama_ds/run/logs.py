"""What a rank writes to its standard output and error goes to the console, and to a file of its own in the run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from tinyllama_ds.layout import LOGS


def log_to(run_dir: Path, rank: int) -> TextIO | None:
    """From now on copy both streams into `logs/rank_N.log`, the words of native libraries and of a crash included.

    Returns stderr as it was where that is a terminal: what is written there, a progress bar, comes into no file.

    `tee` is a process of its own, so that it still writes down the last words of a rank that is gone.
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
