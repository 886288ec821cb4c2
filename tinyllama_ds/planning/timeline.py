"""A run over time: learning rate, batch and mixture at every milestone, epochs per source, and warnings."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from tinyllama_ds.config.recipe import Recipe
from tinyllama_ds.config.run_plan import PlannedStage, RunPlan
from tinyllama_ds.config.schedule import Schedule
from tinyllama_ds.data.order import SampleOrder, planned_order

# Tokens with Llama's tokenizer, of whole sources: TinyLlama's sampling weights over 950 billion tokens (SlimPajama
# without GitHub, StarCoderData), and the cards of Proof-Pile-2 and SkyPile (their own tokenizers).
PUBLISHED_TOKENS = {
    "slimpajama": 659_000_000_000,
    "starcoderdata": 291_000_000_000,
    "proof-pile-2": 55_000_000_000,
    "skypile": 150_000_000_000,
}
MANY_EPOCHS = 4  # up to here repeated data are nearly as good as new: Muennighoff et al. 2023


@dataclass(frozen=True)
class Milestone:
    """The state of a run after a step."""

    name: str
    step: int  # how many are complete
    tokens: int
    learning_rate: float
    batch_tokens: int
    mixture: dict[str, float]


@dataclass(frozen=True)
class Timeline:
    """All about a run that does not depend on machines."""

    milestones: list[Milestone]
    tokens_by_source: dict[str, int]
    epochs: dict[str, float]  # of the sources whose size is known
    tokens_between_saves: int


def timeline_of(
    recipe: Recipe, plan: RunPlan, schedule: Schedule, peak_rate: float, sizes: Mapping[str, int]
) -> Timeline:
    """`sizes` are tokens of the sources that are known; raises `ConfigError` for one with less than a sample."""
    order = sample_order(recipe, plan, sizes)
    end = order.counts(sum(stage.samples for stage in plan.stages))
    T = recipe.sequence_length
    tokens = {name: count * T for name, count in end.items()}
    return Timeline(
        _milestones(plan, schedule, peak_rate),
        tokens,
        {name: count / (sizes[name] // T) for name, count in end.items() if name in sizes},
        _tokens_between_saves(recipe, plan),
    )


def sample_order(recipe: Recipe, plan: RunPlan, sizes: Mapping[str, int]) -> SampleOrder:
    """The real order of the run; a source of unknown size counts as large as the whole run."""
    samples = {
        name: sizes[name] // recipe.sequence_length if name in sizes else plan.total_tokens for name in recipe.sources
    }
    return planned_order(recipe, plan, samples)


def _milestones(plan: RunPlan, schedule: Schedule, peak_rate: float) -> list[Milestone]:
    at = {1: "first step"}
    if schedule.warmup_tokens:
        at[_steps_to(plan, schedule.warmup_tokens)] = "end of warmup"
    for start, _ in schedule.decays:
        if start > schedule.warmup_tokens:
            at[_steps_to(plan, start)] = "start of decay"
    first = 0
    for before, stage in pairwise([None, *plan.stages]):
        assert stage is not None
        if before is not None:
            at[first + 1] = f"first step of {stage.name}"
        if stage.ramp_samples:
            at[first + -(-stage.ramp_samples // stage.batch)] = f"end of the ramp of {stage.name}"
        first += stage.steps
        at[first] = f"end of {stage.name}"
    return [milestone_at(plan, schedule, peak_rate, number, name) for number, name in sorted(at.items())]


def milestone_at(plan: RunPlan, schedule: Schedule, peak_rate: float, number: int, name: str = "") -> Milestone:
    """The run after `number` steps; the mixture is the planned one in the middle of the last of them."""
    step = plan.step(number - 1)
    mixture = _mixture_at(plan, step.first_position + step.batch / 2)
    rate = peak_rate * schedule.ratio(step.tokens_after)
    return Milestone(name, number, step.tokens_after, rate, step.batch * plan.sequence_length, mixture)


def _mixture_at(plan: RunPlan, position: float) -> dict[str, float]:
    """The share of every source; the samples drawn are within one of its integral (`data/order.py`)."""
    sources = dict.fromkeys(name for stage in plan.stages for name in stage.weights)
    first, before = 0, plan.stages[0]
    for stage in plan.stages:
        if position < first + stage.samples:
            break
        first, before = first + stage.samples, stage
    reached = min(1.0, (position - first) / stage.ramp_samples) if stage.ramp_samples else 1.0
    return {name: reached * _share(stage, name) + (1 - reached) * _share(before, name) for name in sources}


def _share(stage: PlannedStage, source: str) -> float:
    return stage.weights.get(source, 0.0) / sum(stage.weights.values())


def _steps_to(plan: RunPlan, tokens: int) -> int:
    """The number of steps after which that many tokens are complete."""
    return min(
        plan.total_steps,
        1 + bisect_left(range(plan.total_steps), tokens, key=lambda number: plan.step(number).tokens_after),
    )


def _tokens_between_saves(recipe: Recipe, plan: RunPlan) -> int:
    """Saves happen at the first step past each multiple of `save_tokens`, or by the clock if that is sooner."""
    largest = max(stage.batch for stage in plan.stages) * plan.sequence_length
    return max(recipe.intervals.save_tokens, largest)


def schedule_warnings(plan: RunPlan, schedule: Schedule) -> list[str]:
    """Unusual learning-rate schedules."""
    found = []
    first = plan.stages[0].samples * plan.sequence_length
    if schedule.warmup_tokens > first:
        found.append(
            f"the warmup of {schedule.warmup_tokens:,} tokens is longer than stage {plan.stages[0].name!r} of {first:,}"
        )
    elif schedule.warmup_tokens > plan.total_tokens / 10:
        found.append(f"the warmup takes {schedule.warmup_tokens / plan.total_tokens:.0%} of the run; 1 % is usual")
    if not schedule.decays:
        found.append(
            "the learning rate never falls (TinyLlama trained half a trillion tokens like that by mistake); usual only"
            " for fine-tuning, and for a run whose checkpoints `tinyllama-ds decay` finishes"
        )
    elif schedule.min_ratio > 0.5:
        found.append(f"the learning rate hardly falls, to {schedule.min_ratio:g} of its peak; 0.1 is usual")
    return found


def data_warnings(timeline: Timeline) -> list[str]:
    """Sources that repeat, and those of unknown size."""
    found = []
    for name, tokens in timeline.tokens_by_source.items():
        epochs = timeline.epochs.get(name)
        if epochs is None:
            found.append(f"source {name!r}: unknown size, so epochs are unknown; give --data")
        elif epochs > MANY_EPOCHS:
            found.append(f"source {name!r}: {epochs:.1f} epochs; beyond {MANY_EPOCHS}, repeated data adds little")
        elif epochs > 1:
            found.append(f"source {name!r} repeats: {epochs:.2f} epochs, {tokens:,} tokens drawn")
    return found
