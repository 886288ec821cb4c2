"""`run.json`: the description of a run and the history of its changes; `status.json`: its state."""

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tinyllama_ds.checkpoint.description import check_description
from tinyllama_ds.checkpoint.format import Progress, find_checkpoints, read_manifest
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import read_object, write_object
from tinyllama_ds.layout import RUN_FILE, STATUS_FILE
from tinyllama_ds.run.sinks import warn

_HISTORY = "history"


@dataclass(frozen=True)
class RunFile:
    """The content of run.json."""

    description: dict  # at the last start
    history: list[dict]  # changes
    restored_from: Path | None = None  # a checkpoint, if the file is damaged


def read_run_file(run_dir: Path) -> RunFile | None:
    """None where there is no such file; that of the newest checkpoint where the file is damaged.

    Raises `ConfigError` where there is no checkpoint either: a run never begins again at step 0 by itself.
    """
    path = run_dir / RUN_FILE
    try:
        content = read_object(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    with suppress(ConfigError):
        if content:
            check_description(content, path)
            history = content.pop(_HISTORY, [])
            return RunFile(content, history if isinstance(history, list) else [])
    for checkpoint in reversed(find_checkpoints(run_dir)):
        with suppress(ConfigError):
            return RunFile(read_manifest(checkpoint).run, [], checkpoint)
    raise ConfigError(
        f"{path}: is damaged, expected one JSON object, and there is no checkpoint to restore it from; restore the"
        " file, or choose another --run-dir to begin again at step 0"
    )


def write_run_file(run_dir: Path, content: RunFile) -> None:
    """Durable when this returns. Called by one rank."""
    write_object(run_dir / RUN_FILE, content.description | {_HISTORY: content.history})


def write_status(run_dir: Path, state: str, progress: Progress) -> None:
    """Called by one rank. On a full disk the new status is written over the old one in place."""
    path, status = run_dir / STATUS_FILE, {"state": state, "step": progress.step, "tokens": progress.tokens}
    try:
        write_object(path, status)
    except OSError as error:
        try:
            with path.open("r+") as file:
                file.write(json.dumps(status))
                file.truncate()
        except OSError:
            warn(path, error)


def utc_date() -> str:
    """Now, for people. Nothing is computed from it: clocks jump, and differ between hosts."""
    return datetime.now(UTC).isoformat(timespec="seconds")
