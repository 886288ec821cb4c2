"""What a run says of itself while it trains: the figures of its steps, validation, samples, scores and saves."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.checkpoint.save import Save
from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.harness import EvaluationFailed
from tinyllama_ds.evaluation.samples import continue_greedily
from tinyllama_ds.evaluation.validation import perplexity, validation_losses
from tinyllama_ds.health.guard import AnomalyGuard, StepDecision, StepStatus
from tinyllama_ds.health.heartbeat import Heartbeat
from tinyllama_ds.health.stragglers import StragglerDetector
from tinyllama_ds.run.ledger import SKIPPED, Entry, record
from tinyllama_ds.run.metrics import MetricsLogger, PhaseClock, memory_bytes, utilisation
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.train.scoring import score_on_tasks
from tinyllama_ds.train.stop import StopRequest

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass
class Window:
    """What the loop measures between two logged steps."""

    clock: PhaseClock
    tokens: int = 0
    started: float = 0.0
    paused: float = 0.0  # seconds spent on validation, saving and scoring

    def restart(self) -> None:
        self.tokens, self.started, self.paused = 0, perf_counter(), 0.0

    def tokens_per_second(self) -> float:
        return self.tokens / (perf_counter() - self.started - self.paused)


def step_figures(
    run: Run,
    world: DistributedInfo,
    window: Window,
    agreed: StepStatus,
    learning_rate: float,
    progress: Progress,
    peak: float,
) -> dict[str, float]:
    """The figures of a logged step."""
    tokens_per_second = window.tokens_per_second()
    flops = run.model.flops_per_token(run.recipe.sequence_length) * tokens_per_second
    figures = {
        "Train/Loss": agreed.loss if agreed.is_finite else float("nan"),
        "Train/LearningRate": learning_rate,
        "Train/BatchTokens": run.plan.step(progress.step - 1).batch * run.recipe.sequence_length,
        "Train/GradNorm": agreed.grad_norm if agreed.is_finite else float("inf"),
        "Speed/TokensPerSecond": tokens_per_second,
        "Memory/PeakGiB": memory_bytes(world.device) / 2**30,
    }
    mfu = utilisation(flops, peak * world.size)
    figures |= {} if mfu is None else {"Speed/MFU": mfu}
    figures |= {f"Seconds/{name}": seconds for name, seconds in window.clock.read().items()}
    for source, samples in run.order.counts(progress.position).items():
        figures[f"Tokens/{source}"] = samples * run.recipe.sequence_length
    return figures


def compare_ranks(
    stragglers: StragglerDetector, figures: dict[str, float], metrics: MetricsLogger | None
) -> dict[str, float]:
    """The figures of the ranks' own work; says which rank has become slow. Collective."""
    found, sentences = stragglers.compare(figures.get("Seconds/data", 0.0))
    if metrics is not None:
        for sentence in sentences:
            metrics.log_line(sentence)
    return found


def report(metrics: MetricsLogger | None, progress: Progress, figures: dict[str, float]) -> None:
    """Hand the figures of a logged step to the sinks."""
    if metrics is None:
        return
    metrics.log(progress.step, progress.tokens, figures)
    mfu = f"{figures['Speed/MFU']:.0%}" if "Speed/MFU" in figures else "above the measured peak"
    metrics.advance(
        progress.step,
        f"loss {figures['Train/Loss']:.3f}, lr {figures['Train/LearningRate']:.2e},"
        f" {figures['Speed/TokensPerSecond']:,.0f} tok/s, MFU {mfu}",
    )


def report_verdict(
    run: Run,
    metrics: MetricsLogger | None,
    progress: Progress,
    samples: range,
    verdict: StepDecision,
    guard: AnomalyGuard,
) -> None:
    """Say what was wrong with a step, and which samples it was trained on; the ledger keeps it if that was in vain."""
    if metrics is None:
        return
    if not verdict.is_applied:
        with suppress(OSError):  # a full disk does not stop training; the figures and the console have it too
            record(run.run_dir, Entry(SKIPPED, progress.step, samples[0], samples[-1], verdict.reason or ""))
    figures = {"Guard/SkippedSteps": guard.skipped} if not verdict.is_applied else {"Guard/Spikes": guard.spikes}
    figures |= {"Guard/FirstSample": samples[0], "Guard/LastSample": samples[-1]}
    metrics.log(progress.step, progress.tokens, figures)
    skipped = "" if verdict.is_applied else "skipped, "
    metrics.log_line(f"step {progress.step:,}: {skipped}{verdict.reason} (samples {samples[0]} to {samples[-1]})")


def report_save(metrics: MetricsLogger | None, save: Save) -> None:
    """Say how a save went, and how long training stood still for it. Rank 0 only."""
    if metrics is None:
        return
    progress = save.progress
    figures = {
        "Checkpoint/StallSeconds": save.stall,
        "Checkpoint/Seconds": save.seconds,
        "Checkpoint/GiB": save.size / 2**30,
        "Checkpoint/Failures": save.failures_so_far,
    }
    metrics.log(progress.step, progress.tokens, figures)
    if save.failures:
        again = f" ({save.failures_in_a_row} saves in a row)" if save.failures_in_a_row > 1 else ""
        metrics.log_line(f"step {progress.step:,}: NOT saved{again}, training goes on: {'; '.join(save.failures)}")
    else:
        metrics.log_line(
            f"step {progress.step:,}: saved {save.size / 2**30:.2f} GiB in {save.seconds:.1f} s,"
            f" {save.stall:.2f} s of which training stood still"
        )


def report_validation(
    engine: "DeepSpeedEngine", run: Run, world: DistributedInfo, progress: Progress, metrics: MetricsLogger | None
) -> None:
    """Validation loss and perplexity of every source. Collective."""
    losses = validation_losses(run.validation, engine, sum_over_ranks, world, run.micro_batch)
    if metrics is None:
        return
    figures = {f"Validation/Loss/{source}": loss for source, loss in losses.items()}
    figures |= {f"Validation/Perplexity/{source}": perplexity(loss) for source, loss in losses.items()}
    metrics.log(progress.step, progress.tokens, figures)
    text = ", ".join(f"{source} {loss:.3f}" for source, loss in losses.items())
    metrics.log_line(f"step {progress.step:,} ({progress.tokens:,} tokens): validation loss {text}")


def continue_prompts(engine: "DeepSpeedEngine", run: Run, world: DistributedInfo, new_tokens: int) -> list[list[int]]:
    """The ids that the model writes after each of the recipe's prompts. Collective."""
    with torch.compiler.set_stance("force_eager"):  # a new shape would be compiled, and change what training runs
        return continue_greedily(engine, run.prompts, new_tokens, world.device)


def report_samples(
    engine: "DeepSpeedEngine", run: Run, world: DistributedInfo, progress: Progress, metrics: MetricsLogger | None
) -> None:
    """What the model makes of the recipe's prompts now. Collective. Draws no random number, and compiles nothing."""
    samples = run.recipe.samples
    continued = continue_prompts(engine, run, world, samples.new_tokens)
    if metrics is None:
        return
    decode = run.tokenizer.decode
    texts = [(prompt, decode(ids)) for prompt, ids in zip(samples.prompts, continued, strict=True)]
    metrics.log_samples(progress.step, progress.tokens, texts)


def report_scores(
    engine: "DeepSpeedEngine",
    run: Run,
    world: DistributedInfo,
    progress: Progress,
    stop: StopRequest,
    heartbeat: Heartbeat,
    metrics: MetricsLogger | None,
) -> None:
    """Scores on the recipe's tasks, or why there are none, which never ends a run. Collective."""
    started, place = perf_counter(), f"step {progress.step:,} ({progress.tokens:,} tokens)"
    beat = partial(heartbeat.beat, progress.step, "scoring on tasks")
    beat()
    try:
        scores = score_on_tasks(engine, run, world, stop.is_requested, beat)
    except (ConfigError, EvaluationFailed) as failure:
        if metrics is not None:
            metrics.log_line(f"{place}: NOT scored on tasks, training goes on: {failure}")
        return
    if metrics is None:
        return
    metrics.log_scores(progress.step, progress.tokens, scores)
    text = ", ".join(f"{score.task} {score.metric} {score.value:.4f}" for score in scores)
    metrics.log_line(f"{place}: scored in {perf_counter() - started:.1f} s: {text}")
