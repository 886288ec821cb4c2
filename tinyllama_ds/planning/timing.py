"""Seconds of an optimizer step: compute, exposed communication, optimizer."""

from dataclasses import dataclass

from tinyllama_ds.hardware.gpus import Gpu, Network
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.planning.activations import Work
from tinyllama_ds.planning.communication import Hosts, Traffic, collectives_of, exchanges_of, traffic_of
from tinyllama_ds.planning.layout import Layout

# Share of the compute of a forward or backward pass that can overlap with communication: the first gather and the last
# reduction of a pass overlap with nothing. An assumption.
OVERLAPPABLE = 0.8
# Share of the overlapped seconds that is lost all the same: NCCL's kernels take multiprocessors and memory bandwidth
# from the compute. An assumption too.
OVERLAP_COST = 0.1
_FORWARD = 1 / 3  # of a training step's operations; the backward pass is twice the forward
_OPTIMIZER_BYTES = 42  # read and written per parameter: norm 4, clip 8, AdamW on fp32 states 28, weights 2
_HOST_LINK = 25e9  # bytes/s over PCIe 4 x16, as copies from pinned memory reach it
_HOST_ADAM_BYTES = 100e9  # bytes/s of memory that a host's cores reach, per GPU's share of them


@dataclass(frozen=True)
class Machines:
    """The hosts, GPUs and network of a run."""

    hosts: Hosts
    gpu: Gpu
    network: Network
    compute_flops: float  # per second, of one GPU while it computes
    compute_from: str  # the source of that number


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step and where they go."""

    compute: float
    communication: float  # overlapped or not
    exposed: float  # communication that compute waits for
    optimizer: float
    traffic: tuple[Traffic, ...]
    tokens_per_gpu: int

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.optimizer

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_gpu / self.seconds

    @property
    def efficiency(self) -> float:
        """The share of the step in which the GPUs compute or step: 1 without a network."""
        return 1 - self.exposed / self.seconds


def step_time(model: LlamaConfig, layout: Layout, work: Work, accumulation: int, machines: Machines) -> StepTime:
    """One step of `accumulation` micro-batches. Recomputed blocks cost their forward pass once more."""
    hosts = machines.hosts
    recomputed = work.recomputed_blocks(model) / model.num_hidden_layers
    tokens = work.tokens * accumulation
    plain = executed_flops(model, work.sequence_length) * tokens / machines.compute_flops
    passes = {"forward": plain * _FORWARD, "backward": plain * (1 - _FORWARD + recomputed * _FORWARD)}
    collectives = collectives_of(model, layout, hosts.ranks, accumulation, hosts.gpus)
    collectives += exchanges_of(model, layout, work, accumulation)
    traffic = tuple(traffic_of(collective, hosts, machines.network, layout.hpz) for collective in collectives)
    return StepTime(
        compute=sum(passes.values()),
        communication=sum(part.seconds for part in traffic),
        exposed=exposed_seconds(traffic, passes) + _exposed_copies(model, layout, work, accumulation, passes),
        optimizer=_optimizer_seconds(model, layout, hosts.ranks, machines.gpu),
        traffic=traffic,
        tokens_per_gpu=tokens,
    )


def executed_flops(model: LlamaConfig, sequence_length: int) -> int:
    """Of one token: kernels skip the future half of causal attention, which MFU counts."""
    return model.flops_per_token(sequence_length // 2)


def exposed_seconds(traffic: tuple[Traffic, ...], passes: dict[str, float]) -> float:
    """What communication adds to a step: all that does not overlap with its pass, and what the overlap costs."""
    total = 0.0
    for overlap in ("", *passes):
        seconds = sum(part.seconds for part in traffic if part.collective.overlaps_with == overlap)
        hidden = min(seconds, OVERLAPPABLE * passes.get(overlap, 0.0))
        total += seconds - hidden + OVERLAP_COST * hidden
    return total


def _exposed_copies(
    model: LlamaConfig, layout: Layout, work: Work, accumulation: int, passes: dict[str, float]
) -> float:
    """What offloading block inputs adds where their copies take longer than the passes that they overlap with."""
    if not work.offloads_activations:
        return 0.0
    inputs = work.recomputed_blocks(model) * layout.weight_bytes * model.hidden_size * work.tokens
    copies = accumulation * inputs / _HOST_LINK
    return sum(max(0.0, copies - seconds) for seconds in passes.values())


def _optimizer_seconds(model: LlamaConfig, layout: Layout, ranks: int, gpu: Gpu) -> float:
    share = model.num_parameters / (ranks if layout.stage else 1)
    if layout.offload_optimizer:
        moved = (layout.gradient_bytes + layout.weight_bytes) * share
        return moved / _HOST_LINK + _OPTIMIZER_BYTES * share / _HOST_ADAM_BYTES
    return _OPTIMIZER_BYTES * share / gpu.memory_bandwidth
