"""What a run directory is made of, and whether this user can use one as it lies there."""

import os
from pathlib import Path

from tinyllama_ds.data.tokenizer import TOKENIZER_FILE
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import SECRETS_FILE

RUN_FILE = "run.json"
STATUS_FILE = "status.json"
LEDGER_FILE = "ledger.jsonl"
STOP_FILE = "stop"
METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "starts.jsonl"
LIFELINE_KEY_FILE = "lifeline.key"  # of ranks on other hosts and their supervisor
CHECKPOINTS, QUARANTINE, LOGS = "checkpoints", "quarantine", "logs"
_FOLDERS = (CHECKPOINTS, QUARANTINE, LOGS)
_FILES = (RUN_FILE, STATUS_FILE, LEDGER_FILE, STOP_FILE, LIFELINE_KEY_FILE, SECRETS_FILE, TOKENIZER_FILE, "lock.json")


def reject_unusable_directory(run_dir: Path) -> None:
    """Raise `ConfigError` where a run cannot live in a directory, whatever is in its files: said before any is read."""
    if os.path.lexists(run_dir) and not os.path.isdir(run_dir):
        raise ConfigError(f"{run_dir}: is not a directory; choose another --run-dir")
    parent = next(folder for folder in (run_dir, *run_dir.absolute().parents) if os.path.exists(folder))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{parent}: cannot be written; expected a directory that this user may write")
    for name in _FOLDERS:
        if os.path.lexists(run_dir / name) and not os.path.isdir(run_dir / name):
            raise ConfigError(f"{run_dir / name}: is a file; expected a folder of the run, move the file away")
    for name in _FILES:
        if os.path.isdir(run_dir / name):
            raise ConfigError(f"{run_dir / name}: is a folder; expected a file of the run, move the folder away")
