"""A branch: a run that begins with a checkpoint of another one. Both have the same past, and each its own future.

The parent is only read. What its checkpoint cannot be without is the past: model, seed, optimizer, and the stages that
were begun, with their batches, mixtures and tokens. Stages that lie wholly in the future are the branch's own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.checkpoint.format import (
    MANIFEST_FILE,
    CheckpointManifest,
    find_checkpoints,
    manifest_sha256,
    read_manifest,
    resolve_checkpoint,
    verify_checkpoint,
)
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.run.changes import changes_between, identity_of, reject_changes
from tinyllama_ds.run.ledger import ROLLED_BACK, Entry, read_ledger


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a branch begins with, as its run.json keeps it."""

    checkpoint: str  # absolute path
    step: int
    tokens: int
    manifest_sha256: str

    @property
    def run_dir(self) -> Path:
        return Path(self.checkpoint).parents[1]


def find_parent(branch_from: Path, description: dict, allowed: Sequence[str]) -> Parent:
    """The newest checkpoint of a run, or the one named, whose past is that of the run now described.

    Raises `ConfigError` where there is none, with what differs, but for `allowed` keys; of several checkpoints, with
    what differs from the oldest, which has the fewest differences.
    """
    resolve_checkpoint(branch_from)  # refuses a path that leads to none
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
    try:
        there, now = _past_of(manifest.run, step), _past_of(json.loads(json.dumps(description)), step)
    except KeyError as error:
        raise ConfigError(
            f"{checkpoint / MANIFEST_FILE}: holds no {error}; expected a checkpoint of pretraining"
        ) from error
    changes = list(changes_between(there, now))
    reject_changes(changes, allowed, f"{checkpoint}: has another past than this run", "branch from another checkpoint")
    if step >= steps:
        raise ConfigError(f"{checkpoint}: is the end of a run of {steps} steps; expected one with steps left to train")


def _past_of(description: dict, step: int) -> dict:
    """What of a run's description (`run.json`) decides its first `step` steps."""
    past = identity_of(description)
    del past["init_from"]  # long overwritten
    stages, first = [], 0
    for stage in description["recipe"]["stages"]:
        if first < step:
            stages.append(stage)
        first += -(-stage["tokens"] // stage["global_batch_tokens"])
    past["sources"] = list(dict.fromkeys(name for stage in stages for name in stage["weights"]))
    past["recipe"] = {key: value for key, value in past["recipe"].items() if key != "name"} | {"stages": stages}
    past["data"] = {"train": {name: past["data"]["train"].get(name) for name in past["sources"]}}
    scheduler = past["deepspeed_config"].get("scheduler")
    if scheduler:  # in steps it may be longer or shorter, over the same tokens
        params = {key: value for key, value in scheduler.get("params", {}).items() if key != "total_num_steps"}
        past["deepspeed_config"]["scheduler"] = scheduler | {"params": params}
        past["plan"] = {"tokens": description["plan"]["tokens"]}
    return past


def recorded_parent(run_file: Path, description: dict, branch_from: Path | None) -> Parent | None:
    """What a run that is there began with. Raises `ConfigError` where `--branch-from` names something else."""
    raw = description.get("parent")
    parent = Parent(**raw) if raw else None
    places = [Path(parent.checkpoint), parent.run_dir] if parent else []
    if branch_from is None or branch_from.resolve() in [place.resolve() for place in places]:
        return parent
    began = f"that began with {parent.checkpoint}" if parent else "that is no branch"
    raise ConfigError(f"{run_file}: holds a run {began}, not with {branch_from}; choose another --run-dir")


def verify_parent(parent: Parent) -> Path:
    """The parent's checkpoint, verified as on resume. Raises `ConfigError` where it is no longer the one chosen."""
    checkpoint = Path(parent.checkpoint)
    verify_checkpoint(checkpoint)
    if manifest_sha256(checkpoint) != parent.manifest_sha256:
        raise ConfigError(f"{checkpoint / MANIFEST_FILE}: has changed since this run was branched off; restore it")
    return checkpoint


def inherited_ledger(parent: Parent) -> list[Entry]:
    """What the parent had passed over by its checkpoint."""
    left_out = read_manifest(Path(parent.checkpoint)).health.left_out

    def is_behind(entry: Entry) -> bool:
        if entry.event == ROLLED_BACK:
            return any(first <= entry.first_sample and entry.last_sample <= last for first, last in left_out)
        return entry.step <= parent.step

    return [entry for entry in read_ledger(parent.run_dir) if is_behind(entry)]
