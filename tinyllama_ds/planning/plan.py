"""What a run is asked (`PlanRequest`), and everything known about it before it starts (`Plan`)."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from tinyllama_ds.config.deepspeed import (
    AutoValues,
    load_deepspeed_config,
    requested_micro_batch,
    resolve_deepspeed_config,
)
from tinyllama_ds.config.recipe import Recipe, load_recipe
from tinyllama_ds.config.run_plan import RunPlan, accumulation_steps, micro_batch_of
from tinyllama_ds.config.schedule import Schedule, make_schedule
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.gpus import GIB
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.planning.communication import Hosts
from tinyllama_ds.planning.cost import (
    BAD_FLEET,
    GOOD_FLEET,
    Duration,
    Failures,
    Storage,
    failures_of,
    storage_of,
)
from tinyllama_ds.planning.layout import Layout, gathers_of, persistent_elements, read_layout
from tinyllama_ds.planning.memory import Memory, Work, attention_memory, memory_of
from tinyllama_ds.planning.timeline import (
    Timeline,
    data_warnings,
    schedule_warnings,
    timeline_of,
)
from tinyllama_ds.planning.timing import Machines, StepTime, step_time

TINY_MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class PlanRequest:
    """The command line of `plan`."""

    recipe: str
    deepspeed_config: Path
    machines: Machines
    attention: str = "auto"  # backend, as in pretrain
    is_compiled: bool = False
    recompute_every: int = 0
    tokens_per_second: float | None = None  # of one GPU, all included, where it is known
    price_per_hour: float | None = None  # of one GPU
    save_seconds: float = 15.0


@dataclass(frozen=True)
class Inputs:
    """The files of a request, read and checked."""

    recipe: Recipe
    plan: RunPlan
    model: LlamaConfig
    raw: dict
    schedule: Schedule


@dataclass(frozen=True)
class Plan:
    """The plan of one run on one layout."""

    request: PlanRequest
    inputs: Inputs
    resolved: dict
    layout: Layout
    work: Work
    accumulations: tuple[int, ...]  # of each stage
    memory: Memory
    steps: tuple[StepTime, ...]  # one of each stage
    duration: Duration
    failures: tuple[Failures, Failures]  # in a good fleet and in a bad one
    storage: Storage
    timeline: Timeline
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.request.machines.gpu.memory_bytes

    @property
    def peak_learning_rate(self) -> float:
        return self.resolved["optimizer"]["params"].get("lr", 1e-3)

    @property
    def dollars(self) -> float | None:
        price = self.request.price_per_hour
        return None if price is None else price * self.duration.gpu_hours


def read_inputs(recipe_name: str, deepspeed_config: Path) -> Inputs:
    """Recipe, JSON and model; raises `ConfigError` for whatever training would reject."""
    recipe = load_recipe(recipe_name)
    raw = load_deepspeed_config(deepspeed_config)
    model = recipe.model
    plan = RunPlan(recipe)
    return Inputs(recipe, plan, model, raw, make_schedule(raw, deepspeed_config, plan))


def resolve(inputs: Inputs, path: Path, raw: dict, micro_batch: int, ranks: int) -> dict:
    """A DeepSpeed JSON as the run would use it on GPUs, where bf16 "auto" is true."""
    plan = inputs.plan
    values = AutoValues(micro_batch, plan.stages[0].batch, ranks, plan.total_steps, inputs.model.hidden_size, True)
    return resolve_deepspeed_config(raw, path, values)


def work_of(request: PlanRequest, inputs: Inputs, layout: Layout, micro_batch: int, recompute_every: int) -> Work:
    """One micro-batch of the run on a layout."""
    recipe = inputs.recipe
    attention = attention_memory(request.attention, recipe.document_mask, layout.weight_bytes)
    return Work(micro_batch, recipe.sequence_length, attention, recompute_every, request.is_compiled)


def make_plan(request: PlanRequest, inputs: Inputs, sizes: dict[str, int]) -> Plan:
    """Everything about the run, whether it fits too; raises `ConfigError` for a batch that does not divide."""
    machines, path = request.machines, request.deepspeed_config
    ranks = machines.hosts.ranks
    micro_batch = micro_batch_of(inputs.plan, requested_micro_batch(inputs.raw), ranks)
    resolved = resolve(inputs, path, inputs.raw, micro_batch, ranks)
    layout = read_layout(resolved, path.stem, ranks)
    work = work_of(request, inputs, layout, micro_batch, request.recompute_every)
    accumulations = tuple(accumulation_steps(stage.batch, ranks, micro_batch) for stage in inputs.plan.stages)
    steps = tuple(step_time(inputs.model, layout, work, count, machines) for count in accumulations)
    duration = _duration(inputs.plan, steps, ranks, request.tokens_per_second)
    intervals = inputs.recipe.intervals
    good, bad = (
        failures_of(duration.days, machines.hosts.nodes, request.save_seconds, intervals.save_minutes, rate)
        for rate in (GOOD_FLEET, BAD_FLEET)
    )
    peak_rate = resolved["optimizer"]["params"].get("lr", 1e-3)
    timeline = timeline_of(inputs.recipe, inputs.plan, inputs.schedule, peak_rate, sizes)
    corpus = sum(sizes.get(name, 0) for name in inputs.recipe.sources)
    return Plan(
        request, inputs, resolved, layout, work, accumulations,
        memory_of(inputs.model, layout, work, ranks), steps, duration, (good, bad),
        storage_of(inputs.model, layout, intervals, inputs.plan, corpus),
        timeline,
        (
            *schedule_warnings(inputs.plan, inputs.schedule),
            *data_warnings(timeline),
            *_machine_warnings(inputs, layout, work, accumulations, machines.hosts),
        ),
    )  # fmt: skip


def _duration(plan: RunPlan, steps: tuple[StepTime, ...], ranks: int, tokens_per_second: float | None) -> Duration:
    if tokens_per_second is not None:
        return Duration(plan.total_tokens, ranks, tokens_per_second * ranks)
    seconds = sum(stage.steps * step.seconds for stage, step in zip(plan.stages, steps, strict=True))
    return Duration(plan.total_tokens, ranks, plan.total_tokens / seconds)


def _machine_warnings(
    inputs: Inputs, layout: Layout, work: Work, accumulations: tuple[int, ...], hosts: Hosts
) -> list[str]:
    found = []
    if layout.stage == 3 and min(accumulations) == 1 and work.tokens < TINY_MICRO_BATCH_TOKENS:
        found.append(
            f"accumulation 1 with micro-batches of {work.tokens:,} tokens under ZeRO-3: all weights cross the network"
            f" for every {work.tokens:,} tokens of a GPU; use fewer GPUs, ZeRO-1, or a larger micro-batch"
        )
    if layout.hpz > 1 and gathers_of(inputs.model, layout).backward == 0:
        copy = layout.weight_bytes * (inputs.model.num_parameters - persistent_elements(inputs.model, layout))
        found.append(
            f"zero_hpz_partition_size {layout.hpz} keeps a second copy ({copy / layout.hpz / 1e9:.2f} GB per GPU), but"
            " with stage3_max_live_parameters and stage3_max_reuse_distance above the model's size no weight is"
            " gathered in the backward pass; it helps only the later micro-batches of a step"
        )
    found += _divisibility_warnings(inputs.plan, hosts, work.micro_batch)
    return found


def _divisibility_warnings(plan: RunPlan, hosts: Hosts, micro_batch: int) -> list[str]:
    works = [
        nodes
        for nodes in range(1, hosts.nodes + 1)
        if all(stage.batch % (nodes * hosts.gpus * micro_batch) == 0 for stage in plan.stages)
    ]
    if hosts.nodes == 1 or len(works) == hosts.nodes:
        return []
    return [
        f"after the loss of a host: of 1 to {hosts.nodes} hosts only {', '.join(map(str, works))} can share the global"
        f" batch at micro-batch {micro_batch}"
    ]


def reject_if_too_large(plan: Plan, candidates: list[str]) -> None:
    """Raise `ConfigError` for a plan beyond the GPU's memory, with what would fit."""
    if plan.fits:
        return
    gpu = plan.request.machines.gpu
    ways = "; what fits: " + "; ".join(candidates) if candidates else "; nothing fits on these GPUs, use larger ones"
    raise ConfigError(
        f"{plan.request.deepspeed_config}: micro-batch {plan.work.micro_batch} needs"
        f" {plan.memory.total / GIB:.1f} of the {gpu.memory_bytes / GIB:.1f} GiB of a {gpu.name}{ways}"
    )


def with_config(inputs: Inputs, config: dict) -> Inputs:
    """The same files with a different DeepSpeed config."""
    return replace(inputs, raw=json.loads(json.dumps(config)))
