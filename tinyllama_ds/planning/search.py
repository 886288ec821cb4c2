"""Every layout, micro-batch, checkpointing and sequence parallelism on the given hosts, by tokens per second."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from tinyllama_ds.config.run_plan import micro_batches_of, sequence_parallel_sizes
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.planning.communication import Hosts
from tinyllama_ds.planning.plan import Inputs, Plan, PlanRequest, data_ranks, make_plan
from tinyllama_ds.shipped import shipped_config

LAYOUTS = ("zero0", "zero1", "zero2", "zero3", "zero3_keep", "zero3_hpz")  # of ds_configs/
RECOMPUTE = (0, 2, 1)  # every so many blocks; 0 is none
_SAME_SPEED = 0.005  # of each other: then the one with more free memory comes first


@dataclass(frozen=True)
class Ranking:
    """Every plan that fits, the best first, and how many were tried."""

    candidates: tuple[Plan, ...]
    tried: int


def search(request: PlanRequest, inputs: Inputs, sizes: Mapping[str, int]) -> Ranking:
    """Try everything that divides. Raises `ConfigError` where no micro-batch divides, or nothing fits."""
    hosts, gpu = request.machines.hosts, request.machines.gpu
    found = [
        _with_offloading(
            make_plan(
                replace(
                    request, deepspeed_config=Path(f"{name}.json"), activation_checkpointing=recompute_every,
                    sequence_parallel=shared,
                ),
                replace(inputs, raw=raw | {"train_micro_batch_size_per_gpu": micro_batch}),
                sizes,
            )
        )
        for (name, raw), (shared, micro_batch), recompute_every in product(
            _configs(inputs.raw, hosts).items(), _shares(request, inputs), RECOMPUTE
        )
    ]  # fmt: skip
    fitting = [plan for plan in found if plan.fits]
    if not fitting:
        least = min(found, key=lambda plan: plan.memory.total)
        raise ConfigError(
            f"nothing fits the {gpu.memory_bytes / GIB:.1f} GiB of a {gpu.name}: the smallest of {len(found)} layouts"
            f" is {least.layout.name} at {least.memory.total / GIB:.1f} GiB; use more or larger GPUs,"
            " or a DeepSpeed config with offload_optimizer or bf16_optimizer_states, which need less"
        )
    best = max(_rate(plan) for plan in fitting)
    fitting.sort(key=lambda plan: (-round(_rate(plan) / best / _SAME_SPEED), plan.memory.total))
    return Ranking(tuple(fitting), len(found))


def _with_offloading(plan: Plan) -> Plan:
    """With activation offloading where a plan that recomputes blocks does not fit without."""
    if plan.fits or not plan.work.recompute_every:
        return plan
    return make_plan(replace(plan.request, activation_offloading=True), plan.inputs, plan.sizes)


def _rate(plan: Plan) -> float:
    return plan.longest_step.tokens_per_second_per_gpu


def reason(plan: Plan) -> str:
    """A candidate in one line."""
    every, step = plan.work.recompute_every, plan.longest_step
    checkpointing = {0: "no checkpointing", 1: "all blocks recomputed"}.get(every, f"every {every}nd block recomputed")
    shared = f", sequence parallelism over {plan.work.sequence_parallel}" if plan.work.sequence_parallel > 1 else ""
    offloaded = ", their inputs offloaded" if plan.work.offloads_activations else ""
    return (
        f"{plan.layout.name}, micro-batch {plan.work.micro_batch}{shared}, {checkpointing}{offloaded}:"
        f" {_rate(plan) / 1e3:.1f}k tokens/s per GPU,"
        f" {plan.memory.total / GIB:.1f} of {plan.request.machines.gpu.memory_bytes / GIB:.0f} GiB,"
        f" {step.exposed / step.seconds:.0%} of the step is exposed communication"
    )


def _shares(request: PlanRequest, inputs: Inputs) -> list[tuple[int, int]]:
    """Sequence parallelism and micro-batch: sharing a larger micro-batch would leave as many tokens on a GPU."""
    if request.sequence_parallel > 1:
        return [(request.sequence_parallel, size) for size in _micro_batches(inputs, data_ranks(request, inputs))]
    hosts = request.machines.hosts
    shared = [
        (number, 1)
        for number in sequence_parallel_sizes(inputs.recipe, hosts.gpus)
        if number > 1 and not _indivisible(inputs, hosts.ranks // number)
    ]
    if shared and _indivisible(inputs, hosts.ranks):
        return shared
    return [*((1, size) for size in _micro_batches(inputs, hosts.ranks)), *shared]


def _indivisible(inputs: Inputs, data_size: int) -> bool:
    return any(stage.batch % data_size for stage in inputs.plan.stages)


def _micro_batches(inputs: Inputs, data_size: int) -> list[int]:
    if _indivisible(inputs, data_size):
        works = [n for n in range(1, data_size) if all(stage.batch % n == 0 for stage in inputs.plan.stages)]
        raise ConfigError(
            f"the global batches of recipe {inputs.recipe.name!r} do not divide over {data_size} data-parallel ranks;"
            f" smaller numbers that do: {', '.join(map(str, works[-4:]))}"
        )
    return micro_batches_of(inputs.plan, data_size)


def _configs(raw: dict, hosts: Hosts) -> dict[str, dict]:
    """The user's JSON with the zero_optimization section of each layout."""
    configs = {}
    for name in LAYOUTS:
        zero = json.loads(shipped_config(name).read_bytes())["zero_optimization"]
        if "zero_hpz_partition_size" in zero:
            if hosts.gpus == 1 or hosts.nodes == 1:
                continue
            zero["zero_hpz_partition_size"] = hosts.gpus
        configs[name] = raw | {"zero_optimization": zero}
        if zero["stage"] == 0:
            configs[name].pop("data_types", None)  # DeepSpeed cannot accumulate in fp32 there
    return configs
