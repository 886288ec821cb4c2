"""The commit protocol: every rank writes, all agree, one rename. Whatever dies on the way, the last checkpoint stands.

1. Rank 0 makes `checkpoints/.step_00001000.partial/`.
2. Every rank writes its files into it, hashing them on the way to the disk, and syncs them.
3. The ranks gather what they wrote and what went wrong; one failure makes all of them abandon this save.
4. Rank 0 writes `manifest.json` last, syncs it and the folder, and renames the folder to its final name.
5. Old checkpoints go, each by a rename to `.trash-` first, so that half of one is never taken for a whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch

from tinyllama_ds.training.checkpoint import (
    CHECKPOINTS,
    MANIFEST_FILE,
    CheckpointManifest,
    File,
    Progress,
    checkpoint_name,
    find_checkpoints,
    read_manifest,
)
from tinyllama_ds.training.engine import gather_from_ranks
from tinyllama_ds.training.faults import strike

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from tinyllama_ds.training.run import Run
from tinyllama_ds.training.world import World

_LEFTOVER = re.compile(r"\.(step_\d{8,}\.(partial|whole)|trash-step_\d{8,})")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep_last`, and for ever one for every `keep_tokens` tokens."""

    keep_last: int
    keep_tokens: int


@dataclass(frozen=True)
class Save:
    """How a save went: seconds that training stood still, bytes over all ranks, and what failed on which rank."""

    seconds: float
    size: int
    failures: list[str]


class Saver:
    """Saves a run's checkpoints, knows when the clock says that one is due, and counts the saves that failed."""

    def __init__(self, run: "Run", world: World) -> None:
        intervals = run.recipe.intervals
        self.failures = 0
        self._run = run
        self._world = world
        self._retention = Retention(intervals.keep_last, intervals.keep_tokens)
        self._interval = 60 * intervals.save_minutes
        self._saved_at = monotonic()

    def is_due(self) -> bool:
        """Whether the wall-clock interval has passed on this rank."""
        return monotonic() - self._saved_at >= self._interval

    def save(self, engine: "DeepSpeedEngine", progress: Progress) -> Save:
        """Collective. Save and apply the retention; a save that fails is abandoned by all ranks, and counted."""
        saved = save_checkpoint(
            engine, self._run.run_dir, progress, self._run.model.to_dict(), self._run.description, self._world
        )
        self._saved_at = monotonic()
        self.failures += bool(saved.failures)
        if self._world.is_main and not saved.failures:
            remove_old_checkpoints(self._run.run_dir, self._retention)
        return saved


def save_checkpoint(
    engine: "DeepSpeedEngine", run_dir: Path, progress: Progress, model: dict, run: dict, world: World
) -> Save:
    """Collective. Commits a checkpoint, or abandons it on all ranks; an existing one of the same step is left alone."""
    started = perf_counter()
    final = run_dir / CHECKPOINTS / checkpoint_name(progress.step)
    partial = final.with_name(f".{final.name}.partial")
    if gather_from_ranks((final / MANIFEST_FILE).is_file())[0]:
        return Save(perf_counter() - started, 0, [])
    shards = _ShardWriter(progress.step)
    failures = _failures_of_all(_attempt(lambda: _make_empty(partial), world.is_main))
    if not failures:
        with shards.writing_for(engine):
            engine.save_checkpoint(str(partial.parent), tag=partial.name, save_latest=False)
        failures = _failures_of_all(shards.failure)
    files = {name: File(**file) for part in gather_from_ranks(shards.report()) for name, file in part.items()}
    if not failures:
        dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
        manifest = CheckpointManifest(progress, world.size, engine.zero_optimization_stage(), dtype, model, run, files)
        failures = _failures_of_all(_attempt(lambda: _commit(partial, final, manifest), world.is_main))
    if failures and world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    return Save(perf_counter() - started, sum(file.size for file in files.values()), failures)


class _ShardWriter:
    """Stands in for the writing half of DeepSpeed's checkpoint engine on one rank: hashes, syncs, and never raises.

    An exception inside DeepSpeed's save would leave the other ranks waiting in a barrier for this one.
    """

    def __init__(self, step: int) -> None:
        self.failure: str | None = None
        self._step = step
        self._files: dict[str, File] = {}

    @contextmanager
    def writing_for(self, engine: "DeepSpeedEngine") -> Iterator[None]:
        """Put this writer into an engine for one save."""
        original = engine.checkpoint_engine.save
        engine.checkpoint_engine.save = self.save
        engine._copy_recovery_script = lambda _: None  # scripts nobody needs, written where an error would hang a rank
        try:
            yield
        finally:
            engine.checkpoint_engine.save = original

    def save(self, state_dict: dict, path: str) -> None:
        self.failure = self.failure or _attempt(lambda: self._write(state_dict, Path(path)))

    def _write(self, state: dict, path: Path) -> None:
        strike("save.begin", self._step)
        with path.open("wb") as file:
            hashing = _HashingFile(file)
            torch.save(state, cast(BinaryIO, hashing))
            strike("save.mid_shard", self._step)
            file.flush()
            os.fsync(file.fileno())
        self._files[path.name] = File(hashing.size, hashing.digest())
        strike("save.after_shard", self._step)

    def report(self) -> dict[str, dict]:
        return {name: asdict(file) for name, file in self._files.items()}


class _HashingFile:
    """A binary file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self._file = file
        self._sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        self.size += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._sha256.hexdigest()


def _attempt(action: Callable[[], None], wanted: bool = True) -> str | None:
    """Run an action if it is wanted here; returns what went wrong."""
    try:
        if wanted:
            action()
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
        return f"{type(error).__name__}: {error}"
    return None


def _failures_of_all(failure: str | None) -> list[str]:
    """What failed on all ranks, the same list on each."""
    return [f"rank {rank}: {text}" for rank, text in enumerate(gather_from_ranks(failure)) if text]


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o750)


def _commit(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    step = manifest.progress.step
    strike("save.before_manifest", step)
    (partial / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    _sync(partial / MANIFEST_FILE)
    _sync(partial)
    strike("save.before_rename", step)
    partial.rename(final)
    strike("save.after_rename", step)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old_checkpoints(run_dir: Path, retention: Retention) -> None:
    """Remove what the retention does not keep. What cannot be removed stays; training does not stop for it."""
    kept_multiples: set[int] = set()
    for checkpoint in find_checkpoints(run_dir)[: -retention.keep_last]:
        progress = read_manifest(checkpoint).progress
        multiple = progress.tokens // retention.keep_tokens
        if multiple > 0 and multiple not in kept_multiples:
            kept_multiples.add(multiple)  # the first one past each multiple
            continue
        _remove(checkpoint, progress.step)


def _remove(checkpoint: Path, step: int) -> None:
    trash = checkpoint.with_name(f".trash-{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(OSError):
        checkpoint.rename(trash)
        strike("purge.mid", step)
    shutil.rmtree(trash, ignore_errors=True)


def sweep_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left of a save or a removal. Called by one rank before training."""
    for path in (run_dir / CHECKPOINTS).glob(".*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
