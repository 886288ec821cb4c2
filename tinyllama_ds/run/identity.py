"""What decides the result of a run: the identity of a run directory, and that of a branch with its parent's history.

A branch begins with a checkpoint of another run, its parent, which is only read. Both have the same history up to that
checkpoint, compared by values: model, seed, optimizer, the batches and mixtures of all steps, and the learning rates.
What comes later is the branch's own.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyllama_ds.checkpoint.format import (
    MANIFEST_FILE,
    CheckpointManifest,
    find_checkpoints,
    manifest_sha256,
    read_manifest,
    resolve_checkpoint,
    verify_checkpoint,
)
from tinyllama_ds.config.recipe import recipe_of_run
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.schedule import schedule_of_run
from tinyllama_ds.errors import ConfigError, shown_as_json
from tinyllama_ds.layout import RUN_FILE
from tinyllama_ds.run.ledger import ROLLED_BACK, Entry, read_ledger

ABSENT = "absent"
# The keys of run.json that decide the result of a run.
_IDENTITY = ("recipe", "deepspeed_config", "model", "data", "order_version", "init_from")
_FREE = {  # may differ between starts
    "recipe": ("intervals", "validation_samples", "samples", "evaluation"),
    "deepspeed_config": (
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "zero_optimization",
        "tensorboard",
    ),
    "init_from": ("path",),
}
_FIXED = ("model", "order_version")  # cannot be changed on resume
_STAGE = ("global_batch_tokens", "weights", "ramp_tokens")  # keys that decide the samples of its steps
_MAX_CHANGES = 20  # printed


@dataclass(frozen=True)
class Change:
    """A value that differs. The key is the argument of `--allow-change`."""

    key: str
    there: Any
    now: Any

    def __str__(self) -> str:
        there, now = (ABSENT if value == ABSENT else shown_as_json(value) for value in (self.there, self.now))
        return f"{self.key} is {there} there and {now} now"

    def is_below(self, key: str) -> bool:
        """Whether a key names this value or a table that contains it."""
        return f"{self.key}.".startswith(f"{key}.")


def identity_of(description: dict) -> dict:
    """The part of a run's description (`run.json`) that decides its result."""
    identity = {key: description.get(key, ABSENT) for key in _IDENTITY}
    for key, free in _FREE.items():
        if isinstance(identity[key], dict):
            identity[key] = {name: value for name, value in identity[key].items() if name not in free}
    stages = description.get("recipe", {}).get("stages", [])
    names = (name for stage in stages for name in stage.get("weights", {}))
    identity["sources"] = list(dict.fromkeys(names))  # their order decides ties
    return identity


def changes_between(there: Any, now: Any, key: str = "") -> Iterator[Change]:
    """All leaves of two JSON values that differ, each under its dotted key; entries of lists are keyed by number."""
    if isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        there, now = ({str(number): entry for number, entry in enumerate(entries)} for entries in (there, now))
    if isinstance(there, dict) and isinstance(now, dict):
        for name in sorted(there.keys() | now.keys()):
            inner = f"{key}.{name}" if key else name
            yield from changes_between(there.get(name, ABSENT), now.get(name, ABSENT), inner)
    elif there != now:
        yield Change(key, there, now)


def changes_of_run(there: dict, now: dict, step: int) -> list[Change]:
    """What differs between two descriptions of a run that has been trained for `step` steps.

    A schedule with the same learning rates so far is not a difference: a constant one of a run that becomes longer.
    """
    now = json.loads(json.dumps(now))
    changes = list(changes_between(identity_of(there), identity_of(now)))
    if step and changes:
        with suppress(ConfigError), reading_description(RUN_FILE):  # a damaged one is different
            if _history_of(there, step) == _history_of(now, step):
                return [change for change in changes if not change.is_below("deepspeed_config.scheduler")]
    return changes


def reject_changes(changes: Sequence[Change], allowed: Sequence[str], what: str, instead: str) -> None:
    """Raises `ConfigError` with every change that is not allowed by its name or by the name of a table around it.

    `what` begins the message, and `instead` is the way out of it.
    """
    fixed = [change for change in changes if any(change.is_below(key) for key in _FIXED)]
    if fixed:
        raise ConfigError(f"{what}: {_list(fixed)}; cannot be changed on resume, {instead}")
    rejected = [change for change in changes if not any(change.is_below(key) for key in allowed)]
    if rejected:
        names = dict.fromkeys("data" if change.is_below("data") else change.key for change in rejected)
        raise ConfigError(
            f"{what}: {_list(rejected)}; {instead}, or override with"
            f" {' '.join(f'--allow-change {name}' for name in names)}"
        )


def _list(changes: Sequence[Change]) -> str:
    more = len(changes) - _MAX_CHANGES
    return "; ".join(map(str, changes[:_MAX_CHANGES])) + (f"; and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a branch begins with, as in its run.json."""

    checkpoint: str  # absolute path
    step: int
    tokens: int
    manifest_sha256: str

    @property
    def run_dir(self) -> Path:
        return Path(self.checkpoint).parents[1]


def kept_checkpoints(place: Path) -> dict[int, Path]:
    """By tokens the checkpoints of a run, or the one given; raises `ConfigError` where there is none."""
    newest = resolve_checkpoint(place)
    kept = [newest] if newest == place else find_checkpoints(place)
    return {read_manifest(path).progress.tokens: path for path in kept}


def checkpoint_at(place: Path, tokens: int) -> Path:
    """That of so many tokens; raises `ConfigError` where there is none."""
    kept = kept_checkpoints(place)
    if tokens not in kept:
        listed = ", ".join(f"{each:,}" for each in kept)
        raise ConfigError(f"{place}: has no checkpoint of {tokens:,} tokens; expected one of {listed} tokens")
    return kept[tokens]


def find_parent(branch_from: Path, description: dict, allowed: Sequence[str]) -> Parent:
    """The newest checkpoint of a run, or the one named, whose history is that of the run described.

    Raises `ConfigError` where there is none, with what differs, but for `allowed` keys; of several checkpoints, with
    what differs from the oldest, which has the fewest differences.
    """
    resolve_checkpoint(branch_from)  # raises where there is none
    is_one = (branch_from / MANIFEST_FILE).is_file()
    for checkpoint in [branch_from] if is_one else reversed(find_checkpoints(branch_from)):
        manifest = read_manifest(checkpoint)
        try:
            _reject_different_history(checkpoint, manifest, description, allowed)
        except ConfigError as error:
            reason = error
            continue
        progress = manifest.progress
        return Parent(str(checkpoint.absolute()), progress.step, progress.tokens, manifest_sha256(checkpoint))
    raise reason


def _reject_different_history(
    checkpoint: Path, manifest: CheckpointManifest, description: dict, allowed: Sequence[str]
) -> None:
    step, steps = manifest.progress.step, description["plan"]["steps"]
    with reading_description(checkpoint / MANIFEST_FILE):
        there, now = _history_of(manifest.run, step), _history_of(description, step)
    changes = list(changes_between(there, now))
    reject_changes(changes, allowed, f"{checkpoint}: history differs from this run", "branch from another checkpoint")
    if step >= steps:
        raise ConfigError(f"{checkpoint}: is the last of {steps} steps; expected a checkpoint with steps left to train")


@contextmanager
def reading_description(place: object) -> Iterator[None]:
    """Inside, what a damaged description of a run at `place` causes becomes a `ConfigError`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{place}: not the description of a run ({reason}); expected one of pretraining") from error


def _history_of(description: dict, step: int) -> dict:
    """What decides the first `step` steps of a run with this description (`run.json`), by values."""
    history = identity_of(description)
    del history["init_from"]  # has no effect any more
    plan = RunPlan(recipe_of_run(description))
    steps = plan.begun(step)
    begun = description["recipe"]["stages"][: len(steps)]
    past = [{key: stage[key] for key in _STAGE} | {"steps": own} for stage, own in zip(begun, steps, strict=True)]
    history["sources"] = list(dict.fromkeys(name for stage in begun for name in stage["weights"]))
    history["recipe"] = {key: value for key, value in history["recipe"].items() if key != "name"} | {"stages": past}
    history["data"] = {"train": {name: history["data"]["train"].get(name) for name in history["sources"]}}
    history["deepspeed_config"].pop("scheduler", None)
    history["schedule"] = asdict(schedule_of_run(description).until(plan.end_of(step)[1]))
    return json.loads(json.dumps(history))


def recorded_parent(run_file: Path, description: dict, branch_from: Path | None) -> Parent | None:
    """The parent in an existing run.json. Raises `ConfigError` where `--branch-from` names a different one."""
    raw = description.get("parent")
    parent = Parent(**raw) if raw else None
    places = [Path(parent.checkpoint), parent.run_dir] if parent else []
    if branch_from is None or branch_from.resolve() in [place.resolve() for place in places]:
        return parent
    began = f"that began with {parent.checkpoint}" if parent else "that is not a branch"
    raise ConfigError(f"{run_file}: holds a run {began}, not with {branch_from}; choose another --run-dir")


def verify_parent(parent: Parent) -> Path:
    """The parent's checkpoint, verified as on resume. Raises `ConfigError` where it is no longer the one chosen."""
    checkpoint = Path(parent.checkpoint)
    verify_checkpoint(checkpoint)
    if manifest_sha256(checkpoint) != parent.manifest_sha256:
        raise ConfigError(f"{checkpoint / MANIFEST_FILE}: has changed since this run was branched off; restore it")
    return checkpoint


def inherited_ledger(parent: Parent) -> list[Entry]:
    """The entries of the parent's ledger before its checkpoint."""
    excluded = read_manifest(Path(parent.checkpoint)).health.left_out

    def is_before(entry: Entry) -> bool:
        if entry.event == ROLLED_BACK:
            return any(first <= entry.first_sample and entry.last_sample <= last for first, last in excluded)
        return entry.step <= parent.step

    return [entry for entry in read_ledger(parent.run_dir) if is_before(entry)]
