"""DeepSpeed's own checkpoints, and ours up to format 2, which are the same with a manifest, into the present format.

This is the only module that unpickles. A pickle runs code when it is read, so files must belong to this user and must
not be writable by others. The fragments of every rank become a file; tensors are mapped, not read into memory.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from tinyllama_ds.checkpoint.format import (
    FORMAT,
    MANIFEST_FILE,
    CheckpointManifest,
    File,
    OptimizerRecord,
    Progress,
    checkpoint_name,
    model_of,
    tensor_name,
    verify_file,
)
from tinyllama_ds.checkpoint.fragments import MASTER
from tinyllama_ds.checkpoint.save import COUNTERS, optimizer_record, write_files
from tinyllama_ds.checkpoint.staging import StagedState
from tinyllama_ds.config.validation import validate_json
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import parse_row, write_object
from tinyllama_ds.hf.weights import parameter_shapes
from tinyllama_ds.layout import CHECKPOINTS
from tinyllama_ds.model.config import LlamaConfig, dtype_name

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_RENAMED = {"segments": "document_ids", "circumstances": "numerics_environment"}  # of the probe, since format 2
Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class _Saved:
    """What DeepSpeed saved, unpickled: the state of the module, and that of the optimizer of every rank."""

    stage: int
    module: dict
    ranks: list[dict]

    @property
    def base_state(self) -> dict:
        """The state dict of the PyTorch optimizer inside, of rank 0."""
        state = self.ranks[0]
        return state.get("base_optimizer_state") or state.get("optimizer_state_dict") or state


def import_checkpoint(folder: Path, run_dir: Path, model: LlamaConfig | None) -> Path:
    """Write a checkpoint of the present format into a run directory; returns its folder.

    `model` is of a checkpoint that is not ours and so does not have it in a manifest. Raises `ConfigError` where files
    are damaged, not this user's, or not of the model.
    """
    old = _read_old_manifest(folder)
    saved = _unpickle(folder)
    if old is None and model is None:
        raise ConfigError(f"{folder}: has no {MANIFEST_FILE} that tells the model's shapes; expected --model NAME")
    config = model if old is None else model_of(folder, old["model"])
    assert config is not None
    shapes = parameter_shapes(config)
    step = saved.module.get("global_steps", 0) if old is None else old["progress"]["step"]
    output = run_dir / CHECKPOINTS / checkpoint_name(step)
    output.mkdir(parents=True)
    files: dict[str, dict] = {}
    for rank, staged in enumerate(_fragments_by_rank(folder, saved, shapes)):
        files |= write_files(output, rank, staged)
    written = {"parameters": {name: list(shape) for name, shape in shapes.items()}, "files": files, "format": FORMAT}
    written["optimizer"] = asdict(_optimizer_of(saved))
    manifest = (old or _describe(saved, config, step)) | written
    validate_json(CheckpointManifest, json.dumps(manifest).encode(), folder / MANIFEST_FILE)
    write_object(output / MANIFEST_FILE, manifest)
    return output


def _read_old_manifest(folder: Path) -> dict | None:
    """Of a checkpoint of ours, after every file had its size and its hash, with today's names; None without one."""
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    _reject_foreign(path)
    manifest = parse_row(path.read_bytes(), progress=dict, model=dict, run=dict, files=dict)
    if manifest is None or manifest.get("format", 1) >= FORMAT:
        raise ConfigError(f"{path}: expected a manifest of a format below {FORMAT}")
    for name, file in manifest["files"].items():
        verify_file(folder, name, TypeAdapter(File).validate_python(file))
    health = manifest.get("health", {})
    if health.get("probe"):
        health["probe"] = {_RENAMED.get(key, key): value for key, value in health["probe"].items()}
    return manifest


def _unpickle(folder: Path) -> _Saved:
    optimizer_files = {int(match[1]): path for path in folder.iterdir() if (match := _RANK.search(path.name))}
    module_file = folder / "mp_rank_00_model_states.pt"
    stage = 0 if not optimizer_files else 1 if module_file.exists() else 3
    if stage == 3:
        module_file = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    for path in (folder, module_file, *optimizer_files.values()):
        _reject_foreign(path)
    module = _load(module_file)
    if stage == 0:
        return _Saved(0, module, [module["optimizer"]])
    if sorted(optimizer_files) != list(range(len(optimizer_files))):
        raise ConfigError(f"{folder}: has files of the ranks {sorted(optimizer_files)}; expected every rank's")
    ranks = [_load(optimizer_files[rank])["optimizer_state_dict"] for rank in range(len(optimizer_files))]
    return _Saved(stage, module, ranks)


def _reject_foreign(path: Path) -> None:
    """Raise `ConfigError` unless only this user can have written a file or changed a folder."""
    try:
        status = path.lstat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a checkpoint of DeepSpeed") from error
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(f"{path}: is a symbolic link; expected the file itself")
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path}: belongs to user {status.st_uid}, and unpickling it would run that user's code; take it over with"
            f" chown {os.geteuid()} if you trust it"
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise ConfigError(f"{path}: can be written by other users; expected at most mode 755 (chmod go-w)")


def _load(path: Path) -> Any:
    """DeepSpeed pickles its own objects together with the tensors."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _fragments_by_rank(folder: Path, saved: _Saved, shapes: Shapes) -> Iterator[StagedState]:
    if saved.stage == 0:
        yield _of_stage_0(folder, saved, shapes)
        return
    groups = [{name.removeprefix("module."): shape for name, shape in group.items()}
              for group in saved.module["param_shapes"]]  # fmt: skip
    stored = {name: shape for group in groups for name, shape in group.items()}
    if stored != shapes:
        different = sorted(name for name in stored.keys() | shapes if stored.get(name) != shapes.get(name))
        raise ConfigError(f"{folder}: has other parameters or shapes than the model: {', '.join(different[:5])}")
    if saved.module.get("ds_config", {}).get("zero_optimization", {}).get("round_robin_gradients"):
        raise ConfigError(f"{folder}: was saved with round_robin_gradients, whose order DeepSpeed does not save")
    for rank in range(len(saved.ranks)):
        yield _of_stage_3(saved, rank, stored) if saved.stage == 3 else _of_stages_1_and_2(saved, rank, groups)


def _of_stage_3(saved: _Saved, rank: int, shapes: Shapes) -> StagedState:
    """A rank has an equal part of every parameter, the last ones padded, in one sub-group after another."""
    staged: StagedState = {}
    state = saved.ranks[rank]
    partitions = iter(enumerate(state["fp32_flat_groups"]))
    moments = state["optimizer_state_dict"]["state"]
    kinds: dict[str, Tensor] = {MASTER: torch.empty(0)}
    offset = 0
    for name, shape in shapes.items():
        if offset == kinds[MASTER].numel():
            number, master = next(partitions)
            kinds, offset = _kinds(master, moments.get(number, {})), 0
        size, count = ceil(shape.numel() / len(saved.ranks)), shape.numel()
        start, stop = min(rank * size, count), min((rank + 1) * size, count)
        for kind, flat in kinds.items():
            _add(staged, kind, name, start, flat[offset : offset + stop - start])
        offset += size
    return staged


def _of_stages_1_and_2(saved: _Saved, rank: int, groups: list[Shapes]) -> StagedState:
    """The parameters of a group are contiguous, and each rank has an equal part of them.

    Muon may have the momentum of every parameter whole that the rank has a part of.
    """
    staged: StagedState = {}
    state = saved.ranks[rank]
    for number, shapes in enumerate(groups):
        partitions = [other["single_partition_of_fp32_groups"][number] for other in saved.ranks]
        paddings = state.get("param_alignment_paddings", {number: [0] * len(shapes)})[number]
        first, size = rank * partitions[0].numel(), partitions[0].numel()
        kinds = _kinds(partitions[rank], state["base_optimizer_state"]["state"].get(number, {}))
        place = before = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            start, stop = max(0, first - place), min(shape.numel(), first + size - place)
            for kind, flat in kinds.items():
                is_whole = (
                    kind == "momentum_buffer"
                    and flat.numel() != partitions[rank].numel() + state["group_paddings"][number]
                )
                offset = before + start if is_whole else place + start - first
                _add(staged, kind, name, start, flat[offset : offset + stop - start] if start < stop else flat[:0])
            before += shape.numel() if start < stop else 0
            place += shape.numel() + padding
    return staged


def _of_stage_0(folder: Path, saved: _Saved, shapes: Shapes) -> StagedState:
    """Whole parameters of one group in the order of the model: under bf16 with masters, end to end or one each."""
    state = saved.ranks[0]
    groups = saved.base_state["param_groups"]
    if len(groups) != 1:
        raise ConfigError(f"{folder}: has {len(groups)} groups of parameters at stage 0; expected one, as Adam's")
    module = {name.removeprefix("module."): tensor for name, tensor in saved.module["module"].items()}
    masters = state.get("fp32_groups_flat") or sum(state.get("fp32_groups", []), []) or [module[n] for n in shapes]
    moments = saved.base_state["state"]
    kinds: dict[str, list[Tensor]] = {}
    for number, master in enumerate(masters):
        for kind, tensor in _kinds(master.detach(), moments.get(number, {})).items():
            kinds.setdefault(kind, []).append(tensor.flatten())
    staged: StagedState = {}
    for kind, tensors in kinds.items():
        pieces = (
            tensors if len(tensors) == len(shapes) else tensors[0].split([shape.numel() for shape in shapes.values()])
        )
        for name, piece in zip(shapes, pieces, strict=True):
            _add(staged, kind, name, 0, piece)
    return staged


def _kinds(master: Tensor, moments: dict) -> dict[str, Tensor]:
    tensors = {key: value for key, value in moments.items() if torch.is_tensor(value) and key != "step"}
    return {MASTER: master.detach()} | tensors


def _add(staged: StagedState, kind: str, name: str, start: int, values: Tensor) -> None:
    if values.numel():
        staged.setdefault(kind, {})[tensor_name(kind, name, start, start + values.numel())] = values


def _optimizer_of(saved: _Saved) -> OptimizerRecord:
    base, counters = saved.base_state, {name: saved.module.get(name, 0) for name in COUNTERS}
    return optimizer_record("imported", base["state"].values(), base["param_groups"], counters)


def _describe(saved: _Saved, config: LlamaConfig, step: int) -> dict:
    """The manifest of a checkpoint that is not of a run of ours: its data is unknown, so no run resumes from it."""
    tensors = [tensor for tensor in saved.module["module"].values() if torch.is_tensor(tensor)]
    dtype = dtype_name(tensors[0].dtype) if tensors else "float32"
    return {
        "progress": asdict(Progress(step, 0, 0)), "world_size": len(saved.ranks), "zero_stage": saved.stage,
        "dtype": dtype, "model": config.to_dict(), "run": {},
    }  # fmt: skip
