"""The training loop: one optimizer step after another, measured, validated and saved as the plan says."""

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.data.loader import prefetch
from tinyllama_ds.data.tokenizer import Tokenizer
from tinyllama_ds.errors import Refusal
from tinyllama_ds.evaluation.harness import EvaluationFailed
from tinyllama_ds.evaluation.samples import continue_greedily
from tinyllama_ds.evaluation.validation import perplexity, validation_losses
from tinyllama_ds.plan import Step
from tinyllama_ds.training.batches import Batch, count_targets, micro_batches
from tinyllama_ds.training.checkpoint import Health, Progress
from tinyllama_ds.training.engine import (
    drop_gradients,
    gradient_norm,
    local_gradient_norm,
    set_learning_rate,
    sum_over_ranks,
)
from tinyllama_ds.training.faults import strike
from tinyllama_ds.training.guard import (
    Agreement,
    DigestedBatches,
    Guard,
    Verdict,
    agree,
    check_parameters,
    extend_chain,
)
from tinyllama_ds.training.heartbeat import Heartbeat
from tinyllama_ds.training.ledger import SKIPPED, Entry, record
from tinyllama_ds.training.metrics import MetricsLogger, PhaseClock, memory_bytes, peak_flops
from tinyllama_ds.training.pace import Pace
from tinyllama_ds.training.probe import take_probe
from tinyllama_ds.training.run import Run
from tinyllama_ds.training.saving import Save, Saver
from tinyllama_ds.training.scoring import score_on_tasks
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
    paused: float = 0.0  # seconds spent on validation, saving and scoring

    def restart(self) -> None:
        self.tokens, self.started, self.paused = 0, perf_counter(), 0.0

    def tokens_per_second(self) -> float:
        return self.tokens / (perf_counter() - self.started - self.paused)


def train(
    engine: "DeepSpeedEngine",
    run: Run,
    world: World,
    start: Progress,
    guard: Guard,
    metrics: MetricsLogger | None,
    stop: StopRequest,
    heartbeat: Heartbeat,
    saver: Saver,
) -> Progress:
    """Train from `start` to the end of the plan, or to a stop that any rank was asked for; the end is saved.

    Collective; `metrics` is rank 0's alone. Raises `BadNumbers` and `Rollback` on all ranks, a save under way or not.
    """
    window = Window(PhaseClock(world.device))
    peak, _ = peak_flops(world.device, next(engine.module.parameters()).dtype)
    batches = DigestedBatches(prefetch(micro_batches(run, world, start.step), _PREFETCHED_MICRO_BATCHES))
    progress, final = start, run.plan.total_steps
    pace = Pace(engine.module.model.layers, world)
    if run.validation and start.step == (run.parent.step if run.parent else 0):
        report_validation(engine, run, world, start, metrics)  # where the curves begin: at 0 about ln(vocabulary)
    take_over_garbage_collection()
    window.restart()
    for step in run.plan.steps(start.step):
        strike("step.begin", step.number)
        is_logged = (step.number + 1) % run.recipe.intervals.log_steps == 0 or step.number + 1 == final
        learning_rate = set_learning_rate(engine, run.schedule.ratio(step.tokens_after))
        targets = count_targets(run, step)
        loss = accumulate_gradients(engine, step, batches, run.micro_batch, targets, world, window.clock)
        agree_on = partial(agree, stop.is_wanted(), saver.is_due(), saver.is_busy(), batches.take(), loss)
        samples = run.order.span(step.first_position, step.batch)
        agreed, verdict = take_step(engine, step, samples, guard, agree_on, window.clock)
        chain = extend_chain(progress.chain, step.number, agreed.digest)
        progress = Progress(step.number + 1, step.first_position + step.batch, step.tokens_after, chain)
        if verdict.reason:
            report_verdict(run, metrics, progress, samples, verdict, guard)
        window.tokens += step.tokens_after - step.tokens_before
        if is_logged:
            figures = step_figures(run, world, window, agreed, learning_rate, progress, peak)
            report(metrics, progress, figures | compare_ranks(pace, figures, metrics))
            window.restart()
        paused_at = perf_counter()
        is_last = progress.step == final or agreed.stop
        look_at_model(engine, run, world, step, progress, heartbeat, metrics)
        saver.advance(agreed.busy)
        is_save_due = is_last or agreed.save or is_save_planned(run, step)
        if is_save_due:
            heartbeat.beat(progress.step, "saving")
        save_or_check(engine, run, world, progress, guard, saver, is_save_due, is_last)
        if run.tasks and not agreed.stop and is_scoring_planned(run, step):
            saver.finish()  # scoring may take long
            report_scores(engine, run, world, progress, stop, heartbeat, metrics)
        if progress.step % _COLLECT_STEPS == 0:
            gc.collect()
        window.paused += perf_counter() - paused_at
        heartbeat.beat(progress.step, "training")
        if is_last:
            break
    return progress


def look_at_model(
    engine: "DeepSpeedEngine",
    run: Run,
    world: World,
    step: Step,
    progress: Progress,
    heartbeat: Heartbeat,
    metrics: MetricsLogger | None,
) -> None:
    """Validate and sample where that is due after a step. Collective."""
    is_final = progress.step == run.plan.total_steps
    if run.validation and (is_final or step.crosses(run.recipe.intervals.evaluate_tokens)):
        heartbeat.beat(progress.step, "validating")
        report_validation(engine, run, world, progress, metrics)
    if run.prompts and (is_final or step.crosses(run.recipe.samples.every_tokens)):
        heartbeat.beat(progress.step, "sampling")
        report_samples(engine, run, world, progress, metrics)


def is_save_planned(run: Run, step: Step) -> bool:
    """Whether the recipe wants a checkpoint after a step: by tokens, or at a stage's end, where variants branch off."""
    return step.crosses(run.recipe.intervals.save_tokens) or step.number + 1 in run.plan.stage_ends


def is_scoring_planned(run: Run, step: Step) -> bool:
    """Whether the recipe wants scores on its tasks after a step: by tokens, and at the end."""
    return step.crosses(run.recipe.evaluation.every_tokens) or step.number + 1 == run.plan.total_steps


def save_or_check(
    engine: "DeepSpeedEngine",
    run: Run,
    world: World,
    progress: Progress,
    guard: Guard,
    saver: Saver,
    is_due: bool,
    is_last: bool,
) -> None:
    """Begin a save where one is due, and wait for the last; else look at the weights now and then. Collective."""
    if is_due:
        saver.save(engine, progress, partial(take_health, engine, run, world, guard))
        if is_last:
            saver.finish_for_good()
    elif progress.step % run.recipe.intervals.check_steps == 0:
        check_parameters(engine)


def take_over_garbage_collection() -> None:
    """Python no longer collects when it likes: a rank that stops to collect stops all, so all do it together."""
    gc.collect()
    gc.freeze()  # what is alive now stays until the end
    gc.disable()


def train_step(
    engine: "DeepSpeedEngine",
    step: Step,
    batches: Iterator[Batch],
    micro_batch: int,
    world: World,
    clock: PhaseClock,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step; returns this rank's part of the loss and the global gradient norm before clipping, on the
    device. All labels are targets.
    """
    targets = step.tokens_after - step.tokens_before
    loss = accumulate_gradients(engine, step, batches, micro_batch, targets, world, clock)
    with clock.phase("step"):
        return loss, apply_gradients(engine, step)


def accumulate_gradients(
    engine: "DeepSpeedEngine",
    step: Step,
    batches: Iterator[Batch],
    micro_batch: int,
    targets: int,
    world: World,
    clock: PhaseClock,
) -> torch.Tensor:
    """Forward and backward of all micro batches of a step; returns this rank's part of the loss, on the device.

    A micro batch's mean loss weighs as many of the global batch's `targets` as it has, times the ranks, over which
    gradients and losses are averaged: so their mean is the sum of all token losses / targets, however unequal the
    shares are. Where all are equal the weight is 1 / accumulation.
    """
    accumulation = step.batch // world.size // micro_batch
    total = torch.zeros((), device=world.device)
    for number in range(accumulation):
        engine.set_gradient_accumulation_boundary(number == accumulation - 1)
        with clock.phase("data"):
            batch = next(batches)
            inputs = batch.model_inputs(world.device)
        weight = batch.num_targets * world.size / targets
        with clock.phase("forward"):
            loss = engine(*inputs)
            fault = strike("step.forward", step.number)
            if fault != 1.0:
                loss = loss * fault
        with clock.phase("backward"):
            fault = strike("step.backward", step.number)
            engine.backward(loss * (fault * weight), scale_wrt_gas=False)
        total += loss.detach() * weight
    return total


def apply_gradients(engine: "DeepSpeedEngine", step: Step) -> torch.Tensor:
    """The optimizer's step, unless the gradient is not finite; returns the global gradient norm before clipping."""
    strike("step.before_optimizer", step.number)
    if engine.zero_optimization() or engine.bfloat16_enabled():
        engine.step()
        return engine.get_global_grad_norm()
    grad_norm = local_gradient_norm(engine)  # stage 0 in fp32, where DeepSpeed keeps none and looks at none
    if torch.isfinite(grad_norm):
        engine.step()
    else:
        drop_gradients(engine)
    return grad_norm


def take_step(
    engine: "DeepSpeedEngine",
    step: Step,
    samples: range,
    guard: Guard,
    agree_on: Callable[[torch.Tensor], Agreement],
    clock: PhaseClock,
) -> tuple[Agreement, Verdict]:
    """Let the optimizer make its step if the guard does not mind. Collective; `agree_on` takes the gradient norm."""
    if not guard.decides_first:
        with clock.phase("step"):
            grad_norm = apply_gradients(engine, step)
        agreed = agree_on(grad_norm)
        return agreed, guard.judge(engine, step.number + 1, samples, agreed)
    with clock.phase("step"):
        agreed = agree_on(gradient_norm(engine))
        verdict = guard.judge(engine, step.number + 1, samples, agreed)
        if verdict.is_applied:
            apply_gradients(engine, step)
        else:
            drop_gradients(engine)
    return agreed, verdict


def step_figures(
    run: Run,
    world: World,
    window: Window,
    agreed: Agreement,
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


def report_verdict(
    run: Run, metrics: MetricsLogger | None, progress: Progress, samples: range, verdict: Verdict, guard: Guard
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
    metrics.say(f"step {progress.step:,}: {skipped}{verdict.reason} (samples {samples[0]} to {samples[-1]})")


def take_health(engine: "DeepSpeedEngine", run: Run, world: World, guard: Guard) -> Health:
    """What a checkpoint remembers of the numbers that led to it. Collective. Raises `BadNumbers` on all ranks."""
    left_out = [[gap[0], gap[-1]] for gap in run.order.left_out]
    return Health(guard.state(), left_out, take_probe(engine, run, world))


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
        metrics.say(f"step {progress.step:,}: NOT saved{again}, training goes on: {'; '.join(save.failures)}")
    else:
        metrics.say(
            f"step {progress.step:,}: saved {save.size / 2**30:.2f} GiB in {save.seconds:.1f} s,"
            f" {save.stall:.2f} s of which training stood still"
        )


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


def report_samples(
    engine: "DeepSpeedEngine", run: Run, world: World, progress: Progress, metrics: MetricsLogger | None
) -> None:
    """What the model makes of the recipe's prompts now. Collective. Draws no random number, and compiles nothing."""
    samples = run.recipe.samples
    with torch.compiler.set_stance("force_eager"):  # a new shape would be compiled, and change what training runs
        continued = continue_greedily(engine, run.prompts, samples.new_tokens, world.device)
    if metrics is None:
        return
    decode = Tokenizer(run.tokenizer).decode
    texts = [(prompt, decode(ids)) for prompt, ids in zip(samples.prompts, continued, strict=True)]
    metrics.log_samples(progress.step, progress.tokens, texts)


def report_scores(
    engine: "DeepSpeedEngine",
    run: Run,
    world: World,
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
        scores = score_on_tasks(engine, run, world, stop.is_wanted, beat)
    except (Refusal, EvaluationFailed) as failure:
        if metrics is not None:
            metrics.say(f"{place}: NOT scored on tasks, training goes on: {failure}")
        return
    if metrics is None:
        return
    metrics.log_scores(progress.step, progress.tokens, scores)
    text = ", ".join(f"{score.task} {score.metric} {score.value:.4f}" for score in scores)
    metrics.say(f"{place}: scored in {perf_counter() - started:.1f} s: {text}")
