"""What a checkpoint is, and which one a run continues from.

`checkpoints/step_00001000/` holds safetensors files and `manifest.json`, which is written last (`save.py`). A folder
without a manifest is not a checkpoint; one with a manifest is trusted only after every file had its size and SHA-256.
Tensors are named `kind/parameter[start:stop]`: a range of a flattened parameter, see `fragments.py` and `reader.py`.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from tinyllama_ds.checkpoint.description import Count, check_description, check_guard_state
from tinyllama_ds.config.validation import validate, validate_json
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import SAFE_FILE_NAME, parse_row, sha256_of
from tinyllama_ds.layout import CHECKPOINTS, QUARANTINE
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.probe import Probe

MANIFEST_FILE = "manifest.json"
FORMAT = 3  # of manifests, to be raised when an older version could not continue from a new one
_NAME = re.compile(r"step_(\d{8,})")


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
class OptimizerRecord:
    """What the state of the optimizer belongs to. Only the step is loaded; a run's config has the hyper-parameters."""

    type: str
    step: Count  # that Adam's bias correction counts: without the skipped ones
    groups: list[dict]  # hyper-parameters
    counters: dict[str, Count] = field(default_factory=dict)  # of the DeepSpeed engine


@dataclass(frozen=True)
class CheckpointManifest:
    """Everything of a checkpoint that is not a tensor."""

    progress: Progress
    world_size: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|float16)$")]  # of the weights that the forward pass used
    model: dict  # shapes
    run: dict  # the content of run.json: recipe, configs, data, versions
    parameters: dict[str, list[Count]]  # shapes, in the order of the model
    optimizer: OptimizerRecord
    files: dict[str, File]
    health: Health = Health()
    format: int = FORMAT


class DifferentFormat(ConfigError):
    """A checkpoint that another version of the toolkit wrote: not damaged, and never quarantined."""


def tensor_name(kind: str, parameter: str, start: int, stop: int) -> str:
    """The name of a range of a flattened parameter: "exp_avg/lm_head.weight[0:100]". `CheckpointReader` parses it."""
    return f"{kind}/{parameter}[{start}:{stop}]"


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


def last_checkpoints(path: Path, count: int) -> list[Path]:
    """The checkpoint that a user means and those before it in its run, oldest first.

    Raises `ConfigError` where the run has kept fewer.
    """
    newest = resolve_checkpoint(path)
    kept = find_checkpoints(newest.absolute().parents[1])
    before = [checkpoint for checkpoint in kept if checkpoint.name < newest.name]
    if len(before) < count - 1:
        raise ConfigError(f"{path}: has {len(before) + 1} checkpoints up to {newest.name}; expected {count} to average")
    return [*before[len(before) - count + 1 :], newest]


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a checkpoint. Nothing of it is verified yet."""
    path = checkpoint / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); use a different checkpoint") from error
    _reject_different_format(path, content)
    place = f"{path}: not a checkpoint manifest; use a different checkpoint"
    manifest = validate_json(CheckpointManifest, content, place)
    check_description(manifest.run, place)
    return manifest


def _reject_different_format(path: Path, content: bytes) -> None:
    row = parse_row(content, format=int)
    version = FORMAT if row is None else row["format"]
    if version > FORMAT:
        raise DifferentFormat(f"{path}: has format {version} and is known up to {FORMAT}; use what wrote it")
    if version < FORMAT:
        raise DifferentFormat(
            f"{path}: has format {version}, which is DeepSpeed's own; convert it to format {FORMAT} with tinyllama-ds"
            " import-checkpoint"
        )


def model_of(checkpoint: Path, shapes: dict) -> LlamaConfig:
    """The model by the shapes in the manifest of a checkpoint. Raises `ConfigError` where they are not valid."""
    try:
        return validate(LlamaConfig, shapes, "model")
    except ConfigError as error:
        raise ConfigError(f"{checkpoint / MANIFEST_FILE}: {error}") from error


def newest_progress(run_dir: Path) -> tuple[int, int]:
    """Steps and tokens of the newest committed checkpoint; zeros where there is none that can be read."""
    for checkpoint in reversed(find_checkpoints(run_dir)):
        with suppress(ConfigError):
            progress = read_manifest(checkpoint).progress
            return progress.step, progress.tokens
    return 0, 0


def verify_checkpoint(checkpoint: Path) -> CheckpointManifest:
    """The manifest, after every file it names was found to be whole. Reads every byte.

    Raises `ConfigError`, naming the file, where one is missing or changed.
    """
    manifest = read_manifest(checkpoint)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        for _ in pool.map(lambda item: verify_file(checkpoint, *item), manifest.files.items()):
            pass
    return manifest


def verify_file(checkpoint: Path, name: str, expected: File) -> None:
    """Raise `ConfigError` unless a file has its size and its hash."""
    if not SAFE_FILE_NAME.fullmatch(name):
        raise ConfigError(f"{checkpoint / MANIFEST_FILE}: {name!r} is not the name of a checkpoint's file")
    path = checkpoint / name
    if not path.is_file() or path.stat().st_size != expected.size:
        raise ConfigError(f"{path}: missing or size mismatch (expected {expected.size} bytes by {MANIFEST_FILE})")
    if sha256_of(path) != expected.sha256:
        raise ConfigError(f"{path}: its SHA-256 is not the one in {MANIFEST_FILE}; the file is damaged")


@dataclass(frozen=True)
class Choice:
    """The checkpoint to continue from, and why newer ones were quarantined."""

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
        except DifferentFormat:
            raise
        except ConfigError as error:
            damaged.append(checkpoint)
            damages.append(str(error))
            continue
        for path in damaged:
            move_to_quarantine(path, run_dir)
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


def move_to_quarantine(path: Path, run_dir: Path) -> None:
    """Move a damaged checkpoint, or anything else in its place, to `quarantine/`. Raises OSError."""
    quarantine = run_dir / QUARANTINE
    quarantine.mkdir(mode=0o750, exist_ok=True)
    names = (f"{path.name}.{number}" for number in range(1_000_000))
    path.rename(next(quarantine / name for name in names if not os.path.lexists(quarantine / name)))
