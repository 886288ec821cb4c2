"""Every layout, micro-batch and checkpointing on the given hosts, ranked by tokens per second."""

import json
from dataclasses import dataclass
from itertools import product

from tinyllama_ds.config.run_plan import accumulation_steps, micro_batches_of
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.gpus import GIB
from tinyllama_ds.planning.layout import Layout, read_layout
from tinyllama_ds.planning.memory import Memory, Work, memory_of
from tinyllama_ds.planning.plan import Inputs, PlanRequest, resolve, work_of
from tinyllama_ds.planning.timing import StepTime, step_time

_OVERLAP = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 100_000_000}
_ZERO3 = {"stage": 3} | _OVERLAP | {"stage3_prefetch_bucket_size": 100_000_000}
_LIVE = {"stage3_max_live_parameters": 2_500_000_000, "stage3_max_reuse_distance": 2_500_000_000}
_LEAN = {"stage3_max_live_parameters": 200_000_000, "stage3_max_reuse_distance": 200_000_000}
_THRESHOLD = "stage3_param_persistence_threshold"

# The zero_optimization sections of ds_configs/, by file (a test compares them).
LAYOUTS: dict[str, dict] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1} | _OVERLAP | {"allgather_bucket_size": 100_000_000},
    "zero2": {"stage": 2} | _OVERLAP | {"allgather_bucket_size": 100_000_000},
    "zero3": _ZERO3 | {_THRESHOLD: 100_000} | _LEAN,
    "zero3_keep": _ZERO3 | {_THRESHOLD: 100_000_000} | _LIVE,
    "zero3_hpz": _ZERO3 | {_THRESHOLD: 100_000} | _LIVE,  # and the GPUs of a host
}
RECOMPUTE = (0, 2, 1)  # every so many blocks; 0 is none
_SAME_SPEED = 0.005  # of each other: then the one with more free memory comes first


@dataclass(frozen=True)
class Candidate:
    """One layout that fits."""

    name: str
    config: dict  # the JSON, ready to be written
    layout: Layout
    work: Work
    memory: Memory
    step: StepTime

    @property
    def rate(self) -> float:
        return self.step.tokens_per_second_per_gpu


@dataclass(frozen=True)
class Ranking:
    """All candidates, the best first, and how many did not fit."""

    candidates: tuple[Candidate, ...]
    tried: int


def search(request: PlanRequest, inputs: Inputs) -> Ranking:
    """Try everything that divides. Raises `ConfigError` where no micro-batch divides, or nothing fits."""
    ranks, gpu = request.machines.hosts.ranks, request.machines.gpu
    micro_batches = _micro_batches(inputs, ranks)
    combinations = list(product(_configs(request, inputs).items(), micro_batches, RECOMPUTE))
    found = [
        _candidate(request, inputs, name, raw, micro_batch, recompute)
        for (name, raw), micro_batch, recompute in combinations
    ]
    fitting = [candidate for candidate in found if candidate.memory.total <= gpu.memory_bytes]
    if not fitting:
        least = min(found, key=lambda candidate: candidate.memory.total)
        raise ConfigError(
            f"nothing fits the {gpu.memory_bytes / GIB:.1f} GiB of a {gpu.name}: the smallest of {len(found)} layouts"
            f" is {least.name} at {least.memory.total / GIB:.1f} GiB; use more or larger GPUs,"
            " or a DeepSpeed config with offload_optimizer or bf16_optimizer_states, which need less"
        )
    best = max(candidate.rate for candidate in fitting)
    fitting.sort(key=lambda candidate: (-round(candidate.rate / best / _SAME_SPEED), candidate.memory.total))
    return Ranking(tuple(fitting), len(combinations))


def reason(candidate: Candidate, memory_bytes: int) -> str:
    """A candidate in one line."""
    every = candidate.work.recompute_every
    checkpointing = {0: "no checkpointing", 1: "all blocks recomputed"}.get(every, f"every {every}nd block recomputed")
    step = candidate.step
    return (
        f"{candidate.name}, micro-batch {candidate.work.micro_batch}, {checkpointing}:"
        f" {candidate.rate / 1e3:.1f}k tokens/s per GPU,"
        f" {candidate.memory.total / GIB:.1f} of {memory_bytes / GIB:.0f} GiB,"
        f" {step.exposed / step.seconds:.0%} of the step is exposed communication"
    )


def _micro_batches(inputs: Inputs, ranks: int) -> list[int]:
    if any(stage.batch % ranks for stage in inputs.plan.stages):
        works = [n for n in range(1, ranks) if all(stage.batch % n == 0 for stage in inputs.plan.stages)]
        raise ConfigError(
            f"the global batches of recipe {inputs.recipe.name!r} do not divide over {ranks} GPUs; the next smaller"
            f" numbers that do: {', '.join(map(str, works[-4:]))}"
        )
    return micro_batches_of(inputs.plan, ranks)


def _configs(request: PlanRequest, inputs: Inputs) -> dict[str, dict]:
    """The user's JSON with the zero_optimization section of each layout."""
    configs = {}
    hosts = request.machines.hosts
    for name, zero in LAYOUTS.items():
        raw = json.loads(json.dumps(inputs.raw)) | {"zero_optimization": dict(zero)}
        if name == "zero0":
            raw.pop("data_types", None)  # DeepSpeed cannot accumulate in fp32 there
        if name == "zero3_hpz":
            if hosts.gpus == 1 or hosts.nodes == 1:
                continue
            raw["zero_optimization"]["zero_hpz_partition_size"] = hosts.gpus
        configs[name] = raw
    return configs


def _candidate(
    request: PlanRequest, inputs: Inputs, name: str, raw: dict, micro_batch: int, recompute_every: int
) -> Candidate:
    ranks = request.machines.hosts.ranks
    config = raw | {"train_micro_batch_size_per_gpu": micro_batch}
    layout = read_layout(resolve(inputs, request.deepspeed_config, config, micro_batch, ranks), name, ranks)
    work = work_of(request, inputs, layout, micro_batch, recompute_every)
    longest = max(inputs.plan.stages, key=lambda stage: stage.samples)
    accumulation = accumulation_steps(longest.batch, ranks, micro_batch)
    step = step_time(inputs.model, layout, work, accumulation, request.machines)
    return Candidate(name, config, layout, work, memory_of(inputs.model, layout, work, ranks), step)
