"""A checkpoint into an engine of any ZeRO stage on any number of ranks: every rank reads the ranges that it keeps."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.checkpoint.fragments import (
    MASTER,
    Fragment,
    local_fragments,
    optimizer_state,
    parameter_shapes,
    refresh_weights,
)
from tinyllama_ds.checkpoint.reader import CheckpointReader
from tinyllama_ds.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def load_checkpoint(engine: "DeepSpeedEngine", checkpoint: Path) -> None:
    """Collective. Master weights, optimizer state and counters of a verified checkpoint into a fresh engine.

    Values are copied bit for bit; hyper-parameters stay as the engine's config has them. Raises `ConfigError` where the
    checkpoint is of a different model or optimizer.
    """
    reader = CheckpointReader(checkpoint)
    _check_shapes(engine, reader)
    for fragment in local_fragments(engine):
        _create_state(engine, reader, fragment)
        state = optimizer_state(engine, fragment)
        for kind in reader.kinds(fragment.name):
            slot = fragment.slot(kind)
            fragment.fill(state, kind, reader.read(kind, fragment.name, slot.start, slot.stop))
    for name, count in reader.manifest.optimizer.counters.items():
        setattr(engine, name, count)
    refresh_weights(engine)


def _create_state(engine: "DeepSpeedEngine", reader: CheckpointReader, fragment: Fragment) -> None:
    """What the optimizer itself would make for a partition in its first step, on the device where it would be."""
    optimizer, partition = engine.basic_optimizer, fragment.partition
    kinds = [kind for kind in reader.kinds(fragment.name) if kind != MASTER]
    state = optimizer.state[partition]
    for kind in kinds:
        if kind not in state:
            is_as_master = reader.dtype(kind, fragment.name) == reader.dtype(MASTER, fragment.name)
            dtype = partition.dtype if is_as_master else reader.dtype(kind, fragment.name)
            size = fragment.slot(kind).total
            shape = partition.shape if size == partition.numel() else (size,)
            state[kind] = torch.zeros(shape, dtype=dtype, device=partition.device)
    if "exp_avg" in kinds and "step" not in state:
        state["step"] = _step_for(optimizer, partition, reader.manifest.optimizer.step)


def _step_for(optimizer: torch.optim.Optimizer, partition: torch.Tensor, step: int) -> torch.Tensor | int:
    """PyTorch's optimizers count in a tensor: in host memory unless the kernel is fused. DeepSpeed's have an int."""
    adam = getattr(optimizer, "aux_optimizer", None) or optimizer  # inside Muon
    if not type(adam).__module__.startswith("torch.optim"):
        return step
    is_on_device = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    return torch.tensor(float(step), device=partition.device if is_on_device else "cpu")


def _check_shapes(engine: "DeepSpeedEngine", reader: CheckpointReader) -> None:
    stored = dict(reader.manifest.parameters)
    for name, shape in parameter_shapes(engine).items():
        if stored.pop(name, None) != shape:
            raise ConfigError(f"{reader.checkpoint}: does not hold parameter {name} of shape {shape}")
    if stored:
        raise ConfigError(f"{reader.checkpoint}: holds parameters that the model does not have: {', '.join(stored)}")
