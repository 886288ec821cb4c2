"""Prepares as a program of its own, and stops inside of shards, so that a test can kill it there and nowhere else.

    STOP_FROM=4 python stopping.py SOURCE RAW TOKENIZER OUTPUT WORKERS

`WORKERS` is a number, or `mpi` under `mpirun python -m mpi4py.futures`; every input file becomes a shard. Input files
have numbers for names. Whoever comes to the middle of number 4 or a later one stops, by SIGSTOP: in the end those
before it are committed, and every worker has begun another one. Without the variable nobody stops.
"""

import os
import signal
import sys
from pathlib import Path
from typing import ClassVar

from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import Record, SourceFormat

STOP_VARIABLE = "STOP_FROM"
_LINE = "50"


class Stopping(SourceFormat):
    """Reads as its base does, and looks the same in a manifest."""

    stopped: ClassVar[set[int]] = set()

    def record(self, raw: object, place: str) -> Record:
        file, _, line = place.rpartition(":")
        is_there = line == _LINE and int(Path(file).stem) >= int(os.environ[STOP_VARIABLE])
        if is_there and os.getpid() not in self.stopped:  # who was told to go on does so
            self.stopped.add(os.getpid())
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().record(raw, place)


if __name__ == "__main__":
    source, raw, tokenizer, output, workers = sys.argv[1:]
    fmt = Stopping() if STOP_VARIABLE in os.environ else SourceFormat()
    job = Preparation(source, Path(raw), fmt, Path(tokenizer), Path(output), "sentencepiece", shard_bytes=1)
    prepare(job, use_mpi=True) if workers == "mpi" else prepare(job, int(workers))
