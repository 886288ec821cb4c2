"""The planned memory of a run that has started, and settings that need less."""

from tinyllama_ds.config.run_plan import micro_batches_of
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.planning.activations import Work, attention_memory
from tinyllama_ds.planning.layout import read_layout
from tinyllama_ds.planning.memory import memory_of
from tinyllama_ds.planning.search import RECOMPUTE
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.train.dry_run import MemoryEstimate

_MAX_ALTERNATIVES = 3
_RECOMPUTE_AND_OFFLOAD = (*((every, False) for every in RECOMPUTE), (1, True))


def estimate_memory(run: Run, ranks: int, is_compiled: bool, gpu_bytes: int) -> MemoryEstimate:
    """Of one GPU with `gpu_bytes` among `ranks`; the alternatives keep the ZeRO config, largest micro-batch first."""
    layout = read_layout(run.description["deepspeed_config"], "the DeepSpeed config", ranks)
    attention = attention_memory(run.attention.backend, run.recipe.document_mask, layout.weight_bytes)
    options, N = run.options, run.options.sequence_parallel

    def estimate(micro_batch: int, recompute_every: int, offloads: bool) -> int:
        work = Work(
            micro_batch, run.recipe.sequence_length, attention, recompute_every, is_compiled, sequence_parallel=N,
            offloads_activations=offloads, document_mask=run.recipe.document_mask,
        )  # fmt: skip
        return memory_of(run.model, layout, work, ranks).total

    now = estimate(run.micro_batch, options.activation_checkpointing, options.activation_offloading)
    not_larger = [size for size in reversed(micro_batches_of(run.plan, ranks // N)) if size <= run.micro_batch]
    found = [
        f"micro-batch {size}{f', --activation-checkpointing {every}' if every else ''}"
        f"{' --activation-offloading' if offloads else ''} ({total / GIB:.1f} GiB)"
        for size in not_larger
        for every, offloads in _RECOMPUTE_AND_OFFLOAD
        if (total := estimate(size, every, offloads)) <= gpu_bytes and total < 0.95 * now
    ]
    ways = " or ".join(found[:_MAX_ALTERNATIVES])
    return MemoryEstimate(now, ways or "a different ZeRO config, because nothing smaller fits under this one")
