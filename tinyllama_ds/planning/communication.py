"""Bytes and seconds of the collectives of one optimizer step. Formulas: docs/planning.md."""

from dataclasses import dataclass
from math import ceil

from tinyllama_ds.hardware.gpus import Network
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.planning.activations import Work
from tinyllama_ds.planning.layout import Layout, gathers_of, modules_of, persistent_elements

_WHOLE_BUCKET = 500_000_000  # elements that DeepSpeed's engine reduces at once outside ZeRO 2 and 3
# Two gloo ranks share one connection in both directions: the early one sends half of its part before the other's
# permission to send gets through, so a gather takes as long as one and a half parts.
_GLOO_PAIR_GATHER = 1.5


@dataclass(frozen=True)
class Hosts:
    """Equal hosts of some GPUs each."""

    nodes: int
    gpus: int  # per host

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step. `bytes` is the full tensor, as one rank holds it before or after."""

    name: str
    kind: str  # all-reduce, all-gather, reduce-scatter or all-to-all
    bytes: int  # per step, all calls together
    calls: int  # per step
    is_in_node: bool = False  # among the GPUs of one host (hpZ, sequence parallelism)
    overlaps_with: str = ""  # forward or backward of the same micro-batch; "": fully exposed
    group: int = 0  # GPUs that share a sequence; 0: all, or of hpZ

    def ring_passes(self, algorithm: str = "ring") -> int:
        """How often the tensor passes through the ring: an all-reduce is a reduce-scatter and an all-gather."""
        halves = 2 if self.kind == "all-reduce" else 1
        if algorithm == "gloo" and self.kind == "reduce-scatter":
            halves = 2  # PyTorch's gloo all-reduces and drops the rest
        return halves

    def sent_per_rank(self, ranks: int, algorithm: str = "ring") -> float:
        """Bytes that each of `ranks` sends: (ranks - 1) / ranks of the tensor per ring pass."""
        return self.ring_passes(algorithm) * self.bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Traffic:
    """One collective on given hosts: bytes and seconds per step."""

    collective: Collective
    per_gpu: float  # bytes that each GPU sends, mostly within its host
    per_node: float  # bytes that leave each host
    seconds: float


def collectives_of(
    model: LlamaConfig, layout: Layout, ranks: int, accumulation: int, hosts_gpus: int = 1
) -> list[Collective]:
    """Every collective of one optimizer step that moves weights or gradients."""
    if ranks == 1:
        return []
    P = model.num_parameters
    weights, gradients = layout.weight_bytes * P, layout.reduce_bytes * P
    if layout.stage == 3:
        return _zero3(model, layout, ranks, accumulation, hosts_gpus)
    if layout.stage == 2:
        overlap = "backward" if layout.overlap else ""
        calls = accumulation * max(1, ceil(P / layout.reduce_bucket))
        reduced = Collective("gradients", "all-reduce", accumulation * gradients, calls, overlaps_with=overlap)
    else:
        is_whole = layout.stage == 0 or layout.is_bf16_stage_1
        bucket = _WHOLE_BUCKET if is_whole else layout.reduce_bucket
        reduced = Collective("gradients", "all-reduce", gradients, max(1, ceil(P / bucket)))
    updated = [Collective("updated weights", "all-gather", weights, 1)] if layout.stage else []
    return [reduced, *updated]


def _zero3(model: LlamaConfig, layout: Layout, ranks: int, accumulation: int, hosts_gpus: int) -> list[Collective]:
    w, gathers, units = layout.weight_bytes, gathers_of(model, layout), len(modules_of(model))
    forward, backward = ("forward", "backward") if layout.overlap else ("", "")
    is_in_node = 1 < layout.hpz <= hosts_gpus
    first = 1 if layout.hpz > 1 else accumulation  # of the step's micro-batches; later ones read hpZ's second copy
    found = [
        Collective("weights, forward", "all-gather", first * w * gathers.forward, first * units, False, forward),
        Collective(
            "weights, forward, second copy", "all-gather", (accumulation - first) * w * gathers.forward,
            (accumulation - first) * units, is_in_node, forward,
        ),
        Collective(
            "weights, backward", "all-gather", accumulation * w * gathers.backward, accumulation * units,
            is_in_node, backward,
        ),
        Collective(
            "gradients", "reduce-scatter", accumulation * layout.reduce_bytes * model.num_parameters,
            accumulation * max(1, ceil(model.num_parameters / layout.reduce_bucket)), False, backward,
        ),
        Collective("persistent weights", "all-gather", w * persistent_elements(model, layout), 1),
    ]  # fmt: skip
    return [collective for collective in found if collective.bytes]


def exchanges_of(model: LlamaConfig, layout: Layout, work: Work, accumulation: int) -> list[Collective]:
    """The all-to-alls of sequence parallelism in one optimizer step: in each block queries, keys and values, and the
    output, in the forward pass, in the backward pass, and where a block is recomputed.
    """
    N, blocks = work.sequence_parallel, model.num_hidden_layers
    if N == 1:
        return []
    passes = accumulation * (2 * blocks + work.recomputed_blocks(model))
    heads = 2 * model.num_attention_heads + 2 * work.key_heads(model)
    size = passes * work.tokens * layout.weight_bytes * model.head_dim * heads
    return [Collective("sequence exchange", "all-to-all", size, 2 * passes, is_in_node=True, group=N)]


def traffic_of(
    collective: Collective, hosts: Hosts, network: Network, hpz: int = 1, algorithm: str = "ring"
) -> Traffic:
    """Bytes and seconds of a collective as NCCL's rings carry it, or gloo's on CPUs.

    A ring over all GPUs enters and leaves each host once, so what leaves a host is what one GPU sends. The slower of
    the two links decides. Latency: one message per hop and call; all-reduces of more than a few hosts go by trees.
    """
    ranks = collective.group or (hpz if collective.is_in_node else hosts.ranks)
    sent = collective.sent_per_rank(ranks, algorithm)
    crosses = hosts.nodes > 1 and not collective.is_in_node
    slower = _GLOO_PAIR_GATHER if (algorithm, collective.kind, ranks) == ("gloo", "all-gather", 2) else 1.0
    inside = sent / network.link_bandwidth if hosts.gpus > 1 else 0.0
    between = sent / network.node_bandwidth if crosses else 0.0
    hops = collective.ring_passes(algorithm) * (ranks - 1)
    node_hops = collective.ring_passes(algorithm) * (hosts.nodes - 1) if crosses else 0
    latency = node_hops * network.node_latency + (hops - node_hops) * network.link_latency
    if collective.kind == "all-reduce":
        latency = min(
            latency, 2 * hosts.nodes.bit_length() * network.node_latency + 2 * hosts.gpus * network.link_latency
        )
    return Traffic(
        collective, sent, sent if crosses else 0.0, slower * max(inside, between) + collective.calls * latency
    )
