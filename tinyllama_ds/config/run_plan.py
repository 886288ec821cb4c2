"""What a run will do, step by step, derived from the recipe and the machines before anything starts.

The global batch comes from the recipe; the number of ranks only decides how it is split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import gcd, isqrt

from tinyllama_ds.config.recipe import Recipe
from tinyllama_ds.errors import ConfigError

_AUTO_MICRO_BATCH_TOKENS = 16_384  # TinyLlama's 8 sequences of 2,048 tokens per A100-40G


@dataclass(frozen=True)
class Step:
    """One optimizer step of the plan. Positions are global sample numbers, tokens count from the start of the run."""

    number: int
    stage: str
    first_position: int
    batch: int  # sequences, over all ranks
    tokens_before: int
    tokens_after: int

    def crosses(self, interval_tokens: int) -> bool:
        """Whether this step completes a multiple of an interval in tokens."""
        return self.tokens_after // interval_tokens > self.tokens_before // interval_tokens


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the recipe in steps and sequences."""

    name: str
    steps: int
    batch: int  # sequences
    weights: dict[str, float]
    ramp_samples: int

    @property
    def samples(self) -> int:
        return self.steps * self.batch


class RunPlan:
    """All optimizer steps of a recipe. A stage ends with the step that reaches its tokens."""

    def __init__(self, recipe: Recipe) -> None:
        self.sequence_length = recipe.sequence_length
        self.stages = [
            PlannedStage(
                stage.name,
                -(-stage.tokens // stage.global_batch_tokens),
                stage.global_batch_tokens // recipe.sequence_length,
                stage.weights,
                -(-stage.ramp_tokens // recipe.sequence_length),
            )
            for stage in recipe.stages
        ]
        ends = list(accumulate(stage.steps for stage in self.stages))
        self.spans = list(pairwise([0, *ends]))  # of every stage, its first step and the step after its last
        self.stage_ends = frozenset(ends)  # steps
        self.total_steps = sum(stage.steps for stage in self.stages)
        self.total_tokens = sum(stage.samples for stage in self.stages) * recipe.sequence_length

    def begun(self, step: int) -> list[int]:
        """Of every stage that has begun within the first `step` steps, how many of them are its own."""
        return [min(last, step) - first for first, last in self.spans if first < step]

    @property
    def stage_end_tokens(self) -> list[int]:
        """The tokens after each stage."""
        return [tokens * self.sequence_length for tokens in accumulate(stage.samples for stage in self.stages)]

    @property
    def first_batch_tokens(self) -> int:
        return self.stages[0].batch * self.sequence_length

    def step(self, number: int) -> Step:
        """The step of a number, from 0; raises IndexError past the end."""
        first_step = first_position = 0
        for stage in self.stages:
            if number < first_step + stage.steps:
                position = first_position + (number - first_step) * stage.batch
                after = position + stage.batch
                T = self.sequence_length
                return Step(number, stage.name, position, stage.batch, position * T, after * T)
            first_step += stage.steps
            first_position += stage.samples
        raise IndexError(f"step {number} of {self.total_steps}")

    def end_of(self, steps: int) -> tuple[int, int]:
        """Samples and tokens of the first so many steps."""
        if steps == 0:
            return 0, 0
        last = self.step(min(steps, self.total_steps) - 1)
        return last.first_position + last.batch, last.tokens_after

    def steps(self, start: int) -> Iterator[Step]:
        """All steps from a number on."""
        return (self.step(number) for number in range(start, self.total_steps))


def check_offloading(recompute_every: int, device_type: str) -> None:
    """Raises `ConfigError` where no activation would leave the memory of a GPU."""
    if not recompute_every:
        raise ConfigError(
            "--activation-offloading moves the inputs of recomputed blocks; expected --activation-checkpointing 1 or"
            " more with it"
        )
    if device_type == "cpu":
        raise ConfigError("--activation-offloading: on CPUs activations are in host memory already; expected GPUs")


def data_parallel_size(recipe: Recipe, world_size: int, sequence_parallel: int) -> int:
    """The number of data-parallel ranks: those that read samples of their own, of ranks that share each sequence.

    Raises `ConfigError` where sequence parallelism does not divide the ranks, the query heads and the sequence.
    """
    heads, length = recipe.model.num_attention_heads, recipe.sequence_length
    for number, what in ((world_size, "ranks"), (heads, "query heads"), (length, "tokens of a sequence")):
        if number % sequence_parallel:
            raise ConfigError(
                f"--sequence-parallel {sequence_parallel} does not divide the {number} {what}; numbers that work:"
                f" {_join(sequence_parallel_sizes(recipe, world_size))}"
            )
    return world_size // sequence_parallel


def sequence_parallel_sizes(recipe: Recipe, ranks: int) -> list[int]:
    """The numbers of ranks that may share each sequence: divisors of ranks, query heads and sequence, 1 included."""
    return _divisors(gcd(ranks, recipe.model.num_attention_heads, recipe.sequence_length))


def accumulation_steps(batch: int, data_size: int, micro_batch: int) -> int:
    """Micro-batches of a data-parallel rank per optimizer step, given a global batch that divides; all in sequences."""
    return batch // data_size // micro_batch


def micro_batches_of(plan: RunPlan, data_size: int) -> list[int]:
    """The sizes, in sequences, that divide every stage's batch of a data-parallel rank; all batches divide by these."""
    shares = [stage.batch // data_size for stage in plan.stages]
    return [size for size in _divisors(min(shares)) if all(share % size == 0 for share in shares)]


def micro_batch_of(plan: RunPlan, micro_batch: int | None, data_size: int) -> int:
    """The micro-batch per data-parallel rank in sequences, or the largest that fits where none is given.

    Raises `ConfigError`, with the sizes that work, where a stage's global batch is not a multiple of it.
    """
    for stage in plan.stages:
        if stage.batch % data_size:
            raise ConfigError(
                f"stage {stage.name!r}: a global batch of {stage.batch} sequences does not divide over {data_size}"
                f" data-parallel ranks; numbers that work: {_join(_divisors(stage.batch))}"
            )
    works = micro_batches_of(plan, data_size)
    if micro_batch is None:
        limit = max(1, _AUTO_MICRO_BATCH_TOKENS // plan.sequence_length)
        return max(size for size in works if size <= limit)
    if micro_batch not in works:
        raise ConfigError(
            f"train_micro_batch_size_per_gpu {micro_batch} does not divide the"
            f" {min(stage.batch for stage in plan.stages) // data_size} sequences per rank and"
            f" step ({data_size} data-parallel ranks); sizes that work: {_join(works)}"
        )
    return micro_batch


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
