"""A recipe without one of its sources, to measure what that source is worth."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tinyllama_ds.config.recipe import Recipe, Stage
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.errors import ConfigError, shown


@dataclass(frozen=True)
class Ablation:
    """A source, and the tokens of the run from which on it is excluded: 0 is from its beginning."""

    source: str
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.source}@{self.tokens}" if self.tokens else self.source

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with the other sources in their proportions from there on; a stage that has begun is split.

        Lengths, batches and the samples of all steps before stay as they are. Raises `ConfigError` where that is not
        possible.
        """
        if self.source not in recipe.sources:
            self._reject(f"expected a source of the recipe {recipe.name!r}: {', '.join(recipe.sources)}")
        stages = tuple(self._stages(recipe))
        if stages == recipe.stages:
            self._reject(f"no stage of the recipe {recipe.name!r} has this source any more at {self.tokens:,} tokens")
        return replace(recipe, stages=stages)

    def _stages(self, recipe: Recipe) -> Iterator[Stage]:
        ends = RunPlan(recipe).stage_end_tokens
        previous: set[str] = set()
        for stage, first, end in zip(recipe.stages, [0, *ends], ends, strict=False):
            done = min(max(0, self.tokens - first), end - first)  # tokens of the stage with the source
            in_ramp = self.tokens > 0 and first <= self.tokens < first + stage.ramp_tokens
            if in_ramp and self.source in previous | stage.weights.keys():
                self._reject(
                    f"the mixture changes there until {first + stage.ramp_tokens:,} tokens; expected a later point"
                )
            if done == end - first or self.source not in stage.weights:
                yield stage
            else:
                if done:
                    yield replace(stage, tokens=done)
                yield self._without(stage, done)
            previous = set(stage.weights)

    def _without(self, stage: Stage, done: int) -> Stage:
        """What is left of a stage after its first `done` tokens."""
        weights = {name: weight for name, weight in stage.weights.items() if name != self.source}
        if not weights:
            self._reject(f"stage {shown(stage.name)} has no other source; expected one of at least two")
        if not done:
            return replace(stage, weights=weights)
        name = f"{stage.name} without {self.source}"
        return replace(stage, name=name, tokens=stage.tokens - done, weights=weights, ramp_tokens=0)

    def _reject(self, why: str) -> None:
        raise ConfigError(f"--without {self}: {why}")
