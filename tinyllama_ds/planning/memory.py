"""Memory of one GPU by row: allocations of DeepSpeed 0.19.8 and of our model. Formulas: docs/planning.md."""

from dataclasses import dataclass
from math import ceil

from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.planning.activations import HOST, MemoryRow, Work, activation_rows
from tinyllama_ds.planning.layout import Layout, gathers_of, modules_of, persistent_elements

_STAGE_1_BUCKET = 500_000_000  # elements: DeepSpeed's engine flattens gradients in these buckets outside ZeRO 2, 3
_CONTEXT = GIB  # CUDA context, cuBLAS workspaces and NCCL's buffers: an assumption
_ALLOCATOR = 0.04  # of all that PyTorch allocates, lost to rounding and fragmentation: an assumption


@dataclass(frozen=True)
class Memory:
    """All rows of one GPU."""

    rows: tuple[MemoryRow, ...]

    def _sum(self, phase: str) -> int:
        return sum(row.bytes for row in self.rows if row.phase == phase)

    @property
    def peaks(self) -> dict[str, int]:
        """The most of what is not held always, by phase."""
        micro_batch = self._sum("micro-batch")
        in_micro_batch = {phase: micro_batch + self._sum(phase) for phase in ("loss", "backward")}
        return in_micro_batch | {"optimizer step": self._sum("optimizer step")}

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    @property
    def allocated(self) -> int:
        """The peak of all tensors on the GPU."""
        return self._sum("always") + max(self.peaks.values())

    @property
    def on_host(self) -> int:
        """What is in host memory, of one rank."""
        return self._sum(HOST)

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
    return Memory(tuple(row for row in [*rows, *activation_rows(model, layout, work)] if row.bytes))


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
    each, what = own_masters + layout.moment_bytes, "masters and moments"
    if layout.offload_optimizer:
        each, what = each + layout.master_bytes, "masters, moments and gradients"
    where = f" / {world_size}" if stage else ""
    rows = [
        MemoryRow("weights", weights, "always", how),
        MemoryRow(
            "optimizer",
            each * (share if stage else P),
            HOST if layout.offload_optimizer else "always",
            f"{each} B x parameters{where}: {precision} {what}",
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
