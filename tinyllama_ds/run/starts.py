"""Every start of a run, for the report: `starts.jsonl`, one JSON object per line, which only grows."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.layout import RESTART_VARIABLE, STARTS_FILE
from tinyllama_ds.run.directory import date_for_people
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.run.sinks import warn


@dataclass(frozen=True)
class Start:
    """One line."""

    time: str
    step: int  # from which it goes on
    tokens: int
    reached: int  # the last step that was logged before; those after `step` are done again
    hosts: dict[str, int]  # ranks by host
    restart: int  # number of it since a person or a scheduler started the supervisor; 0 is that start
    left_out: int  # samples, after rollbacks


def record_start(run: Run, start: Progress, reached: int, hosts: list[str]) -> None:
    """Add a line; `hosts` is that of each rank. Called by one rank. A full disk is told and does not stop the run."""
    restart = int(os.environ.get(RESTART_VARIABLE, "0"))
    left_out = sum(map(len, run.order.excluded_samples))
    line = Start(date_for_people(), start.step, start.tokens, reached, dict(Counter(hosts)), restart, left_out)
    path = run.run_dir / STARTS_FILE
    try:
        append_line(path, asdict(line))
    except OSError as error:
        warn(path, error)


def append_line(path: Path, content: dict) -> None:
    """Add a JSON object in a line of its own, also where a crash has cut the last one short. Raises OSError."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        begin = b"" if file.read() in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(content).encode() + b"\n")
