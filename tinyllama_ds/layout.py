"""Names that the processes of a run share, and whether this user can use a run directory as it is."""

import os
import signal
from pathlib import Path

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import SECRETS_FILE

RUN_FILE = "run.json"
STATUS_FILE = "status.json"
LEDGER_FILE = "ledger.jsonl"
STOP_FILE = "stop"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"  # losses of all samples
STARTS_FILE = "starts.jsonl"
# Of sentencepiece; of the tokenizers library, with the roles of its special tokens.
TOKENIZER_MODEL, TOKENIZER_JSON, SPECIAL_TOKENS = "tokenizer.model", "tokenizer.json", "special_tokens_map.json"
TOKENIZER_FILES = (TOKENIZER_MODEL, TOKENIZER_JSON, SPECIAL_TOKENS)
LOCK_FILE = "lock.json"
LIFELINE_KEY_FILE = "lifeline.key"  # shared by the supervisor and ranks on other hosts
CHECKPOINTS, QUARANTINE, LOGS = "checkpoints", "quarantine", "logs"
_FOLDERS = (CHECKPOINTS, QUARANTINE, LOGS)
_FILES = (
    *(RUN_FILE, STATUS_FILE, LEDGER_FILE, STOP_FILE, LIFELINE_KEY_FILE, SECRETS_FILE, LOCK_FILE),
    *TOKENIZER_FILES,
)

# Of the environment, from the supervisor to its ranks.
SUPERVISOR_VARIABLE = "TINYLLAMA_DS_SUPERVISOR"  # its process id
HEARTBEAT_VARIABLE = "TINYLLAMA_DS_HEARTBEATS"  # its private directory
LIFELINE_VARIABLE = "TINYLLAMA_DS_LIFELINE"  # for ranks on other hosts: its address, and timeouts
RESTART_VARIABLE = "TINYLLAMA_DS_RESTART"  # how often the supervisor has restarted the run
STACKS_SIGNAL = signal.SIGUSR2  # asks a rank for the stacks of its threads
STARTING, FIRST_STEP = "starting", "in its first step"  # the phases of a rank that take long


def reject_unusable_directory(run_dir: Path) -> None:
    """Raise `ConfigError` if a run cannot use a directory, before any of its files is read."""
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
