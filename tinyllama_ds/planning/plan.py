"""What a run is asked (`PlanRequest`), and everything known about it before it starts (`Plan`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tinyllama_ds.config.deepspeed import (
    AutoValues,
    load_deepspeed_config,
    requested_micro_batch,
    resolve_deepspeed_config,
)
from tinyllama_ds.config.param_groups import check_optimizer
from tinyllama_ds.config.recipe import Recipe, load_recipe
from tinyllama_ds.config.run_plan import (
    RunPlan,
    accumulation_steps,
    check_offloading,
    data_parallel_size,
    micro_batch_of,
)
from tinyllama_ds.config.schedule import Schedule, make_schedule
from tinyllama_ds.errors import ConfigError, all_of
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.planning.activations import Work, attention_memory
from tinyllama_ds.planning.cost import BAD_FLEET, GOOD_FLEET, Duration, Failures, Storage, failures_of, storage_of
from tinyllama_ds.planning.layout import Layout, gathers_of, persistent_elements, read_layout
from tinyllama_ds.planning.memory import Memory, memory_of
from tinyllama_ds.planning.timeline import Timeline, data_warnings, schedule_warnings, timeline_of
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
    activation_checkpointing: int = 0  # every so many blocks are recomputed; 0 is none
    activation_offloading: bool = False  # their inputs are in host memory
    sequence_parallel: int = 1  # GPUs of a host that share each sequence
    tokens_per_second: float | None = None  # of one GPU, all included, where it is known
    price_per_hour: float | None = None  # of one GPU
    save_seconds: float = 15.0


@dataclass(frozen=True)
class Inputs:
    """The files of a request, read and checked."""

    recipe: Recipe
    plan: RunPlan
    model: LlamaConfig
    path: Path  # of the DeepSpeed JSON
    raw: dict  # its content
    schedule: Schedule


@dataclass(frozen=True)
class Plan:
    """One run on one layout. What it needs, costs and does is computed when it is asked for."""

    request: PlanRequest
    inputs: Inputs
    sizes: Mapping[str, int]  # tokens of the sources whose size is known
    resolved: dict
    layout: Layout
    work: Work
    accumulations: tuple[int, ...]  # of each stage

    @cached_property
    def memory(self) -> Memory:
        return memory_of(self.inputs.model, self.layout, self.work, self.request.machines.hosts.ranks)

    @property
    def host_bytes(self) -> int:
        """In the memory of a host, of all its ranks."""
        return self.memory.on_host * self.request.machines.hosts.gpus

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.request.machines.gpu.memory_bytes

    @cached_property
    def steps(self) -> tuple[StepTime, ...]:
        """One of each stage."""
        model, machines = self.inputs.model, self.request.machines
        return tuple(step_time(model, self.layout, self.work, count, machines) for count in self.accumulations)

    @property
    def longest_step(self) -> StepTime:
        """The one of the stage with most samples."""
        _, step = max(zip(self.inputs.plan.stages, self.steps, strict=True), key=lambda pair: pair[0].samples)
        return step

    @cached_property
    def duration(self) -> Duration:
        plan, ranks, rate = self.inputs.plan, self.request.machines.hosts.ranks, self.request.tokens_per_second
        if rate is not None:
            return Duration(plan.total_tokens, ranks, rate * ranks)
        seconds = sum(stage.steps * step.seconds for stage, step in zip(plan.stages, self.steps, strict=True))
        return Duration(plan.total_tokens, ranks, plan.total_tokens / seconds)

    @property
    def dollars(self) -> float | None:
        price = self.request.price_per_hour
        return None if price is None else price * self.duration.gpu_hours

    @cached_property
    def failures(self) -> tuple[Failures, ...]:
        """In a good fleet and in a bad one."""
        days, nodes, minutes = self.duration.days, self.request.machines.hosts.nodes, self.inputs.recipe.intervals
        return tuple(
            failures_of(days, nodes, self.request.save_seconds, minutes.save_minutes, rate)
            for rate in (GOOD_FLEET, BAD_FLEET)
        )

    @cached_property
    def storage(self) -> Storage:
        recipe = self.inputs.recipe
        corpus = sum(self.sizes.get(name, 0) for name in recipe.sources)
        return storage_of(self.inputs.model, self.layout, recipe.intervals, self.inputs.plan, corpus)

    @property
    def peak_learning_rate(self) -> float:
        return self.resolved["optimizer"]["params"].get("lr", 1e-3)

    @cached_property
    def timeline(self) -> Timeline:
        """Raises `ConfigError` for a source with less than a sample."""
        inputs = self.inputs
        return timeline_of(inputs.recipe, inputs.plan, inputs.schedule, self.peak_learning_rate, self.sizes)

    @property
    def warnings(self) -> list[str]:
        """About schedule, data and layout."""
        found = schedule_warnings(self.inputs.plan, self.inputs.schedule) + data_warnings(self.timeline)
        return found + _layout_warnings(self) + _divisibility_warnings(self)


def read_inputs(recipe_name: str, deepspeed_config: Path) -> Inputs:
    """Recipe, JSON and model; raises `ConfigError` for whatever training would reject."""
    recipe, raw = all_of(lambda: load_recipe(recipe_name), lambda: load_deepspeed_config(deepspeed_config))
    check_optimizer(raw["optimizer"], recipe.model, deepspeed_config)
    plan = RunPlan(recipe)
    return Inputs(recipe, plan, recipe.model, deepspeed_config, raw, make_schedule(raw, deepspeed_config, plan))


def make_plan(request: PlanRequest, inputs: Inputs, sizes: Mapping[str, int]) -> Plan:
    """The plan of a run, whether it fits or not; raises `ConfigError` for a batch that does not divide."""
    ranks, recipe = request.machines.hosts.ranks, inputs.recipe
    if request.activation_offloading:
        check_offloading(request.activation_checkpointing, "cuda")
    data_size = data_ranks(request, inputs)
    micro_batch = micro_batch_of(inputs.plan, requested_micro_batch(inputs.raw), data_size)
    resolved = resolve(inputs, micro_batch, data_size)
    layout = read_layout(resolved, request.deepspeed_config.stem, ranks)
    attention = attention_memory(request.attention, recipe.document_mask, layout.weight_bytes)
    work = Work(
        micro_batch, recipe.sequence_length, attention, request.activation_checkpointing, request.is_compiled,
        sequence_parallel=request.sequence_parallel, offloads_activations=request.activation_offloading,
        document_mask=recipe.document_mask,
    )  # fmt: skip
    accumulations = tuple(accumulation_steps(stage.batch, data_size, micro_batch) for stage in inputs.plan.stages)
    return Plan(request, inputs, sizes, resolved, layout, work, accumulations)


def data_ranks(request: PlanRequest, inputs: Inputs) -> int:
    """The number of data-parallel ranks; raises `ConfigError` where the GPUs that share sequences do not divide."""
    hosts, N = request.machines.hosts, request.sequence_parallel
    if hosts.gpus % N:
        raise ConfigError(f"--sequence-parallel {N} does not divide the {hosts.gpus} GPUs of a host")
    return data_parallel_size(inputs.recipe, hosts.ranks, N)


def resolve(inputs: Inputs, micro_batch: int, data_size: int) -> dict:
    """The DeepSpeed JSON as the run would use it on GPUs, where bf16 "auto" is true."""
    plan = inputs.plan
    values = AutoValues(micro_batch, plan.stages[0].batch, data_size, plan.total_steps, inputs.model.hidden_size, True)
    return resolve_deepspeed_config(inputs.raw, inputs.path, values)


def _layout_warnings(plan: Plan) -> list[str]:
    model, layout, tokens = plan.inputs.model, plan.layout, plan.work.tokens
    found = []
    if layout.stage == 3 and min(plan.accumulations) == 1 and tokens < TINY_MICRO_BATCH_TOKENS:
        found.append(
            f"accumulation 1 with micro-batches of {tokens:,} tokens under ZeRO-3: all weights cross the network"
            f" for every {tokens:,} tokens of a GPU; use fewer GPUs, ZeRO-1, or a larger micro-batch"
        )
    if layout.hpz > 1 and gathers_of(model, layout).backward == 0:
        copy = layout.weight_bytes * (model.num_parameters - persistent_elements(model, layout))
        found.append(
            f"zero_hpz_partition_size {layout.hpz} keeps a second copy ({copy / layout.hpz / 1e9:.2f} GB per GPU), but"
            " with stage3_max_live_parameters and stage3_max_reuse_distance above the model's size no weight is"
            " gathered in the backward pass; it helps only the later micro-batches of a step"
        )
    return found


def _divisibility_warnings(plan: Plan) -> list[str]:
    hosts, micro_batch = plan.request.machines.hosts, plan.work.micro_batch
    in_host = hosts.gpus // plan.request.sequence_parallel  # data-parallel ranks
    works = [
        nodes
        for nodes in range(1, hosts.nodes + 1)
        if all(stage.batch % (nodes * in_host * micro_batch) == 0 for stage in plan.inputs.plan.stages)
    ]
    if hosts.nodes == 1 or len(works) == hosts.nodes:
        return []
    return [
        f"after the loss of a host: of 1 to {hosts.nodes} hosts only {', '.join(map(str, works))} can share the global"
        f" batch at micro-batch {micro_batch}"
    ]


def reject_too_large(plan: Plan, candidates: list[str]) -> None:
    """Raise `ConfigError` for a plan beyond the GPU's memory, with what would fit."""
    gpu = plan.request.machines.gpu
    ways = "; what fits: " + "; ".join(candidates) if candidates else "; nothing fits on these GPUs, use larger ones"
    raise ConfigError(
        f"{plan.request.deepspeed_config}: micro-batch {plan.work.micro_batch} needs"
        f" {plan.memory.total / GIB:.1f} of the {gpu.memory_bytes / GIB:.1f} GiB of a {gpu.name}{ways}"
    )
