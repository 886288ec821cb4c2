"""Checkpoints: written by DeepSpeed into a temporary folder, committed by a manifest and one rename.

`checkpoints/step_00001000/` holds DeepSpeed's files and `manifest.json`, which is written last. What has no manifest
is no checkpoint.
"""

import json
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from tinyllama_ds.errors import Refusal

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_NAME = re.compile(r"step_(\d{8,})")
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: complete optimizer steps, and what they consumed. All there is to resume data and schedule."""

    step: int
    position: int  # samples consumed
    tokens: int


@dataclass(frozen=True)
class CheckpointManifest:
    progress: Progress
    world_size: int
    zero_stage: int
    dtype: str  # of the weights that the forward pass used
    model: dict  # shapes
    run: dict  # what run.json said: recipe, configs, data, versions
    files: dict[str, int]  # sizes in bytes


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first, ordered by their step as a number."""
    found = []
    for path in (run_dir / "checkpoints").glob("step_*"):
        match = _NAME.fullmatch(path.name)
        if match and (path / MANIFEST_FILE).is_file():
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
    """The manifest, after every file it names was found with its size."""
    path = checkpoint / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text())
        manifest = CheckpointManifest(**raw | {"progress": Progress(**raw["progress"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Refusal(f"{path}: not a checkpoint manifest ({error})") from error
    for name, size in manifest.files.items():
        file = checkpoint / name
        if not file.is_file() or file.stat().st_size != size:
            raise Refusal(f"{file}: is missing or has another size than the {size} bytes in {MANIFEST_FILE}")
    return manifest


def save_checkpoint(engine: "DeepSpeedEngine", run_dir: Path, progress: Progress, model: dict, run: dict) -> Path:
    """Collective. Returns the committed folder; an existing one of the same step is left alone."""
    root = run_dir / "checkpoints"
    final = root / f"step_{progress.step:08d}"
    partial = root / f".{final.name}.partial"
    if (final / MANIFEST_FILE).is_file():
        return final
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(root), tag=partial.name, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
        stage = engine.zero_optimization_stage()
        manifest = CheckpointManifest(progress, dist.get_world_size(), stage, dtype, model, run, files)
        for name in files:
            _sync(partial / name)
        (partial / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        _sync(partial / MANIFEST_FILE)
        partial.rename(final)
        _sync(root)
    dist.barrier()
    return final


def load_checkpoint(engine: "DeepSpeedEngine", checkpoint: Path) -> Progress:
    """Collective. Weights, optimizer and its step counter; the same number of ranks and ZeRO stage as were saved."""
    manifest = read_manifest(checkpoint)
    configured = [dict(group, params=None) for group in engine.optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise Refusal(f"{checkpoint}: DeepSpeed found nothing to load in it")
    # DeepSpeed restores each group's hyper-parameters too; the configured ones are in force (and were checked equal).
    for group, wanted in zip(engine.optimizer.param_groups, configured, strict=True):
        group.update({key: value for key, value in wanted.items() if key != "params"})
    return manifest.progress


def consolidated_weights(checkpoint: Path) -> tuple[CheckpointManifest, dict[str, torch.Tensor]]:
    """The whole model on the CPU, under its parameter names, in the dtype that the forward pass used.

    Under bf16 training the weights are the fp32 masters rounded once, exactly what the last step left in the model.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # merging is done in memory; unset, DeepSpeed prints its guess
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    manifest = read_manifest(checkpoint)
    dtype = getattr(torch, manifest.dtype)
    if manifest.zero_stage == 0:
        weights = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)[
            "module"
        ]
    else:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # DeepSpeed prints its way through the files
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return manifest, {name: tensor.to(dtype).contiguous().clone() for name, tensor in weights.items()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
