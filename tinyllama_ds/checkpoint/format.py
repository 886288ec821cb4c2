"""What a checkpoint is, which one a run continues from, and how it is loaded.

`checkpoints/step_00001000/` holds DeepSpeed's files and `manifest.json`, which is written last (`saving.py`). What has
no manifest is no checkpoint; what has one is believed only after every file had its size and its SHA-256.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.distributed as dist
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from tinyllama_ds.checkpoint.consolidate import whole_tensors
from tinyllama_ds.checkpoint.description import Count, check_guard_state, first_problem, why_no_description
from tinyllama_ds.checkpoint.reshape import load_whole_tensors, parameter_shapes, write_whole_tensors
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import parse_row, remove, without_wildcards
from tinyllama_ds.layout import CHECKPOINTS, QUARANTINE
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.probe import Probe

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MANIFEST_FILE = "manifest.json"
FORMAT = 2  # of manifests, to be raised when an older version could not continue from a new one
_NAME = re.compile(r"step_(\d{8,})")
_SAFE_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Progress:
    """How far a run is: complete optimizer steps, and what they consumed. All there is to resume data and schedule."""

    step: Count
    position: Count  # samples consumed
    tokens: Count
    chain: str = ""  # hash chain over the samples of all steps


@dataclass(frozen=True)
class File:
    """What a file of a checkpoint has to be."""

    size: Count  # bytes
    sha256: str


@dataclass(frozen=True)
class Health:
    """What the process that continues from a checkpoint has to know of the numbers that led to it."""

    guard: Annotated[dict, AfterValidator(check_guard_state)] = field(default_factory=dict)
    left_out: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = field(default_factory=list)  # samples
    probe: Probe | None = None


@dataclass(frozen=True)
class CheckpointManifest:
    progress: Progress
    world_size: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|float16)$")]  # of the weights that the forward pass used
    model: dict  # shapes
    run: dict  # what run.json said: recipe, configs, data, versions
    files: dict[str, File]
    health: Health = Health()
    format: int = FORMAT


class NewerFormat(ConfigError):
    """A checkpoint that a later version of the toolkit wrote: not damaged, and not to be put aside."""


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first, ordered by their step as a number."""
    return [path for path in find_folders(run_dir) if os.path.isfile(path / MANIFEST_FILE)]


def find_folders(run_dir: Path) -> list[Path]:
    """The same with what has the name of a checkpoint and has lost its manifest."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means: the folder itself, or the newest of a run directory."""
    if os.path.isfile(path / MANIFEST_FILE):
        return path
    checkpoints = find_checkpoints(path)
    if not checkpoints:
        raise ConfigError(
            f"{path}: holds no checkpoint; expected a run directory or a step_* folder with {MANIFEST_FILE}"
        )
    return checkpoints[-1]


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a checkpoint. Nothing of it is verified yet."""
    path = checkpoint / MANIFEST_FILE
    try:
        text = path.read_bytes()
        if (version := _version_of(text)) > FORMAT:
            raise NewerFormat(f"{path}: has format {version} and is known up to {FORMAT}; use what wrote it")
        manifest = TypeAdapter(CheckpointManifest).validate_json(text, strict=True)
        reason = why_no_description(manifest.run)
    except OSError as error:
        reason = str(error.strerror)
    except ValidationError as error:
        reason = first_problem(error)
    if reason is not None:
        raise ConfigError(f"{path}: not a checkpoint manifest ({reason}); take another checkpoint")
    return manifest


def _version_of(text: bytes) -> int:
    row = parse_row(text, format=int)
    return 1 if row is None else row["format"]


def model_of(checkpoint: Path, manifest: CheckpointManifest) -> LlamaConfig:
    """The shapes of the model in a checkpoint. Raises `ConfigError` where they are none."""
    try:
        return TypeAdapter(LlamaConfig).validate_python(manifest.model)
    except (ValidationError, ZeroDivisionError, ConfigError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise ConfigError(f"{checkpoint / MANIFEST_FILE}: model: {reason}") from error


def newest_progress(run_dir: Path) -> tuple[int, int]:
    """Steps and tokens of the newest committed checkpoint; zeros where there is none that can be read."""
    for checkpoint in reversed(find_checkpoints(run_dir)):
        with suppress(ConfigError):
            progress = read_manifest(checkpoint).progress
            return progress.step, progress.tokens
    return 0, 0


def verify_checkpoint(checkpoint: Path) -> CheckpointManifest:
    """The manifest, after every file it names was found to be ours and whole. Reads every byte, unpickles nothing.

    Raises `ConfigError`, naming the file, where one is missing, changed, somebody else's, or writable by others.
    """
    _reject_foreign(checkpoint)
    _reject_foreign(checkpoint / MANIFEST_FILE)
    manifest = read_manifest(checkpoint)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        for _ in pool.map(lambda item: _verify_file(checkpoint, *item), manifest.files.items()):
            pass
    return manifest


def _verify_file(checkpoint: Path, name: str, expected: File) -> None:
    if not _SAFE_FILE_NAME.fullmatch(name):
        raise ConfigError(f"{checkpoint / MANIFEST_FILE}: {name!r} is not the name of a checkpoint's file")
    path = checkpoint / name
    if not path.is_file() or path.stat().st_size != expected.size:
        raise ConfigError(f"{path}: is missing or has another size than the {expected.size} bytes in {MANIFEST_FILE}")
    _reject_foreign(path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
            raise ConfigError(f"{path}: its SHA-256 is not the one in {MANIFEST_FILE}; the file is damaged")


def _reject_foreign(path: Path) -> None:
    """A pickle runs code: only what this user wrote, and nobody else could have changed, is ever loaded."""
    try:
        status = path.lstat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(f"{path}: is a symbolic link; expected the file itself")
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path}: belongs to user {status.st_uid}; checkpoints are loaded by the user who wrote them"
            f"; start as that user, or take it over with chown {os.geteuid()} if you trust it"
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise ConfigError(f"{path}: can be written by other users; expected at most mode 755 (chmod go-w)")


@dataclass(frozen=True)
class Choice:
    """The checkpoint to continue from, and why newer ones were put aside."""

    checkpoint: Path | None
    damages: list[str]


def choose_checkpoint(run_dir: Path) -> Choice:
    """The newest checkpoint that verifies; newer ones that do not are moved to `quarantine/`. Called by one rank.

    Raises `ConfigError`, moving nothing, where there are checkpoints and none verifies, which is never a fresh start,
    and where a later version of the toolkit wrote one.
    """
    damaged: list[Path] = []
    damages: list[str] = []
    for checkpoint in reversed(find_folders(run_dir)):
        try:
            verify_checkpoint(checkpoint)
        except NewerFormat:
            raise
        except ConfigError as error:
            damaged.append(checkpoint)
            damages.append(str(error))
            continue
        for path in damaged:
            put_aside(path, run_dir)
        return Choice(checkpoint, damages)
    if damages:
        raise ConfigError(
            f"{run_dir / CHECKPOINTS}: none of {len(damages)} checkpoints verifies: {'; '.join(damages)}; restore one"
            " of them, or choose another --run-dir"
        )
    return Choice(None, [])


def manifest_sha256(checkpoint: Path) -> str:
    """What identifies a checkpoint: its manifest has the SHA-256 of every file, so its own stands for all of them."""
    return hashlib.sha256((checkpoint / MANIFEST_FILE).read_bytes()).hexdigest()


def put_aside(path: Path, run_dir: Path) -> None:
    """Move what stands in the place of a checkpoint and is none, whatever it is, to `quarantine/`. Raises OSError."""
    quarantine = run_dir / QUARANTINE
    quarantine.mkdir(mode=0o750, exist_ok=True)
    names = (f"{path.name}.{number}" for number in range(1_000_000))
    path.rename(next(quarantine / name for name in names if not os.path.lexists(quarantine / name)))


def load_checkpoint(engine: "DeepSpeedEngine", checkpoint: Path, zero_section: dict, scratch: Path) -> None:
    """Collective. Weights, optimizer and its step counter, into the layout that the run has now.

    The checkpoint has been verified by `choose_checkpoint`. `zero_section` is the run's own; one that differs from the
    checkpoint's, or another number of ranks, takes the way over whole tensors, which lie in `scratch` meanwhile.
    """
    manifest = read_manifest(checkpoint)
    configured = [dict(group, params=None) for group in engine.optimizer.param_groups]
    saved_section = manifest.run.get("deepspeed_config", {}).get("zero_optimization")
    if (manifest.world_size, saved_section) == (dist.get_world_size(), zero_section):
        with redirect_stdout(StringIO()), without_wildcards(checkpoint.parent) as folder:  # it looks with `glob`
            loaded, _ = engine.load_checkpoint(str(folder), tag=checkpoint.name)
        if loaded is None:
            raise ConfigError(f"{checkpoint}: DeepSpeed found nothing to load in it")
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
                raise ConfigError(
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
        with without_wildcards(checkpoint.parent) as there, without_wildcards(whole.parent) as here:
            folders = there / checkpoint.name, here / whole.name
            write_whole_tensors(folders[0], manifest.zero_stage, parameter_shapes(engine), folders[1])
    dist.barrier()
    with without_wildcards(whole.parent) as here:
        load_whole_tensors(engine, here / whole.name)
    dist.barrier()
    if dist.get_rank() == 0:
        remove(whole)


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
