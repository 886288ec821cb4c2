"""The training loop: one optimizer step after another, measured, validated and saved as the plan says."""

import gc
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

from tinyllama_ds.checkpoint.format import Health, Progress
from tinyllama_ds.checkpoint.save import Saver
from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.data.loader import prefetch
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.fault_injection import maybe_inject_fault
from tinyllama_ds.health.guard import AnomalyGuard, all_reduce_step_status, check_parameters, extend_chain
from tinyllama_ds.health.heartbeat import Heartbeat
from tinyllama_ds.health.probe import take_probe
from tinyllama_ds.health.stragglers import StragglerDetector
from tinyllama_ds.run.metrics import MetricsLogger, PhaseClock, peak_flops
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.train.batches import HashingLoader, count_targets, micro_batches
from tinyllama_ds.train.engine import set_learning_rate
from tinyllama_ds.train.reports import (
    Window,
    compare_ranks,
    report,
    report_samples,
    report_scores,
    report_validation,
    report_verdict,
    step_figures,
)
from tinyllama_ds.train.step import accumulate_gradients, take_step
from tinyllama_ds.train.stop import StopRequest

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_PREFETCHED_MICRO_BATCHES = 4
_COLLECT_STEPS = 100  # all ranks collect garbage at the same steps


def train(
    engine: "DeepSpeedEngine",
    run: Run,
    world: DistributedInfo,
    start: Progress,
    guard: AnomalyGuard,
    metrics: MetricsLogger | None,
    stop: StopRequest,
    heartbeat: Heartbeat,
    saver: Saver,
) -> Progress:
    """Train from `start` to the end of the plan, or to a stop that any rank was asked for; the end is saved.

    Collective; `metrics` is rank 0's alone. Raises `NumericsError` and `Rollback` on all ranks, a save under way or
    not.
    """
    window = Window(PhaseClock(world.device))
    peak, _ = peak_flops(world.device, next(engine.module.parameters()).dtype, world.size)
    batches = HashingLoader(prefetch(micro_batches(run, world, start.step), _PREFETCHED_MICRO_BATCHES))
    progress, final = start, run.plan.total_steps
    stragglers = StragglerDetector(engine.module.model.layers, world)
    if run.validation and start.step == (run.parent.step if run.parent else 0):
        report_validation(engine, run, world, start, metrics)  # where the curves begin: at 0 about ln(vocabulary)
    disable_automatic_gc()
    window.restart()
    for step in run.plan.steps(start.step):
        maybe_inject_fault("step.begin", step.number)
        is_logged = (step.number + 1) % run.recipe.intervals.log_steps == 0 or step.number + 1 == final
        learning_rate = set_learning_rate(engine, run.schedule.ratio(step.tokens_after))
        targets = count_targets(run, step)
        loss = accumulate_gradients(engine, step, batches, run.micro_batch, targets, world, window.clock)
        agree_on = partial(
            all_reduce_step_status, stop.is_requested(), saver.is_due(), saver.is_busy(), batches.take(), loss
        )
        samples = run.order.span(step.first_position, step.batch)
        agreed, verdict = take_step(engine, step, samples, guard, agree_on, window.clock)
        chain = extend_chain(progress.chain, step.number, agreed.digest)
        progress = Progress(step.number + 1, step.first_position + step.batch, step.tokens_after, chain)
        if verdict.reason:
            report_verdict(run, metrics, progress, samples, verdict, guard)
        window.tokens += step.tokens_after - step.tokens_before
        if is_logged:
            figures = step_figures(run, world, window, agreed, learning_rate, progress, peak)
            report(metrics, progress, figures | compare_ranks(stragglers, figures, metrics))
            window.restart()
        paused_at = perf_counter()
        is_last = progress.step == final or agreed.stop
        evaluate_and_sample(engine, run, world, step, progress, heartbeat, metrics)
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


def evaluate_and_sample(
    engine: "DeepSpeedEngine",
    run: Run,
    world: DistributedInfo,
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
    world: DistributedInfo,
    progress: Progress,
    guard: AnomalyGuard,
    saver: Saver,
    is_due: bool,
    is_last: bool,
) -> None:
    """Begin a save where one is due, and wait for the last; else look at the weights now and then. Collective."""
    if is_due:
        check_parameters(engine)
        saver.save(engine, progress, partial(take_health, engine, run, world, guard))
        if is_last:
            saver.finish_or_raise()
    elif progress.step % run.recipe.intervals.check_steps == 0:
        check_parameters(engine)


def disable_automatic_gc() -> None:
    """Python no longer collects when it likes: a rank that stops to collect stops all, so all do it together."""
    gc.collect()
    gc.freeze()  # what is alive now stays until the end
    gc.disable()


def take_health(engine: "DeepSpeedEngine", run: Run, world: DistributedInfo, guard: AnomalyGuard) -> Health:
    """What a checkpoint remembers of the numbers that led to it. Collective. Raises `NumericsError` on all ranks."""
    left_out = [[gap[0], gap[-1]] for gap in run.order.excluded_samples]
    return Health(guard.state(), left_out, take_probe(engine, run, world))
