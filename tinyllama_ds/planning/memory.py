"""Memory of one GPU by row: allocations of DeepSpeed 0.19.8 and of our model. Formulas: docs/planning.md."""

from dataclasses import dataclass
from math import ceil, lcm

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.model.config import MAX_CHUNK_LOGITS, LlamaConfig
from tinyllama_ds.planning.layout import Layout, gathers_of, modules_of, persistent_elements

BACKENDS = (
    *("auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen"),
    *("sdpa", "sdpa_flash", "sdpa_cudnn", "blocked", "eager"),
)
_STAGE_1_BUCKET = 500_000_000  # elements: DeepSpeed's engine flattens gradients in these buckets outside ZeRO 2, 3
_CONTEXT = GIB  # CUDA context, cuBLAS workspaces and NCCL's buffers: an assumption
_ALLOCATOR = 0.04  # of all that PyTorch allocates, lost to rounding and fragmentation: an assumption


@dataclass(frozen=True)
class Work:
    """The computation of one GPU in one micro-batch."""

    micro_batch: int
    sequence_length: int
    attention: str = "flash"  # kind of its saved tensors, from `attention_memory`
    recompute_every: int = 0
    is_compiled: bool = False
    chunk_logits: int = MAX_CHUNK_LOGITS["cuda"]  # fp32 logits alive at once
    sequence_parallel: int = 1  # GPUs that share each sequence

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence_length // self.sequence_parallel

    def key_heads(self, model: LlamaConfig) -> int:
        """Those of all GPUs that share a sequence: as often as makes them divide."""
        return lcm(model.num_key_value_heads, self.sequence_parallel)


@dataclass(frozen=True)
class MemoryRow:
    """One use of memory, held in a `phase`: always, in the micro-batches, or in the optimizer step."""

    name: str
    bytes: int
    phase: str
    how: str


@dataclass(frozen=True)
class Memory:
    """All rows of one GPU."""

    rows: tuple[MemoryRow, ...]

    def _sum(self, phase: str) -> int:
        return sum(row.bytes for row in self.rows if row.phase == phase)

    @property
    def peak_phase(self) -> str:
        return max(("micro-batch", "optimizer step"), key=self._sum)

    @property
    def allocated(self) -> int:
        """The peak of all tensors."""
        return self._sum("always") + max(self._sum("micro-batch"), self._sum("optimizer step"))

    @property
    def total(self) -> int:
        """With the losses of the allocator and the context of the driver."""
        return int(self.allocated * (1 + _ALLOCATOR)) + _CONTEXT

    @property
    def overhead_rows(self) -> tuple[MemoryRow, ...]:
        lost = int(self.allocated * _ALLOCATOR)
        return (
            MemoryRow("allocator", lost, "always", f"{_ALLOCATOR:.0%} lost to rounding and fragmentation (assumed)"),
            MemoryRow("context", _CONTEXT, "always", "CUDA, cuBLAS and NCCL (assumed)"),
        )


def memory_of(model: LlamaConfig, layout: Layout, work: Work, world_size: int) -> Memory:
    """Every row of one rank among `world_size`."""
    rows = [*_states(model, layout, world_size), *_buffers(model, layout, world_size)]
    rows += [_activations(model, layout, work), _exchange(model, layout, work), _loss(model, layout, work)]
    return Memory(tuple(row for row in rows if row.bytes))


def _states(model: LlamaConfig, layout: Layout, world_size: int) -> list[MemoryRow]:
    P, share = model.num_parameters, ceil(model.num_parameters / world_size)
    w, stage = layout.weight_bytes, layout.stage
    weights, how = w * P, f"{w} B x {P:,} parameters"
    if stage == 3:
        secondary = P - persistent_elements(model, layout) if layout.hpz > 1 else 0
        weights = w * share + w * secondary // layout.hpz
        how = f"{w} B x parameters / {world_size}" + (f", and a copy over {layout.hpz} (hpZ)" if secondary else "")
    own_masters = layout.master_bytes if w == 2 or stage else 0
    precision = "fp32" if layout.master_bytes == 4 else "bf16"
    optimizer = (own_masters + layout.moment_bytes) * (share if stage else P)
    where = f" / {world_size}" if stage else ""
    rows = [
        MemoryRow("weights", weights, "always", how),
        MemoryRow(
            "optimizer",
            0 if layout.offload_optimizer else optimizer,
            "always",
            f"{own_masters + layout.moment_bytes} B x parameters{where}: {precision} masters and moments",
        ),
        _gradients(P, share, layout),
    ]
    if stage == 3 and world_size > 1:  # a single rank's own part is all of it
        persistent = w * persistent_elements(model, layout)
        rows.append(MemoryRow("gathered weights, persistent", persistent, "always", "parameters up to the threshold"))
    return rows


def _gradients(P: int, share: int, layout: Layout) -> MemoryRow:
    w, g = layout.weight_bytes, layout.gradient_bytes
    if layout.is_bf16_stage_1:
        return MemoryRow("gradients", (g + w) * P, "always", f"{g} B accumulated + {w} B of a micro-batch, whole")
    if layout.stage < 2:
        return MemoryRow("gradients", w * P, "always", f"{w} B x parameters, whole")
    return MemoryRow("gradients", g * share, "always", f"{g} B x parameters / ranks, accumulated")


def _buffers(model: LlamaConfig, layout: Layout, world_size: int) -> list[MemoryRow]:
    """Buffers of gradients and gathered weights, next to the states."""
    w, units = layout.weight_bytes, modules_of(model)
    unit = max(map(sum, units)) if layout.stage == 3 else max(map(max, units))  # a leaf's gradients come together
    rows = [
        MemoryRow("gradients in flight", 2 * w * unit, "micro-batch", "of one unit, and the copy being reduced"),
        _step_buffers(model, layout, world_size),
    ]
    if layout.stage >= 2:
        count = 2 if layout.stage == 2 and layout.overlap else 1
        size = count * w * layout.reduce_bucket
        rows.append(MemoryRow("reduce bucket", size, "always", f"{count} x reduce_bucket_size"))
    if layout.stage == 3 and world_size > 1:
        gathers = gathers_of(model, layout)
        arriving = min(layout.prefetch_bucket + unit, gathers.peak_live)
        rows += [
            MemoryRow("gathered weights", w * gathers.peak_live, "micro-batch", "peak of the replayed coordinator"),
            MemoryRow(
                "weights being gathered", w * arriving, "micro-batch", "prefetch bucket and one unit, before copying"
            ),
        ]
    return rows


def _step_buffers(model: LlamaConfig, layout: Layout, world_size: int) -> MemoryRow:
    """Gradients flattened for a collective or for the optimizer, when activations are gone."""
    P = model.num_parameters
    bucket = min(P, _STAGE_1_BUCKET + max(map(max, modules_of(model))))
    if layout.stage >= 2:
        size, how = layout.master_bytes * ceil(P / world_size), "gradients of the optimizer's share, flattened"
    elif layout.stage == 1:
        size = (layout.reduce_bytes + (4 if layout.is_bf16_stage_1 else 0)) * bucket
        how = "gradients flattened for the all-reduce"
    else:
        size = max(layout.weight_bytes * bucket, 4 * P if layout.weight_bytes == 2 else 0)
        how = "gradients flattened for the all-reduce, then made fp32"
    return MemoryRow("step buffers", size, "optimizer step", how)


def attention_memory(backend: str, document_mask: bool, weight_bytes: int) -> str:
    """Kind of the tensors that a backend saves, on a GPU since Ampere: flash, repeated, masked, blocked or eager.

    Raises `ConfigError` for a backend that is unknown.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"--attention {backend!r} is unknown; expected {', '.join(BACKENDS)}")
    if backend in ("blocked", "eager"):
        return backend
    if document_mask and (backend in ("sdpa", "sdpa_cudnn") or weight_bytes == 4):
        return "masked"
    return "flash" if weight_bytes == 2 else "repeated"


def block_bytes_per_token(model: LlamaConfig, layout: Layout, work: Work) -> int:
    """Bytes of the tensors that autograd saves in one decoder block, per token."""
    w, D, F = layout.weight_bytes, model.hidden_size, model.intermediate_size
    query, key = model.head_dim * model.num_attention_heads, model.head_dim * work.key_heads(model)
    H, T = model.num_attention_heads, work.sequence_length
    attention = w * (2 * query + 2 * key) + 4 * H  # q, k, v, output, fp32 log-sum-exp
    if work.attention == "blocked":
        attention += w * query - 4 * H + w * H * (T + 64) // 2  # the probabilities of visible blocks
    elif work.attention == "eager":
        attention = w * query + 12 * query + 4 * H * T  # fp32 q, k, v and scores
    elif work.attention in ("repeated", "masked"):
        attention += w * 2 * (query - key)  # keys and values of every query head
        attention += w * T * work.sequence_parallel if work.attention == "masked" else 0  # a whole mask on each GPU
    if work.sequence_parallel > 1:
        attention += w * query  # the output before it is exchanged, and after
    if work.is_compiled:
        return w * 4 * D + attention + w * 3 * F + 8  # inputs of the matrix products; the rest is recomputed
    norms = 2 * ((4 + w + (w if w == 2 else 0)) * D + 4)  # fp32 input, normed, times weight
    return norms + attention + w * 4 * F


def _activations(model: LlamaConfig, layout: Layout, work: Work) -> MemoryRow:
    block, L = block_bytes_per_token(model, layout, work), model.num_hidden_layers
    recomputed = ceil(L / work.recompute_every) if work.recompute_every else 0
    kept = (
        (L - recomputed) * block + recomputed * layout.weight_bytes * model.hidden_size + (block if recomputed else 0)
    )
    final = (4 + 3 * layout.weight_bytes) * model.hidden_size  # last norm, and the stream itself
    how = f"{block:,} B x {L - recomputed} blocks x {work.tokens:,} tokens"
    if recomputed:
        how += f", {recomputed} blocks recomputed"
    return MemoryRow("activations", work.tokens * (kept + final), "micro-batch", how)


def _exchange(model: LlamaConfig, layout: Layout, work: Work) -> MemoryRow:
    heads = model.num_attention_heads + 2 * work.key_heads(model)
    size = 2 * layout.weight_bytes * work.tokens * heads * model.head_dim if work.sequence_parallel > 1 else 0
    return MemoryRow("sequence exchange", size, "micro-batch", "queries, keys and values as sent and as received")


def _loss(model: LlamaConfig, layout: Layout, work: Work) -> MemoryRow:
    w, table = layout.weight_bytes, model.vocab_size * model.hidden_size
    chunk = min(work.chunk_logits, work.tokens * model.vocab_size)
    size = chunk * (4 + 2 * w) + table * (4 + w) + w * work.tokens * model.hidden_size
    return MemoryRow("logits and loss", size, "micro-batch", f"{chunk:,} logits at once, and the head's gradient")
