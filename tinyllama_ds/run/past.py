"""What a run's own files say of the steps that it has made and saved, where there is no checkpoint to ask."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tinyllama_ds.checkpoint.format import find_folders
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import parse_row
from tinyllama_ds.layout import CHECKPOINTS, METRICS_FILE, STARTS_FILE

SAVED_FIGURE = "Checkpoint/GiB"  # 0 of a save that failed


def has_logged(run_dir: Path) -> bool:
    """Whether anything was ever logged in a directory."""
    with suppress(OSError):
        return any((run_dir / name).stat().st_size for name in (METRICS_FILE, STARTS_FILE) if (run_dir / name).exists())
    return False


def reject_lost_checkpoints(run_dir: Path, begun: int) -> None:
    """Raise `ConfigError` where a run without a checkpoint has had one: it never begins again unasked.

    `begun` is the step that it began with. A run that ended before its first checkpoint does begin again.
    """
    folders = find_folders(run_dir)
    if folders:
        raise ConfigError(
            f"{run_dir / CHECKPOINTS}: none of {len(folders)} folders has the manifest.json of a whole checkpoint;"
            " restore one of them, or choose another --run-dir to begin again at step 0"
        )
    saved = max(_saved_steps(run_dir), default=0)
    if saved > begun:
        raise ConfigError(
            f"{run_dir / CHECKPOINTS}: holds no checkpoint, but the run has saved one at step {saved}; restore it, or"
            " choose another --run-dir to begin again at step 0"
        )


def _saved_steps(run_dir: Path) -> Iterator[int]:
    yield from (row["step"] for row in _rows(run_dir / STARTS_FILE))
    for row in _rows(run_dir / METRICS_FILE):
        size = row.get(SAVED_FIGURE)
        if isinstance(size, int | float) and size > 0:
            yield row["step"]


def _rows(path: Path) -> Iterator[dict]:
    with suppress(OSError), path.open("rb") as file:
        yield from (row for line in file if (row := parse_row(line, step=int)) is not None)
