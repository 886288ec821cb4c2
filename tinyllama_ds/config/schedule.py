"""The learning rate as a pure function of tokens: it has no state that a resumed run could lose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import cos, pi, sqrt
from pathlib import Path
from typing import Any

from tinyllama_ds.config.deepspeed import auto_decay_steps, auto_warmup_steps
from tinyllama_ds.config.deepspeed_keys import AUTO
from tinyllama_ds.config.recipe import recipe_of_run
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import RUN_FILE

# From 1 to 0 over a decay, by the progress in it: the names of transformers' get_wsd_schedule.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + cos(pi * progress)),
    "1-sqrt": lambda progress: 1 - sqrt(progress),  # Hägele et al. 2024, arXiv 2405.18392
}


@dataclass(frozen=True)
class Schedule:
    """Linear warmup from `warmup_min_ratio` to 1, then 1, but for decays from 1 to `min_ratio`; all in tokens.

    An optimizer step trains at the ratio of the tokens seen once it is complete. So no step has learning rate 0, the
    step that completes the warmup has the peak, and the last step has the minimum. TinyLlama's own loop reads its
    function (one cosine from the warmup to the end) at the window's last micro-batch, a fraction of a step earlier;
    DeepSpeed's WarmupCosineLR wastes two steps at 0 and never reaches the peak.
    """

    warmup_tokens: int = 0
    warmup_min_ratio: float = 0.0
    decays: tuple[tuple[int, int], ...] = ()  # (start, end) of each, in order
    shape: str = "cosine"
    min_ratio: float = 1.0

    def ratio(self, tokens: int) -> float:
        """What every group's configured learning rate is multiplied with, after `tokens` tokens."""
        if tokens < self.warmup_tokens:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * tokens / self.warmup_tokens
        for start, end in self.decays:
            if start < tokens <= end:
                factor = SHAPES[self.shape]((tokens - start) / (end - start))
                return self.min_ratio + (1 - self.min_ratio) * factor
        is_over = self.decays and tokens > self.decays[-1][1]
        return self.min_ratio if is_over else 1.0

    def until(self, tokens: int) -> "Schedule":
        """The part that decides the ratios up to `tokens`: equal parts have equal ratios."""
        warmup = (self.warmup_tokens, self.warmup_min_ratio) if self.warmup_tokens else (0, 0.0)
        begun = tuple(decay for decay in self.decays if decay[0] < tokens)
        return Schedule(*warmup, begun, self.shape, self.min_ratio) if begun else Schedule(*warmup)


def schedule_of_run(description: dict) -> Schedule:
    """The schedule in a run's description (`run.json`)."""
    return make_schedule(description["deepspeed_config"], Path(RUN_FILE), RunPlan(recipe_of_run(description)))


def make_schedule(raw: dict, path: Path, plan: RunPlan) -> Schedule:
    """The JSON's schedule over the plan's tokens: a step of warmup or decay counts the tokens of the first batch.

    Raises `ConfigError` where warmup and decay leave nothing of the run, or a decay is longer than its stage.
    """
    if raw.get("scheduler") is None:
        return Schedule()
    kind, params = raw["scheduler"]["type"], raw["scheduler"].get("params", {})
    if kind == "warmup_stable_decay":
        return _warmup_stable_decay(params, path, plan)
    warmup = _warmup_tokens(params, "warmup_num_steps", path, plan)
    start = params.get("warmup_min_ratio", 0.0)
    decays = ((warmup, plan.total_tokens),)
    if kind == "WarmupCosineLR":
        return Schedule(warmup, start, decays, "cosine", params["cos_min_ratio"])
    if kind == "WarmupDecayLR":
        return Schedule(warmup, start, decays, "linear", 0.0)
    return Schedule(warmup, start)


def _warmup_stable_decay(params: Mapping[str, Any], path: Path, plan: RunPlan) -> Schedule:
    """transformers' get_wsd_schedule, whose warmup begins at the minimum."""
    warmup = _warmup_tokens(params, "num_warmup_steps", path, plan)
    minimum = params.get("min_lr_ratio", 0.0)
    decays = _decays(params, path, plan, warmup)
    return Schedule(
        warmup, params.get("warmup_min_ratio", minimum), decays, params.get("decay_type", "cosine"), minimum
    )


def _decays(params: Mapping[str, Any], path: Path, plan: RunPlan, warmup: int) -> tuple[tuple[int, int], ...]:
    """Start and end of each in tokens: at the end of the run, or of each stage with the steps of each."""
    given = params["num_decay_steps"]
    steps = auto_decay_steps(plan.total_steps) if given == AUTO else given
    ends = plan.stage_end_tokens if params.get("decay_each_stage", False) else [plan.total_tokens]
    lengths = steps if isinstance(steps, list) else [steps] * len(ends)
    if len(lengths) != len(ends):
        raise ConfigError(
            f"{path}: num_decay_steps are {lengths}; expected one number, or with decay_each_stage one for each of"
            f" the {len(plan.stages)} stages"
        )
    decays = []
    for length, end, before in zip(lengths, ends, (warmup, *ends), strict=False):
        start = end - length * plan.first_batch_tokens
        if length and start < before:
            raise ConfigError(
                f"{path}: num_decay_steps {length} begin before {before:,} tokens, where the warmup or the stage before"
                f" ends; expected at most {(end - before) // plan.first_batch_tokens}"
            )
        decays += [(start, end)] if length else []
    return tuple(decays)


def _warmup_tokens(params: Mapping[str, Any], key: str, path: Path, plan: RunPlan) -> int:
    auto = auto_warmup_steps(plan.total_steps)
    steps = auto if params[key] == AUTO else int(params[key])
    tokens = steps * plan.first_batch_tokens
    if tokens >= plan.total_tokens:
        raise ConfigError(
            f"{path}: {key} {steps} leaves nothing of the run's {plan.total_steps} steps; expected fewer"
            f' than {plan.total_tokens // plan.first_batch_tokens}, such as {auto}, or "auto", which makes it {auto}'
        )
    return tokens
