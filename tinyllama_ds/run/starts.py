"""Every start of a run in `starts.jsonl`, and the steps that earlier starts have logged and saved."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tinyllama_ds.checkpoint.format import Progress, find_folders
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import parse_row
from tinyllama_ds.layout import CHECKPOINTS, METRICS_FILE, RESTART_VARIABLE, STARTS_FILE
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.run.run_file import utc_date
from tinyllama_ds.run.sinks import warn

_SAVED_METRIC = "Checkpoint/GiB"  # 0 of a save that failed


def record_start(run: Run, start: Progress, reached: int, hosts: list[str]) -> None:
    """Append a line; `hosts` is that of each rank. Called by one rank. A full disk is a warning only."""
    line = {
        "time": utc_date(),
        "step": start.step,  # at which training begins
        "tokens": start.tokens,
        "reached": reached,  # the last step that was logged before; those after `step` are repeated
        "hosts": Counter(hosts),  # ranks by host
        "restart": int(os.environ.get(RESTART_VARIABLE, "0")),  # by the supervisor, before this start
        "left_out": sum(map(len, run.data.order.excluded_samples)),  # samples excluded by rollbacks
    }
    path = run.run_dir / STARTS_FILE
    try:
        append_line(path, line)
    except OSError as error:
        warn(path, error)


def append_line(path: Path, content: dict) -> None:
    """Append a JSON object as a line of its own, also after a line without end. Raises OSError."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        begin = b"" if file.read() in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(content).encode() + b"\n")


def has_logged(run_dir: Path) -> bool:
    """Whether a run has logged metrics or starts in a directory."""
    with suppress(OSError):
        return any((run_dir / name).stat().st_size for name in (METRICS_FILE, STARTS_FILE) if (run_dir / name).exists())
    return False


def reject_lost_checkpoints(run_dir: Path, first_step: int) -> None:
    """Raise `ConfigError` where a run without a checkpoint had one: it never begins again at step 0 by itself.

    `first_step` is the step that it began with. A run that ended before its first checkpoint does begin again.
    """
    folders = find_folders(run_dir)
    if folders:
        raise ConfigError(
            f"{run_dir / CHECKPOINTS}: none of {len(folders)} folders has a manifest.json;"
            " restore one of them, or choose another --run-dir to begin again at step 0"
        )
    saved = max(_saved_steps(run_dir), default=0)
    if saved > first_step:
        raise ConfigError(
            f"{run_dir / CHECKPOINTS}: holds no checkpoint, but the run has saved one at step {saved}; restore it, or"
            " choose another --run-dir to begin again at step 0"
        )


def _saved_steps(run_dir: Path) -> Iterator[int]:
    yield from (row["step"] for row in _rows(run_dir / STARTS_FILE))
    for row in _rows(run_dir / METRICS_FILE):
        size = row.get(_SAVED_METRIC)
        if isinstance(size, int | float) and size > 0:
            yield row["step"]


def _rows(path: Path) -> Iterator[dict]:
    with suppress(OSError), path.open("rb") as file:
        yield from (row for line in file if (row := parse_row(line, step=int)) is not None)
