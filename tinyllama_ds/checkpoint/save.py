"""The commit protocol: every rank writes, all agree, one rename. Whatever dies on the way, the last checkpoint stands.

Training stalls only for a copy of the state into host memory; the rest runs in a background thread per rank:

1. Rank 0 makes `checkpoints/.step_00001000.partial/`, and every rank copies its state. Training continues.
2. Every rank writes its files into it, hashing them on the way to the disk, and syncs them.
3. At the first step after which no rank is busy any more, the ranks gather what they wrote and what went wrong; one
   failure makes all of them abandon this save.
4. Rank 0 writes `manifest.json` last, syncs it and the folder, and renames the folder to its final name.
5. Old checkpoints go, each by a rename to `.trash-` first, so that half of one is never taken for a whole.

The threads never talk to each other: whether a rank is busy is part of the one sum that every step makes anyway
(`guard.all_reduce_step_status`), and all collectives are called by the training thread, in the same order on all ranks.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Thread
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from tinyllama_ds.checkpoint.disk_space import check_disk_space, checkpoint_need
from tinyllama_ds.checkpoint.format import (
    MANIFEST_FILE,
    CheckpointManifest,
    File,
    Health,
    OptimizerRecord,
    Progress,
    checkpoint_name,
    move_to_quarantine,
)
from tinyllama_ds.checkpoint.fragments import parameter_shapes
from tinyllama_ds.checkpoint.retention import Retention, remove_old_checkpoints
from tinyllama_ds.checkpoint.staging import HostStateBuffer, StagedState
from tinyllama_ds.distributed.collectives import gather_from_ranks
from tinyllama_ds.files import remove, sync
from tinyllama_ds.layout import CHECKPOINTS
from tinyllama_ds.model.config import LlamaConfig, dtype_name

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

from tinyllama_ds.distributed.world import DistributedInfo


@dataclass
class Save:
    """How a save went."""

    progress: Progress
    started: float
    stall: float = 0.0  # stall of training, in seconds
    seconds: float = 0.0  # from its begin to its end
    size: int = 0  # bytes, over all ranks
    failures: list[str] = field(default_factory=list)  # what failed, on which rank
    failures_in_a_row: int = 0  # saves, this one included
    failures_so_far: int = 0


@dataclass(frozen=True)
class SaveSettings:
    """Directory, retention and interval of a run's checkpoints, and the description for their manifests."""

    run_dir: Path
    retention: Retention
    interval: float  # seconds of wall-clock time, after which a save is due
    model: LlamaConfig
    description: dict  # what run.json holds


class Saver:
    """Saves a run's checkpoints in the background, one at a time, and tracks when the next one is due.

    `save` begins one, `advance` after every step takes it on, `finish` waits for its end. `on_end` is told, on all
    ranks, how each of them went.
    """

    def __init__(self, settings: SaveSettings, world: DistributedInfo, on_end: Callable[[Save], None]) -> None:
        self._settings = settings
        self._world = world
        self._on_end = on_end
        self._saved_at = monotonic()
        self._buffer = HostStateBuffer(world)
        self._pending_save: _PendingSave | None = None
        self._failures = self._failures_in_a_row = 0
        self._last_failures: list[str] = []

    def is_due(self) -> bool:
        """Whether the wall-clock interval has passed on this rank."""
        return monotonic() - self._saved_at >= self._settings.interval

    def is_busy(self) -> bool:
        """Whether this rank still has something to do for a save."""
        return self._pending_save is not None and self._pending_save.work.is_alive()

    def save(self, engine: "DeepSpeedEngine", progress: Progress, health: Callable[[], Health]) -> None:
        """Collective. Begin a save, after the end of the one before; `health` is called for what goes with it.

        The caller has checked that the weights are finite and equal on all ranks (`health.guard.check_parameters`).
        """
        self.finish()
        started = perf_counter()
        self._saved_at = monotonic()
        final = self._settings.run_dir / CHECKPOINTS / checkpoint_name(progress.step)
        partial = final.with_name(f".{final.name}.partial")
        save = Save(progress, started)
        manifest = self._describe(engine, progress, health())
        _, failure = _attempt(lambda: self._make_room(partial)) if self._world.is_rank0 else (None, None)
        save.failures = _failures_of_all(failure)
        if save.failures:
            self._end(save)
            return
        staged, failure = _attempt(lambda: self._buffer.copy_from(engine, progress))
        work = _Background(lambda: self._write_files(staged, partial), failure)
        self._pending_save = _PendingSave(save, partial, final, manifest, work, self._commit_or_abandon)
        save.stall += perf_counter() - started

    def copy_state(self, engine: "DeepSpeedEngine", progress: Progress) -> None:
        """Only the copy into host memory, whose buffers are kept for later saves. Raises OSError."""
        _, failure = _attempt(lambda: self._buffer.copy_from(engine, progress))
        if failure is not None:
            raise OSError(failure)

    def advance(self, is_any_busy: bool) -> None:
        """Collective where a save is under way and no rank is busy with it: agree on what was done, begin the rest."""
        if self._pending_save is None or is_any_busy:
            return
        pending_save, started = self._pending_save, perf_counter()
        pending_save.next(pending_save)
        pending_save.save.stall += perf_counter() - started
        if self._pending_save is None:
            self._end(pending_save.save)

    def finish(self) -> None:
        """Collective. Wait for the end of the save that is under way."""
        while self._pending_save is not None:
            started = perf_counter()
            self._pending_save.work.wait()
            self._pending_save.save.stall += perf_counter() - started
            self.advance(is_any_busy=False)

    def finish_or_raise(self) -> None:
        """Collective. As `finish`; raises OSError on all ranks where the save failed.

        For the last save of a run, which does not count as finished when its end is lost.
        """
        self.finish()
        if self._last_failures:
            raise OSError(f"the last save failed: {'; '.join(self._last_failures)}")

    def _describe(self, engine: "DeepSpeedEngine", progress: Progress, health: Health) -> CheckpointManifest:
        dtype = dtype_name(next(engine.module.parameters()).dtype)
        stage = engine.zero_optimization_stage()
        settings = self._settings
        return CheckpointManifest(
            progress,
            self._world.size,
            stage,
            dtype,
            settings.model.to_dict(),
            settings.description,
            parameter_shapes(engine),
            describe_optimizer(engine),
            {},
            health,
        )

    def _make_room(self, partial: Path) -> None:
        """Make an empty folder; raises OSError where the file system cannot take another checkpoint."""
        remove(partial)
        partial.mkdir(parents=True, mode=0o750)
        config = self._settings.description.get("deepspeed_config", {})
        try:
            check_disk_space(partial, checkpoint_need(self._settings.model.num_parameters, config, self._world.size))
        except OSError:
            partial.rmdir()
            raise

    def _write_files(self, staged: StagedState, folder: Path) -> dict[str, dict]:
        """Write this rank's files, one for each kind; returns the manifest entry of each."""
        files = {}
        for kind, tensors in staged.items():
            name = f"rank_{self._world.rank:05d}.{kind}.safetensors"
            files[name] = asdict(write_file(folder / name, tensors))
        return files

    def _commit_or_abandon(self, pending_save: "_PendingSave") -> None:
        """Collective. Every rank has written its files, or failed to."""
        reports = gather_from_ranks([pending_save.work.failure, pending_save.work.result])
        self._conclude_or_abandon(pending_save.save, reports)

    def _conclude_or_abandon(self, save: Save, reports: list) -> None:
        """Let rank 0 commit the files of all ranks in the background, or remove them."""
        pending_save = self._pending_save
        assert pending_save is not None
        save.failures = _name_ranks([failure for failure, _ in reports])
        files = {name: File(**file) for _, written in reports for name, file in (written or {}).items()}
        save.size = sum(file.size for file in files.values())
        manifest = replace(pending_save.manifest, files=files)
        pending_save.work = _Background(lambda: self._conclude(pending_save, manifest), wanted=self._world.is_rank0)
        pending_save.next = self._agree_on_end

    def _conclude(self, pending_save: "_PendingSave", manifest: CheckpointManifest) -> None:
        """On rank 0, in the background."""
        try:
            if not pending_save.save.failures:
                _commit(pending_save.partial, pending_save.final, manifest)
                remove_old_checkpoints(self._settings.run_dir, self._settings.retention)
        finally:
            remove(pending_save.partial)

    def _agree_on_end(self, pending_save: "_PendingSave") -> None:
        """Collective. Rank 0 has committed the save, or abandoned it."""
        pending_save.save.failures = pending_save.save.failures or _failures_of_all(pending_save.work.failure)
        self._pending_save = None

    def _end(self, save: Save) -> None:
        save.seconds = perf_counter() - save.started
        self._last_failures = save.failures
        self._failures += bool(save.failures)
        self._failures_in_a_row = self._failures_in_a_row + 1 if save.failures else 0
        save.failures_so_far, save.failures_in_a_row = self._failures, self._failures_in_a_row
        self._on_end(save)


@dataclass
class _PendingSave:
    """A save between its begin and its end, as this rank sees it."""

    save: Save
    partial: Path
    final: Path
    manifest: CheckpointManifest
    work: "_Background"
    next: Callable[["_PendingSave"], None]  # what all ranks do once none is busy


class _Background(Thread):
    """Runs an action in the background; keeps its result or its failure."""

    def __init__(self, action: Callable[[], Any], failure: str | None = None, wanted: bool = True) -> None:
        super().__init__(name="saving", daemon=True)
        self.result: Any = None
        self.failure = failure
        self._action = action
        self._is_started = wanted and failure is None
        if self._is_started:
            self.start()

    def run(self) -> None:
        self.result, self.failure = _attempt(self._action)

    def wait(self) -> None:
        if self._is_started:
            self.join()


def describe_optimizer(engine: "DeepSpeedEngine") -> OptimizerRecord:
    """The manifest entry of the optimizer of an engine."""
    optimizer = engine.basic_optimizer
    step = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    counters = {name: int(getattr(engine, name)) for name in ("global_steps", "global_samples", "skipped_steps")}
    return OptimizerRecord(type(optimizer).__name__, step, groups, counters)


def write_file(path: Path, tensors: "dict[str, Tensor]") -> File:
    """Write a safetensors file durably; returns its size and hash."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    return _sync_and_hash(path)


def _sync_and_hash(path: Path) -> File:
    """Make a written file durable; it is hashed as the file system gives it back."""
    sync(path)
    with path.open("rb") as file:
        return File(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What an action returns, and what went wrong."""
    try:
        return action(), None
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        return None, f"{type(error).__name__}: {error}"


def _failures_of_all(failure: str | None) -> list[str]:
    """What failed on all ranks, the same list on each."""
    return _name_ranks(gather_from_ranks(failure))


def _name_ranks(failures: list[str | None]) -> list[str]:
    return [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]


def _commit(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    (partial / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    sync(partial / MANIFEST_FILE)
    sync(partial)
    _rename(partial, final)
    sync(final.parent)


def _rename(partial: Path, final: Path) -> None:
    if os.path.lexists(final):  # for example an incomplete copy: from a checkpoint the run would have resumed
        move_to_quarantine(final, final.parents[1])
    partial.rename(final)
