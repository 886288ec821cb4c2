"""The learning rate as a pure function of tokens: it has no state that a resumed run could lose."""

from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

from tinyllama_ds.config.deepspeed import auto_warmup_steps, read_schedule
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.errors import ConfigError


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warmup from `warmup_min_ratio` to 1, then half a cosine from 1 to `min_ratio` (TinyLlama's get_lr).

    An optimizer step trains at the ratio of the tokens seen once it is complete. So no step has learning rate 0, the
    step that completes the warmup has the peak, and the last step has the minimum. TinyLlama's own loop reads its
    function at the window's last micro-batch, a fraction of a step earlier; DeepSpeed's WarmupCosineLR wastes two
    steps at 0 and never reaches the peak.
    """

    warmup_tokens: int
    total_tokens: int
    warmup_min_ratio: float
    min_ratio: float

    def ratio(self, tokens: int) -> float:
        """What every group's configured learning rate is multiplied with, after `tokens` tokens."""
        if tokens < self.warmup_tokens:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * tokens / self.warmup_tokens
        if tokens >= self.total_tokens:
            return self.min_ratio
        progress = (tokens - self.warmup_tokens) / (self.total_tokens - self.warmup_tokens)
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + cos(pi * progress))


@dataclass(frozen=True)
class ConstantSchedule:
    """No schedule: the configured learning rate throughout."""

    def ratio(self, tokens: int) -> float:
        return 1.0


Schedule = CosineSchedule | ConstantSchedule


def make_schedule(raw: dict, path: Path, plan: RunPlan) -> Schedule:
    """The JSON's schedule over the plan's tokens: a warmup step counts the tokens of the first stage's batch.

    Raises `ConfigError` where the warmup is not shorter than the run.
    """
    params = read_schedule(raw, path)
    if params is None:
        return ConstantSchedule()
    auto = auto_warmup_steps(plan.total_steps)
    steps = auto if params.warmup_num_steps is None else params.warmup_num_steps
    warmup_tokens = steps * plan.first_batch_tokens
    if warmup_tokens >= plan.total_tokens:
        raise ConfigError(
            f"{path}: warmup_num_steps {steps} leaves nothing of the run's {plan.total_steps} steps; expected fewer"
            f' than {plan.total_tokens // plan.first_batch_tokens}, such as {auto}, or "auto", which makes it {auto}'
        )
    return CosineSchedule(warmup_tokens, plan.total_tokens, params.warmup_min_ratio, params.cos_min_ratio)
