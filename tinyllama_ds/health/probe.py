"""The probe of a run: its loss is stored with every checkpoint and recomputed after every load."""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tinyllama_ds.distributed.collectives import gather_from_ranks
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import ConfigError, NumericsError
from tinyllama_ds.model.config import dtype_name
from tinyllama_ds.model.determinism import gives_same_bits
from tinyllama_ds.model.probe import TOLERANCE, Probe, loss_difference, probe_loss
from tinyllama_ds.run.resolve import Run

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def take_probe(engine: "DeepSpeedEngine", run: Run, world: DistributedInfo) -> Probe:
    """The loss of the run's first sample now. Collective: one forward pass of a micro batch, the same on every rank.

    Raises `NumericsError` on all ranks where it is not finite on any: such weights are not to be saved.
    """
    first = np.zeros(1, dtype=np.int64)
    tokens = run.data.reader.read(first)[0].tolist()
    document_ids = run.data.reader.read_document_ids(first)[0].tolist() if run.recipe.document_mask else None
    own = world.own_tokens(len(tokens) - 1)
    loss = probe_loss(engine, tokens, document_ids, run.micro_batch, world.device, own)
    losses = _of_whole_sequences(gather_from_ranks(loss), world)
    for rank, loss in enumerate(losses):
        if not np.isfinite(loss):
            raise NumericsError(f"the probe's loss is {loss} on rank {rank}: the weights are not fit to be saved")
    dtype = dtype_name(next(engine.module.parameters()).dtype)
    return Probe(tokens, document_ids, losses[0], dtype, numerics_environment(engine, run, world))


def _of_whole_sequences(losses: Sequence[float], world: DistributedInfo) -> list[float]:
    """By rank, the mean of its group's losses, each on its part of the same sequence."""
    N = world.sequence_parallel
    means = [sum(losses[first : first + N]) / N for first in range(0, world.size, N)]
    return [mean for mean in means for _ in range(N)]


def numerics_environment(engine: "DeepSpeedEngine", run: Run, world: DistributedInfo) -> dict:
    """What the last bits of a loss depend on, besides weights and sample."""
    return {
        "world_size": world.size,
        "sequence_parallel": world.sequence_parallel,
        "zero_optimization": run.description["deepspeed_config"]["zero_optimization"],
        "micro_batch": run.micro_batch,
        "attention": run.attention.backend,
        "deterministic": run.description["deterministic"],
        "compiled": engine.module.is_compiled,
        "versions": {name: run.description["versions"].get(name) for name in ("torch", "deepspeed", "device")},
        "cpu": [_cpu_model(), torch.get_num_threads()],
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def check_probe(engine: "DeepSpeedEngine", run: Run, world: DistributedInfo, probe: Probe, checkpoint: str) -> None:
    """After a load: the loss is what it was at the save, to the last bit where that can be expected. Collective.

    Raises `ConfigError` on all ranks where it is not: the weights in the engine are not those that were saved.
    """
    dtype = dtype_name(next(engine.module.parameters()).dtype)
    is_same_way = (dtype, numerics_environment(engine, run, world)) == (probe.dtype, probe.numerics_environment)
    is_same_way &= gives_same_bits(world.device, run.description["deterministic"])
    own = world.own_tokens(len(probe.tokens) - 1)
    loss = probe_loss(engine, probe.tokens, probe.document_ids, run.micro_batch, world.device, own)
    losses, same = zip(*gather_from_ranks([loss, is_same_way]), strict=True)
    allowed = 0.0 if all(same) else max(TOLERANCE[dtype], TOLERANCE[probe.dtype])
    for rank, loss in enumerate(_of_whole_sequences(losses, world)):
        relative = loss_difference(probe, loss)
        if relative > allowed:
            raise ConfigError(
                f"{checkpoint}: the probe's loss is {loss!r} on rank {rank} after loading and was {probe.loss!r} at the"
                f" save, a relative difference of {relative:.1e} where {allowed:g} is allowed; what was loaded is not"
                " what was saved"
            )
