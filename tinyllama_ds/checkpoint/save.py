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

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

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
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.files import remove, sha256_of, sync, write_object
from tinyllama_ds.hf.weights import save_tensors
from tinyllama_ds.layout import CHECKPOINTS
from tinyllama_ds.model.config import LlamaConfig, dtype_name

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Outcome: TypeAlias = tuple[Any, str | None]  # what an action returned, and what went wrong
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of the DeepSpeed engine
_Work: TypeAlias = Future[Outcome]
_NOTHING: Outcome = None, None


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

    `save` begins one, `advance` after every step takes it on, `finish` waits for its end. `on_end` is called with the
    outcome of each, on all ranks.
    """

    def __init__(self, settings: SaveSettings, world: DistributedInfo, on_end: Callable[[Save], None]) -> None:
        self._settings = settings
        self._world = world
        self._on_end = on_end
        self._saved_at = monotonic()
        self._buffer = HostStateBuffer(world)
        self._pool = ThreadPoolExecutor(1, "saving")
        self._pending: _PendingSave | None = None
        self._failures = self._failures_in_a_row = 0
        self._last_failures: list[str] = []

    def is_due(self) -> bool:
        """Whether the wall-clock interval has passed on this rank."""
        return monotonic() - self._saved_at >= self._settings.interval

    def is_busy(self) -> bool:
        """Whether this rank still has something to do for a save."""
        return self._pending is not None and not self._pending.work.done()

    def save(self, engine: "DeepSpeedEngine", progress: Progress, health: Callable[[], Health]) -> None:
        """Collective. Begin a save, after the end of the one before; `health` is called for what goes with it.

        The caller has checked that the weights are finite and equal on all ranks (`health.guard.check_parameters`).
        """
        self.finish()
        self._saved_at = monotonic()
        save = Save(progress, perf_counter())
        self._continue(save, self._protocol(save, engine, health))

    def copy_state(self, engine: "DeepSpeedEngine", progress: Progress) -> None:
        """Only the copy into host memory, whose buffers are kept for later saves. Raises OSError."""
        _, failure = _attempt(lambda: self._buffer.copy_from(engine, progress))
        if failure is not None:
            raise OSError(failure)

    def advance(self, is_any_busy: bool) -> None:
        """Collective where a save is under way and no rank is busy with it: agree on what was done, begin the rest."""
        if self._pending is not None and not is_any_busy:
            self._continue(self._pending.save, self._pending.protocol)

    def finish(self) -> None:
        """Collective. Wait for the end of the save that is under way."""
        while self._pending is not None:
            started = perf_counter()
            self._pending.work.result()
            self._pending.save.stall += perf_counter() - started
            self.advance(is_any_busy=False)

    def finish_or_raise(self) -> None:
        """Collective. As `finish`; raises OSError on all ranks where the save failed.

        For the last save of a run, which does not count as finished when its end is lost.
        """
        self.finish()
        if self._last_failures:
            raise OSError(f"the last save failed: {'; '.join(self._last_failures)}")

    def _continue(self, save: Save, protocol: "Iterator[_Work]") -> None:
        """Collective. Take a save on to its next work in the background, or to its end."""
        started = perf_counter()
        work = next(protocol, None)
        self._pending = None if work is None else _PendingSave(save, protocol, work)
        save.stall += perf_counter() - started
        if work is None:
            self._end(save)

    def _protocol(self, save: Save, engine: "DeepSpeedEngine", health: Callable[[], Health]) -> "Iterator[_Work]":
        """A save from its begin to its end. What is yielded is done in the background; no rank is busy after it."""
        final = self._settings.run_dir / CHECKPOINTS / checkpoint_name(save.progress.step)
        partial = final.with_name(f".{final.name}.partial")
        manifest = self._describe(engine, save.progress, health())
        _, failure = _attempt(lambda: self._make_room(partial)) if self._world.is_rank0 else _NOTHING
        save.failures = _name_ranks(gather_from_ranks(failure))
        if save.failures:
            return
        staged, failure = _attempt(lambda: self._buffer.copy_from(engine, save.progress))
        writing = self._begin(lambda: write_files(partial, self._world.rank, staged), is_needed=failure is None)
        yield writing
        files, write_failure = writing.result()
        files = self._agree(save, gather_from_ranks([files, failure or write_failure]))
        manifest = replace(manifest, files=files)
        concluding = self._begin(lambda: self._conclude(save, partial, final, manifest), self._world.is_rank0)
        yield concluding
        _, failure = concluding.result()
        save.failures = save.failures or _name_ranks(gather_from_ranks(failure))

    def _begin(self, action: Callable[[], Any], is_needed: bool) -> "_Work":
        return self._pool.submit(_attempt, action if is_needed else lambda: None)

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

    def _agree(self, save: Save, reports: list) -> dict[str, File]:
        """The files of all ranks, which have written them or failed to."""
        save.failures = _name_ranks([failure for _, failure in reports])
        files = {name: File(**file) for written, _ in reports for name, file in (written or {}).items()}
        save.size = sum(file.size for file in files.values())
        return files

    def _conclude(self, save: Save, partial: Path, final: Path, manifest: CheckpointManifest) -> None:
        """On rank 0, in the background: commit the files of all ranks, or remove them."""
        try:
            if not save.failures:
                _commit(partial, final, manifest)
                remove_old_checkpoints(self._settings.run_dir, self._settings.retention)
        finally:
            remove(partial)

    def _end(self, save: Save) -> None:
        save.seconds = perf_counter() - save.started
        self._last_failures = save.failures
        self._failures += bool(save.failures)
        self._failures_in_a_row = self._failures_in_a_row + 1 if save.failures else 0
        save.failures_so_far, save.failures_in_a_row = self._failures, self._failures_in_a_row
        self._on_end(save)


@dataclass(frozen=True)
class _PendingSave:
    """A save between its begin and its end, as this rank sees it."""

    save: Save
    protocol: "Iterator[_Work]"
    work: "_Work"


def describe_optimizer(engine: "DeepSpeedEngine") -> OptimizerRecord:
    """The manifest entry of the optimizer of an engine."""
    optimizer = engine.basic_optimizer
    counters = {name: getattr(engine, name) for name in COUNTERS}
    return optimizer_record(type(optimizer).__name__, optimizer.state.values(), optimizer.param_groups, counters)


def optimizer_record(name: str, states: Iterable[dict], groups: list[dict], counters: dict) -> OptimizerRecord:
    """The manifest entry of an optimizer with these states and parameter groups."""
    steps = [torch.as_tensor(state["step"]) for state in states if "step" in state]
    step = int(torch.stack(steps).max()) if steps else 0  # of fused kernels on the device: one wait for all
    hyper_parameters = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return OptimizerRecord(name, step, hyper_parameters, {name: int(count) for name, count in counters.items()})


def write_files(folder: Path, rank: int, staged: StagedState) -> dict[str, dict]:
    """Write the files of a rank, one for each kind; returns the manifest entry of each by its name."""
    names = {kind: f"rank_{rank:05d}.{kind}.safetensors" for kind in staged}
    return {names[kind]: asdict(write_file(folder / names[kind], tensors)) for kind, tensors in staged.items()}


def write_file(path: Path, tensors: dict[str, Tensor]) -> File:
    """Write a safetensors file durably; returns its size and hash."""
    save_tensors(path, tensors)
    return _sync_and_hash(path)


def _sync_and_hash(path: Path) -> File:
    """Make a written file durable; it is hashed as the file system gives it back."""
    sync(path)
    return File(path.stat().st_size, sha256_of(path))


def _attempt(action: Callable[[], Any]) -> Outcome:
    """What an action returns, and what went wrong."""
    try:
        return action(), None
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        return None, f"{type(error).__name__}: {error}"


def _name_ranks(failures: list[str | None]) -> list[str]:
    """What failed on all ranks, the same list on each."""
    return [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]


def _commit(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    write_object(partial / MANIFEST_FILE, asdict(manifest))
    _rename(partial, final)
    sync(final.parent)


def _rename(partial: Path, final: Path) -> None:
    if os.path.lexists(final):  # for example an incomplete copy: from a checkpoint the run would have resumed
        move_to_quarantine(final, final.parents[1])
    partial.rename(final)
