"""The training loop: one optimizer step after another, measured, validated and saved as the plan says."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from tinyllama_ds.data.loader import prefetch
from tinyllama_ds.data.order import rank_positions
from tinyllama_ds.evaluation.validation import perplexity, validation_losses
from tinyllama_ds.plan import Step
from tinyllama_ds.training.checkpoint import Progress
from tinyllama_ds.training.engine import set_learning_rate, sum_over_ranks
from tinyllama_ds.training.faults import strike
from tinyllama_ds.training.guard import (
    Batch,
    DigestedBatches,
    Guard,
    agree,
    check_parameters,
    extend_chain,
)
from tinyllama_ds.training.heartbeat import Heartbeat
from tinyllama_ds.training.metrics import MetricsLogger, PhaseClock, memory_bytes, peak_flops
from tinyllama_ds.training.pace import Pace
from tinyllama_ds.training.run import Run
from tinyllama_ds.training.saving import Saver
from tinyllama_ds.training.stop import StopRequest
from tinyllama_ds.training.world import World

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_PREFETCHED_MICRO_BATCHES = 4
_COLLECT_STEPS = 100  # all ranks collect garbage at the same steps


@dataclass
class Window:
    """What the loop measures between two logged steps."""

    clock: PhaseClock
    tokens: int = 0
    started: float = 0.0
    paused: float = 0.0  # seconds spent on validation and saving

    def restart(self) -> None:
        self.tokens, self.started, self.paused = 0, perf_counter(), 0.0

    def tokens_per_second(self) -> float:
        return self.tokens / (perf_counter() - self.started - self.paused)


def train(
    engine: "DeepSpeedEngine",
    run: Run,
    world: World,
    start: Progress,
    metrics: MetricsLogger | None,
    stop: StopRequest,
    heartbeat: Heartbeat,
) -> Progress:
    """Train from `start` to the end of the plan, or to a stop that any rank was asked for; the end is saved.

    Collective; `metrics` is given on rank 0 only. Raises `BadNumbers` on all ranks.
    """
    window = Window(PhaseClock(world.device))
    peak, _ = peak_flops(world.device, next(engine.module.parameters()).dtype)
    batches = DigestedBatches(prefetch(micro_batches(run, world, start.step), _PREFETCHED_MICRO_BATCHES))
    progress, final = start, run.plan.total_steps
    saver, guard = Saver(run, world), Guard()
    pace = Pace(engine.module.model.layers, world)
    if run.validation and start.step == 0:
        report_validation(engine, run, world, start, metrics)  # where the curves begin: about ln(vocabulary)
    take_over_garbage_collection()
    window.restart()
    for step in run.plan.steps(start.step):
        strike("step.begin", step.number)
        is_logged = (step.number + 1) % run.recipe.intervals.log_steps == 0 or step.number + 1 == final
        learning_rate = set_learning_rate(engine, run.schedule.ratio(step.tokens_after))
        loss, grad_norm = train_step(engine, step, batches, run.micro_batch, world, window.clock)
        agreed = agree(stop.is_wanted(), saver.is_due(), loss, grad_norm, batches.take())
        guard.check(engine, step, agreed)
        chain = extend_chain(progress.chain, step.number, agreed.digest)
        progress = Progress(step.number + 1, step.first_position + step.batch, step.tokens_after, chain)
        if not agreed.is_finite:
            report_skip(metrics, step, progress, guard)
        window.tokens += step.tokens_after - step.tokens_before
        if is_logged:
            figures = step_figures(run, world, window, loss, grad_norm, learning_rate, progress, peak)
            report(metrics, progress, figures | compare_ranks(pace, figures, metrics))
            window.restart()
        paused_at = perf_counter()
        is_last = progress.step == final or agreed.stop
        if run.validation and (progress.step == final or step.crosses(run.recipe.intervals.evaluate_tokens)):
            heartbeat.beat(progress.step, "validating")
            report_validation(engine, run, world, progress, metrics)
        is_saved = is_last or agreed.save or step.crosses(run.recipe.intervals.save_tokens)
        if is_saved or progress.step % run.recipe.intervals.check_steps == 0:
            check_parameters(engine)
        if is_saved:
            heartbeat.beat(progress.step, "saving")
            save(saver, engine, progress, metrics, must_succeed=is_last)
        if progress.step % _COLLECT_STEPS == 0:
            gc.collect()
        window.paused += perf_counter() - paused_at
        heartbeat.beat(progress.step, "training")
        if is_last:
            break
    return progress


def take_over_garbage_collection() -> None:
    """Python no longer collects when it likes: a rank that stops to collect stops all, so all do it together."""
    gc.collect()
    gc.freeze()  # what is alive now stays until the end
    gc.disable()


def micro_batches(run: Run, world: World, first_step: int) -> Iterator[Batch]:
    """This rank's micro batches of all steps from a number on."""
    for step in run.plan.steps(first_step):
        share = rank_positions(step.first_position, step.batch, world.rank, world.size)
        for start in share[:: run.micro_batch]:
            yield read_batch(run, np.arange(start, start + run.micro_batch), world.device)


def read_batch(run: Run, positions: np.ndarray, device: torch.device) -> Batch:
    """The samples at some positions, pinned for a GPU."""
    arrays = [run.reader.read(positions)]
    if run.recipe.document_mask:
        arrays.append(run.reader.read_segments(positions))
    batch = tuple(map(torch.from_numpy, arrays))
    return tuple(part.pin_memory() for part in batch) if device.type == "cuda" else batch


def train_step(
    engine: "DeepSpeedEngine",
    step: Step,
    batches: Iterator[Batch],
    micro_batch: int,
    world: World,
    clock: PhaseClock,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step; returns this rank's mean loss and the global gradient norm before clipping, on the device.

    Every micro batch has equally many targets, so the mean of their losses is the loss per target token.
    """
    accumulation = step.batch // world.size // micro_batch
    total = torch.zeros((), device=world.device)
    for number in range(accumulation):
        engine.set_gradient_accumulation_boundary(number == accumulation - 1)
        with clock.phase("data"):
            tokens, *segments = (part.to(world.device, non_blocking=True) for part in next(batches))
        with clock.phase("forward"):
            loss = engine(tokens[:, :-1], tokens[:, 1:], *segments)
        with clock.phase("backward"):
            poison = float("nan") if strike("step.backward", step.number) else 1.0
            engine.backward(loss * (poison / accumulation), scale_wrt_gas=False)
        total += loss.detach() / accumulation
    with clock.phase("step"):
        strike("step.before_optimizer", step.number)
        grad_norm = local_grad_norm(engine)
        if grad_norm is None or torch.isfinite(grad_norm):
            engine.step()
        else:
            engine.zero_grad()  # stage 0 in fp32, where DeepSpeed does not look and would apply it
    return total, engine.get_global_grad_norm() if grad_norm is None else grad_norm


def local_grad_norm(engine: "DeepSpeedEngine") -> torch.Tensor | None:
    """The norm where DeepSpeed keeps none: stage 0 in fp32, whose gradients are whole and averaged before the step."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    return torch.nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)


def step_figures(
    run: Run,
    world: World,
    window: Window,
    loss: torch.Tensor,
    grad_norm: torch.Tensor,
    learning_rate: float,
    progress: Progress,
    peak: float,
) -> dict[str, float]:
    """The figures of a logged step, the loss averaged over all ranks. Collective, and the only wait for the device."""
    global_loss = sum_over_ranks(loss.double()).item() / world.size
    tokens_per_second = window.tokens_per_second()
    flops = run.model.flops_per_token(run.recipe.sequence_length) * tokens_per_second
    figures = {
        "Train/Loss": global_loss,
        "Train/LearningRate": learning_rate,
        "Train/GradNorm": float(grad_norm),
        "Speed/TokensPerSecond": tokens_per_second,
        "Speed/MFU": flops / (peak * world.size),
        "Memory/PeakGiB": memory_bytes(world.device) / 2**30,
    }
    figures |= {f"Seconds/{name}": seconds for name, seconds in window.clock.read().items()}
    for source, samples in run.order.counts(progress.position).items():
        figures[f"Tokens/{source}"] = samples * run.recipe.sequence_length
    return figures


def compare_ranks(pace: Pace, figures: dict[str, float], metrics: MetricsLogger | None) -> dict[str, float]:
    """The figures of the ranks' own work; says which rank has become slow. Collective."""
    found, sentences = pace.compare(figures.get("Seconds/data", 0.0))
    if metrics is not None:
        for sentence in sentences:
            metrics.say(sentence)
    return found


def report(metrics: MetricsLogger | None, progress: Progress, figures: dict[str, float]) -> None:
    """Hand the figures of a logged step to the sinks."""
    if metrics is None:
        return
    metrics.log(progress.step, progress.tokens, figures)
    metrics.advance(
        progress.step,
        f"loss {figures['Train/Loss']:.3f}, lr {figures['Train/LearningRate']:.2e},"
        f" {figures['Speed/TokensPerSecond']:,.0f} tok/s, MFU {figures['Speed/MFU']:.0%}",
    )


def report_skip(metrics: MetricsLogger | None, step: Step, progress: Progress, guard: Guard) -> None:
    """Say which samples were trained on in vain."""
    if metrics is None:
        return
    first, last = step.first_position, step.first_position + step.batch - 1
    metrics.log(
        progress.step,
        progress.tokens,
        {"Guard/SkippedSteps": guard.skipped, "Guard/FirstSample": first, "Guard/LastSample": last},
    )
    metrics.say(f"step {progress.step:,}: skipped, its loss or gradient was not finite (samples {first} to {last})")


def save(
    saver: Saver, engine: "DeepSpeedEngine", progress: Progress, metrics: MetricsLogger | None, must_succeed: bool
) -> None:
    """Save, and say how long training stood still for it. Collective.

    A save that fails does not stop training; the last one raises OSError on all ranks, so that a run whose end is lost
    does not count as finished.
    """
    saved = saver.save(engine, progress)
    if saved.failures and must_succeed:
        raise OSError(f"the save at the end of step {progress.step} failed: {'; '.join(saved.failures)}")
    if metrics is None:
        return
    metrics.log(
        progress.step,
        progress.tokens,
        {"Checkpoint/StallSeconds": saved.seconds, "Checkpoint/Failures": saver.failures},
    )
    if saved.failures:
        metrics.say(f"step {progress.step:,}: NOT saved, training goes on: {'; '.join(saved.failures)}")
    else:
        metrics.say(f"step {progress.step:,}: saved {saved.size / 2**30:.2f} GiB in {saved.seconds:.1f} s")


def report_validation(
    engine: "DeepSpeedEngine", run: Run, world: World, progress: Progress, metrics: MetricsLogger | None
) -> None:
    """Validation loss and perplexity of every source. Collective."""
    losses = validation_losses(
        run.validation, engine, sum_over_ranks, world.rank, world.size, run.micro_batch, world.device
    )
    if metrics is None:
        return
    figures = {f"Validation/Loss/{source}": loss for source, loss in losses.items()}
    figures |= {f"Validation/Perplexity/{source}": perplexity(loss) for source, loss in losses.items()}
    metrics.log(progress.step, progress.tokens, figures)
    text = ", ".join(f"{source} {loss:.3f}" for source, loss in losses.items())
    metrics.say(f"step {progress.step:,} ({progress.tokens:,} tokens): validation loss {text}")
