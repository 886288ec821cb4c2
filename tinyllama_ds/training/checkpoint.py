"""What a checkpoint is, which one a run continues from, and how it is loaded.

`checkpoints/step_00001000/` holds DeepSpeed's files and `manifest.json`, which is written last (`saving.py`). What has
no manifest is no checkpoint; what has one is believed only after every file had its size and its SHA-256.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.probe import Probe
from tinyllama_ds.training.consolidate import whole_tensors
from tinyllama_ds.training.reshape import load_whole_tensors, parameter_shapes, write_whole_tensors

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MANIFEST_FILE = "manifest.json"
CHECKPOINTS = "checkpoints"  # the folders of a run directory
QUARANTINE = "quarantine"
FORMAT = 2  # of manifests, to be raised when an older version could not continue from a new one
_NAME = re.compile(r"step_(\d{8,})")
_SAFE_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Progress:
    """How far a run is: complete optimizer steps, and what they consumed. All there is to resume data and schedule."""

    step: int
    position: int  # samples consumed
    tokens: int
    chain: str = ""  # hash chain over the samples of all steps


@dataclass(frozen=True)
class File:
    """What a file of a checkpoint has to be."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Health:
    """What the process that continues from a checkpoint has to know of the numbers that led to it."""

    guard: dict = field(default_factory=dict)  # `Guard.state()`
    left_out: list[list[int]] = field(default_factory=list)  # samples, each [first, last]
    probe: Probe | None = None


@dataclass(frozen=True)
class CheckpointManifest:
    progress: Progress
    world_size: int
    zero_stage: int
    dtype: str  # of the weights that the forward pass used
    model: dict  # shapes
    run: dict  # what run.json said: recipe, configs, data, versions
    files: dict[str, File]
    health: Health = Health()
    format: int = FORMAT


class NewerFormat(Refusal):
    """A checkpoint that a later version of the toolkit wrote: not damaged, and not to be put aside."""


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first, ordered by their step as a number."""
    return [path for path in _find_folders(run_dir) if (path / MANIFEST_FILE).is_file()]


def _find_folders(run_dir: Path) -> list[Path]:
    """The same with what has the name of a checkpoint and has lost its manifest."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means: the folder itself, or the newest of a run directory."""
    if (path / MANIFEST_FILE).is_file():
        return path
    checkpoints = find_checkpoints(path)
    if not checkpoints:
        raise Refusal(f"{path}: holds no checkpoint; expected a run directory or a step_* folder with {MANIFEST_FILE}")
    return checkpoints[-1]


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a checkpoint. Nothing of it is verified yet."""
    path = checkpoint / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text())
        if raw.get("format", 1) > FORMAT:
            raise NewerFormat(f"{path}: has format {raw['format']} and is known up to {FORMAT}; use what wrote it")
        files = {name: File(**file) for name, file in raw["files"].items()}
        parts = {"progress": Progress(**raw["progress"]), "files": files, "health": _health(raw.get("health", {}))}
        return CheckpointManifest(**raw | parts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refusal(f"{path}: not a checkpoint manifest ({error})") from error


def _health(raw: dict) -> Health:
    probe = raw.get("probe")
    return Health(**raw | {"probe": Probe(**probe) if probe else None})


def newest_progress(run_dir: Path) -> tuple[int, int]:
    """Steps and tokens of the newest committed checkpoint; zeros where there is none that can be read."""
    for checkpoint in reversed(find_checkpoints(run_dir)):
        with suppress(Refusal):
            progress = read_manifest(checkpoint).progress
            return progress.step, progress.tokens
    return 0, 0


def verify_checkpoint(checkpoint: Path) -> CheckpointManifest:
    """The manifest, after every file it names was found to be ours and whole. Reads every byte, unpickles nothing.

    Raises `Refusal`, naming the file, where one is missing, changed, somebody else's, or writable by others.
    """
    _refuse_foreign(checkpoint)
    _refuse_foreign(checkpoint / MANIFEST_FILE)
    manifest = read_manifest(checkpoint)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        for _ in pool.map(lambda item: _verify_file(checkpoint, *item), manifest.files.items()):
            pass
    return manifest


def _verify_file(checkpoint: Path, name: str, expected: File) -> None:
    if not _SAFE_FILE_NAME.fullmatch(name):
        raise Refusal(f"{checkpoint / MANIFEST_FILE}: {name!r} is not the name of a checkpoint's file")
    path = checkpoint / name
    if not path.is_file() or path.stat().st_size != expected.size:
        raise Refusal(f"{path}: is missing or has another size than the {expected.size} bytes in {MANIFEST_FILE}")
    _refuse_foreign(path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
            raise Refusal(f"{path}: its SHA-256 is not the one in {MANIFEST_FILE}; the file is damaged")


def _refuse_foreign(path: Path) -> None:
    """A pickle runs code: only what this user wrote, and nobody else could have changed, is ever loaded."""
    try:
        status = path.lstat()
    except OSError as error:
        raise Refusal(f"{path}: cannot be read ({error.strerror})") from error
    if stat.S_ISLNK(status.st_mode):
        raise Refusal(f"{path}: is a symbolic link; expected the file itself")
    if status.st_uid != os.geteuid():
        raise Refusal(f"{path}: belongs to user {status.st_uid}; checkpoints are loaded by the user who wrote them")
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise Refusal(f"{path}: can be written by other users; expected at most mode 755 (chmod go-w)")


@dataclass(frozen=True)
class Choice:
    """The checkpoint to continue from, and why newer ones were put aside."""

    checkpoint: Path | None
    damages: list[str]


def choose_checkpoint(run_dir: Path) -> Choice:
    """The newest checkpoint that verifies; newer ones that do not are moved to `quarantine/`. Called by one rank.

    Raises `Refusal`, moving nothing, where there are checkpoints and none verifies, which is never a fresh start, and
    where a later version of the toolkit wrote one.
    """
    damaged: list[Path] = []
    damages: list[str] = []
    for checkpoint in reversed(_find_folders(run_dir)):
        try:
            verify_checkpoint(checkpoint)
        except NewerFormat:
            raise
        except Refusal as refusal:
            damaged.append(checkpoint)
            damages.append(str(refusal))
            continue
        for path in damaged:
            _quarantine(path, run_dir / QUARANTINE)
        return Choice(checkpoint, damages)
    if damages:
        raise Refusal(f"{run_dir / CHECKPOINTS}: none of {len(damages)} checkpoints verifies: {'; '.join(damages)}")
    return Choice(None, [])


def manifest_sha256(checkpoint: Path) -> str:
    """What identifies a checkpoint: its manifest has the SHA-256 of every file, so its own stands for all of them."""
    return hashlib.sha256((checkpoint / MANIFEST_FILE).read_bytes()).hexdigest()


def _quarantine(checkpoint: Path, quarantine: Path) -> None:
    quarantine.mkdir(mode=0o750, exist_ok=True)
    names = (f"{checkpoint.name}.{number}" for number in range(1_000_000))
    checkpoint.rename(next(quarantine / name for name in names if not (quarantine / name).exists()))


def load_checkpoint(engine: "DeepSpeedEngine", checkpoint: Path, zero_section: dict, scratch: Path) -> None:
    """Collective. Weights, optimizer and its step counter, into the layout that the run has now.

    The checkpoint has been verified by `choose_checkpoint`. `zero_section` is the run's own; one that differs from the
    checkpoint's, or another number of ranks, takes the way over whole tensors, which lie in `scratch` meanwhile.
    """
    manifest = read_manifest(checkpoint)
    configured = [dict(group, params=None) for group in engine.optimizer.param_groups]
    saved_section = manifest.run["deepspeed_config"]["zero_optimization"]
    if (manifest.world_size, saved_section) == (dist.get_world_size(), zero_section):
        with redirect_stdout(StringIO()):  # names of its own functions
            loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if loaded is None:
            raise Refusal(f"{checkpoint}: DeepSpeed found nothing to load in it")
    else:
        _load_reshaped(engine, checkpoint, manifest, scratch / f".{checkpoint.name}.whole")
    place_optimizer_state(engine.basic_optimizer)
    # DeepSpeed restores hyper-parameters too, under stage 3 the first group's in all of them, and at some stages the
    # clipping; the configured ones are in force.
    for group, wanted in zip(engine.optimizer.param_groups, configured, strict=True):
        group.update({key: value for key, value in wanted.items() if key != "params"})
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = engine.gradient_clipping()
    for number, wanted in enumerate(configured):
        for key, value in effective_hyper_parameters(engine, number).items():
            if value != wanted.get(key, value):
                raise Refusal(
                    f"{checkpoint}: {key} of optimizer group {number} is {value} after loading, not {wanted[key]}"
                )


def place_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Every tensor of the optimizer's state on the device where torch itself would have made it.

    That is the parameter's, but for the step counter, which lies in host memory unless the kernel is fused or can be
    captured. DeepSpeed and `reshape` put tensors in as they were read from a file, past torch's `load_state_dict`.
    """
    # Stage 3 lends its groups one parameter at a time, so that they do not lead to the states.
    steps_on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if torch.is_tensor(value):
                on_device = key != "step" or steps_on_device
                state[key] = value.to(parameter.device if on_device else "cpu")


def effective_hyper_parameters(engine: "DeepSpeedEngine", group: int) -> dict:
    """Learning rate, betas, eps, weight decay and what else a group has, in the optimizer that makes the steps."""
    return {key: value for key, value in engine.basic_optimizer.param_groups[group].items() if key != "params"}


def _load_reshaped(engine: "DeepSpeedEngine", checkpoint: Path, manifest: CheckpointManifest, whole: Path) -> None:
    if dist.get_rank() == 0:
        write_whole_tensors(checkpoint, manifest.zero_stage, parameter_shapes(engine), whole)
    dist.barrier()
    load_whole_tensors(engine, whole)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(whole)


def consolidated_weights(checkpoint: Path) -> tuple[CheckpointManifest, dict[str, torch.Tensor]]:
    """The whole model on the CPU, under its parameter names, in the dtype that the forward pass used."""
    manifest, tensors = stream_weights(checkpoint)
    return manifest, {name: tensor.clone() for name, tensor in tensors}


def stream_weights(checkpoint: Path) -> tuple[CheckpointManifest, Iterator[tuple[str, torch.Tensor]]]:
    """The same, one after another, with one tensor in memory.

    Under bf16 training the weights are the fp32 masters rounded once, exactly what the last step left in the model.
    """
    manifest = verify_checkpoint(checkpoint)
    dtype = getattr(torch, manifest.dtype)
    tensors = whole_tensors(checkpoint, manifest.zero_stage)
    return manifest, ((name, tensor.to(dtype)) for name, tensor in tensors)
