"""Every start of a run, for the report: `starts.jsonl`, one JSON object per line, which only grows."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass

from tinyllama_ds.training.checkpoint import Progress
from tinyllama_ds.training.faults import RESTART_VARIABLE
from tinyllama_ds.training.run import Run
from tinyllama_ds.training.run_directory import date_for_people
from tinyllama_ds.training.sinks import warn

STARTS_FILE = "starts.jsonl"


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
    left_out = sum(map(len, run.order.left_out))
    line = Start(date_for_people(), start.step, start.tokens, reached, dict(Counter(hosts)), restart, left_out)
    path = run.run_dir / STARTS_FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")
    except OSError as error:
        warn(path, error)
