"""A run directory: checked against the run, and opened."""

import json
from dataclasses import asdict
from pathlib import Path

from tinyllama_ds.checkpoint.disk_space import check_free_space, checkpoint_need
from tinyllama_ds.checkpoint.format import Health, Progress, find_checkpoints, find_folders, newest_progress
from tinyllama_ds.data.tokenizers.storage import write_tokenizer
from tinyllama_ds.errors import ConfigError, log
from tinyllama_ds.layout import LEDGER_FILE, RUN_FILE, reject_unusable_directory
from tinyllama_ds.run.identity import Change, changes_between, changes_of_run, inherited_ledger, reject_changes
from tinyllama_ds.run.ledger import write_ledger
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.run.run_file import RunFile, read_run_file, utc_date, write_run_file
from tinyllama_ds.run.starts import has_logged, reject_lost_checkpoints


def check_run_directory(run: Run) -> Path | None:
    """The checkpoint to resume from, or None for step 0. Raises `ConfigError` where there is a different run."""
    reject_unusable_directory(run.run_dir)
    path = run.run_dir / RUN_FILE
    content = read_run_file(run.run_dir)
    if content is not None:
        step, _ = newest_progress(run.run_dir)
        changes = changes_of_run(content.description, run.description, step)
        reject_changes(changes, run.options.allow_change, f"{path}: holds a different run", "choose another --run-dir")
        if run.options.resume == "never":
            raise ConfigError(f"{path}: already holds this run, and --resume never was given; choose another --run-dir")
    elif find_folders(run.run_dir) or has_logged(run.run_dir):
        what = "checkpoints" if find_folders(run.run_dir) else "the metrics of a run"
        raise ConfigError(
            f"{run.run_dir}: holds {what} but no {RUN_FILE}, so the run is unknown; restore {path}, or choose"
            " another --run-dir"
        )
    checkpoints = find_checkpoints(run.run_dir)
    if not checkpoints:
        reject_lost_checkpoints(run.run_dir, run.first_step)
    if not checkpoints and run.options.resume == "must":
        raise ConfigError(f"{run.run_dir}: holds no checkpoint to resume from, and --resume must was given")
    usage = checkpoint_need(run.model.num_parameters, run.engine_config, run.description["world_size"])
    check_free_space(run.run_dir, usage, run.recipe.intervals.keep_last)
    return checkpoints[-1] if checkpoints else None


def reject_different_history(run: Run, start: Progress, health: Health) -> None:
    """A checkpoint must end where the plan's step ends, and exclude the samples before it that the ledger excludes."""
    planned = run.plan.end_of(start.step)
    if planned != (start.position, start.tokens):
        raise ConfigError(
            f"{run.run_dir}: the first {start.step} steps are {planned[0]} samples of {planned[1]} tokens now, but the"
            f" checkpoint has consumed {start.position} samples of {start.tokens}; choose another --run-dir"
        )
    end = run.data.order.span(0, start.position).stop if start.position else 0
    now = [[gap[0], gap[-1]] for gap in run.data.order.excluded_samples if gap.start < end]
    then = [gap for gap in health.left_out if gap[0] < end]
    if now != then:
        raise ConfigError(
            f"{run.run_dir / LEDGER_FILE}: excludes the samples {now} of the first {end}, but the checkpoint of step"
            f" {start.step} excludes {then}; expected the ledger that belongs to it"
        )


def open_run_directory(run: Run, step: int = 0) -> list[Change]:
    """Create the directory with run.json and the tokenizer. Called by one rank, after every check has passed.

    Returns the changes since the last start; run.json's history keeps them, with the step at which training begins.
    """
    run.run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    write_tokenizer(run.data.tokenizer, run.run_dir)
    content = read_run_file(run.run_dir)
    if content is None:
        if run.parent is not None:
            write_ledger(run.run_dir, inherited_ledger(run.parent))
        write_run_file(run.run_dir, RunFile(run.description, []))
        return []
    changes = list(changes_between(content.description, json.loads(json.dumps(run.description))))
    history = content.history
    if changes:
        change = {"time": utc_date(), "step": step, "changes": [asdict(change) for change in changes]}
        history = [*history, change]
    write_run_file(run.run_dir, RunFile(run.description, history))
    if content.restored_from is not None:
        path = run.run_dir / RUN_FILE
        log(f"warning: {path}: was damaged, and is restored from {content.restored_from}, without its history")
    return changes
