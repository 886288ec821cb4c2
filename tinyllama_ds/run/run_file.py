"""`run.json`: what a run is, for its next start and for people, with every change from start to start."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.checkpoint.description import why_no_description
from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import read_object, write_object
from tinyllama_ds.layout import RUN_FILE

_HISTORY = "history"


@dataclass(frozen=True)
class Held:
    """What a run directory says of its run."""

    description: dict  # as the run last started
    history: list[dict]  # changes
    restored_from: Path | None = None  # the checkpoint, where the file is damaged


def read_run_file(run_dir: Path) -> Held | None:
    """None where there is no such file; of one that is damaged the description is that of the newest checkpoint.

    Raises `ConfigError` where there is no checkpoint either: a run that has logged something does not begin again
    unasked.
    """
    path = run_dir / RUN_FILE
    try:
        held = read_object(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if held and why_no_description(held) is None:
        history = held.pop(_HISTORY, [])
        return Held(held, history if isinstance(history, list) else [])
    for checkpoint in reversed(find_checkpoints(run_dir)):
        with suppress(ConfigError):
            return Held(read_manifest(checkpoint).run, [], checkpoint)
    raise ConfigError(
        f"{path}: is damaged, expected one JSON object, and there is no checkpoint to restore it from; restore the"
        " file, or choose another --run-dir to begin again at step 0"
    )


def write_run_file(run_dir: Path, held: Held) -> None:
    """It is on the disk when this returns. Called by one rank."""
    write_object(run_dir / RUN_FILE, held.description | {_HISTORY: held.history})
