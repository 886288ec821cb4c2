"""`status.json`: what a run is doing, for its supervisor and for people."""

import json
from pathlib import Path

from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.files import write_object
from tinyllama_ds.layout import STATUS_FILE
from tinyllama_ds.run.sinks import warn


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
