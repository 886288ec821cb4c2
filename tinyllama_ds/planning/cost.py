"""Days, cost, storage, and what failures add to them."""

from dataclasses import dataclass
from math import sqrt

from tinyllama_ds.config.recipe import Intervals
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.data.shards import token_dtype
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.planning.layout import Layout

# Interruptions per 1,000 node-days. Good: Llama 3 on 16,384 H100 (3.8), BLOOM (3.0). Bad: OPT-175B (16).
GOOD_FLEET, BAD_FLEET = 4.0, 16.0
DETECTION_SECONDS, RESTART_SECONDS = 600.0, 300.0
_DAY = 86_400.0


@dataclass(frozen=True)
class Duration:
    """Compute time of the run, without failures."""

    tokens: int
    ranks: int
    tokens_per_second: float  # all GPUs together

    @property
    def days(self) -> float:
        return self.tokens / self.tokens_per_second / _DAY

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.ranks

    def gpu_hours_for(self, tokens: float) -> float:
        """GPU-hours of a number of tokens, for comparison with published tables (300 billion)."""
        return tokens / self.tokens_per_second / 3600 * self.ranks


@dataclass(frozen=True)
class Failures:
    """Expected failures of hosts at a rate per 1,000 node-days."""

    per_thousand_node_days: float
    expected: float  # interruptions in the whole run
    best_interval_minutes: float  # between checkpoints: Young's and Daly's first-order optimum
    goodput: float  # share of the time that ends in kept tokens


def failures_of(days: float, nodes: int, save_seconds: float, save_minutes: float, rate: float) -> Failures:
    """Interruptions, the best interval between saves, and goodput at the recipe's interval.

    Young (1974), Daly (2006): sqrt(2 x seconds of a save x mean time between failures). A failure costs its detection,
    the restart, and half an interval of lost work; detection is the watchdog's default of ten minutes.
    """
    per_second = rate / 1000 * nodes / _DAY
    interval = save_minutes * 60
    lost = per_second * (DETECTION_SECONDS + RESTART_SECONDS + interval / 2) + save_seconds / interval
    best = sqrt(2 * save_seconds / per_second)
    return Failures(rate, per_second * days * _DAY, best / 60, 1 / (1 + lost))


@dataclass(frozen=True)
class Storage:
    """Bytes on the shared file system."""

    checkpoint: int
    checkpoints: int
    tokens: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.tokens


def storage_of(model: LlamaConfig, layout: Layout, intervals: Intervals, plan: RunPlan, corpus_tokens: int) -> Storage:
    """Checkpoints that stay (the last few, one for every `keep_tokens` and stage), and the prepared corpus.

    A checkpoint is master weights and moments, at any ZeRO stage.
    """
    checkpoint = (layout.master_bytes + layout.moment_bytes) * model.num_parameters
    kept = intervals.keep_last + plan.total_tokens // intervals.keep_tokens + len(plan.stages) - 1
    return Storage(checkpoint, kept, corpus_tokens * token_dtype(model.vocab_size).itemsize)
