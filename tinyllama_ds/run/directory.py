"""A run's own directory: whether it may be used, what it is opened with, and that it belongs to this run."""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tinyllama_ds.checkpoint.disk_space import Need, check_free_space, checkpoint_need
from tinyllama_ds.checkpoint.format import Health, Progress, find_checkpoints, find_folders
from tinyllama_ds.data.tokenizer import TOKENIZER_FILE
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import write_durably
from tinyllama_ds.layout import LEDGER_FILE, RUN_FILE, reject_unusable_directory
from tinyllama_ds.run.branch import inherited_ledger
from tinyllama_ds.run.changes import Change, changes_between, identity_of, reject_changes
from tinyllama_ds.run.ledger import write_ledger
from tinyllama_ds.run.past import has_logged, reject_lost_checkpoints
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.run.run_file import Held, read_run_file, write_run_file


def check_run_directory(run: Run) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start; refuses a directory that holds another run."""
    reject_unusable_directory(run.run_dir)
    path = run.run_dir / RUN_FILE
    held = read_run_file(run.run_dir)
    if held is not None:
        there, now = identity_of(held.description), identity_of(json.loads(json.dumps(run.description)))
        changes = list(changes_between(there, now))
        reject_changes(changes, run.allow_change, f"{path}: holds another run", "choose another --run-dir")
        if run.resume == "never":
            raise ConfigError(f"{path}: already holds this run, and --resume never was given; choose another --run-dir")
    elif find_folders(run.run_dir) or has_logged(run.run_dir):
        what = "checkpoints" if find_folders(run.run_dir) else "the figures of a run"
        raise ConfigError(
            f"{run.run_dir}: holds {what} but no {RUN_FILE}, so what made them is unknown; restore {path}, or choose"
            " another --run-dir"
        )
    checkpoints = find_checkpoints(run.run_dir)
    if not checkpoints:
        reject_lost_checkpoints(run.run_dir, begun=run.parent.step if run.parent else 0)
    if not checkpoints and run.resume == "must":
        raise ConfigError(f"{run.run_dir}: holds no checkpoint to resume from, and --resume must was given")
    check_free_space(run.run_dir, _need_of_checkpoint(run), run.recipe.intervals.keep_last)
    return checkpoints[-1] if checkpoints else None


def _need_of_checkpoint(run: Run) -> Need:
    return checkpoint_need(run.model.num_parameters, run.engine_config, run.description["world_size"])


def reject_different_history(run: Run, start: Progress, health: Health) -> None:
    """A checkpoint must end where the plan's step ends, and have left out before that what the ledger says."""
    planned = run.plan.end_of(start.step)
    if planned != (start.position, start.tokens):
        raise ConfigError(
            f"{run.run_dir}: the first {start.step} steps are {planned[0]} samples of {planned[1]} tokens now, but the"
            f" checkpoint has behind it {start.position} samples of {start.tokens}; choose another --run-dir"
        )
    end = run.order.span(0, start.position).stop if start.position else 0
    now = [[gap[0], gap[-1]] for gap in run.order.excluded_samples if gap.start < end]
    then = [gap for gap in health.left_out if gap[0] < end]
    if now != then:
        raise ConfigError(
            f"{run.run_dir / LEDGER_FILE}: leaves out the samples {now} of the first {end}, but the checkpoint of step"
            f" {start.step} was made without {then}; expected the ledger that belongs to it"
        )


def open_run_directory(run: Run, step: int = 0) -> list[Change]:
    """Create the directory with run.json and the tokenizer. Called by one rank, after every check has passed.

    Returns what has changed since the run last started; run.json's history keeps it, with the step to go on from.
    """
    run.run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    write_durably(run.run_dir / TOKENIZER_FILE, run.tokenizer.content)
    held = read_run_file(run.run_dir)
    if held is None:
        if run.parent is not None:
            write_ledger(run.run_dir, inherited_ledger(run.parent))
        write_run_file(run.run_dir, Held(run.description, []))
        return []
    changes = list(changes_between(held.description, json.loads(json.dumps(run.description))))
    history = held.history
    if changes:
        change = {"time": date_for_people(), "step": step, "changes": [asdict(change) for change in changes]}
        history = [*history, change]
    write_run_file(run.run_dir, Held(run.description, history))
    if held.restored_from is not None:
        _tell_restored(run.run_dir / RUN_FILE, held.restored_from)
    return changes


def _tell_restored(path: Path, checkpoint: Path) -> None:
    print(
        f"tinyllama-ds: warning: {path}: was damaged, and is restored from {checkpoint}, without its history",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def date_for_people() -> str:
    """Now, in UTC. Nothing is computed from it: the clock on the wall jumps, and differs between hosts."""
    return datetime.now(UTC).isoformat(timespec="seconds")
