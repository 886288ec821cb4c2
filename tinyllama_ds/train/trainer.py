"""The training loop: forward, backward, all-reduce of the step's status, decision of the guard, optimizer step.

Everything else that happens around a step is a callback: `callbacks/registry.py` lists them in execution order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from tinyllama_ds.checkpoint.format import Health, Progress
from tinyllama_ds.checkpoint.retention import Retention
from tinyllama_ds.checkpoint.save import Save, Saver, SaveSettings
from tinyllama_ds.config.run_plan import Step, accumulation_steps
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.health.guard import AnomalyGuard, StepDecision, StepStatus, all_reduce_step_status, extend_chain
from tinyllama_ds.health.heartbeat import Heartbeat
from tinyllama_ds.run.console import Console
from tinyllama_ds.run.metrics import NoMetrics
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.train.batches import HashingLoader, count_targets, open_loader
from tinyllama_ds.train.engine import set_learning_rate
from tinyllama_ds.train.gradients import drop_gradients, gradient_norm
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import accumulate_gradients, apply_gradients
from tinyllama_ds.train.stop import StopRequest

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class StepResult:
    """A step of the plan after it was made, the same on all ranks."""

    step: Step
    progress: Progress  # after it
    samples: range
    learning_rate: float
    status: StepStatus
    decision: StepDecision
    is_final: bool  # the plan is complete
    is_logged: bool
    is_save_due: bool
    metrics: dict[str, float] = field(default_factory=dict)  # of a logged step, to which callbacks add

    @property
    def is_last(self) -> bool:
        """Whether training ends here, because the plan is complete or a stop was requested."""
        return self.is_final or self.status.stop

    def is_due(self, every_tokens: int) -> bool:
        """Whether something that happens by tokens, and at the end of the plan, happens after this step."""
        return self.is_final or self.step.crosses(every_tokens)


class Callback:
    """Something that happens around a step, on all ranks; hooks of different callbacks run in the registered order."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer

    def at_start(self) -> None:
        """Before the first step."""

    def before_step(self, step: Step) -> None:
        """Before the forward of a step."""

    def after_step(self, result: StepResult) -> None:
        """After the optimizer step."""

    def after_save(self, save: Save) -> None:
        """After a checkpoint was committed, or its save has failed."""


class Outputs(NamedTuple):
    """Where rank 0 logs; those of the other ranks do nothing."""

    metrics: NoMetrics
    console: Console


class Trainer:
    """A run at work on this rank. Its methods are collective."""

    def __init__(
        self,
        engine: "DeepSpeedEngine",
        run: Run,
        world: DistributedInfo,
        start: tuple[Progress, Health],
        outputs: Outputs,
        heartbeat: Heartbeat,
    ) -> None:
        """`start` is in the manifest of the checkpoint that the engine was loaded from."""
        self.engine, self.run, self.world = engine, run, world
        self.metrics, self.console = outputs
        self.heartbeat = heartbeat
        self.start, health = start
        self.progress = self.start
        # By the ledger that all ranks have agreed on: rank 0 writes that of a branch at this moment.
        self.guard = AnomalyGuard(run.recipe.guard, health.guard, run.rollbacks)
        self.saver = Saver(save_settings(run), world, on_end=self._after_save)
        self.stop = StopRequest(run.run_dir)
        self.clock = PhaseClock(world.device)
        self.callbacks: list[Callback] = []  # set by the caller: callbacks know the trainer, and not the reverse

    def train(self) -> Progress:
        """Train to the end of the plan, or to a stop that any rank was asked for; the end is saved.

        Raises `NumericsError` and `Rollback` on all ranks, also while a save is pending.
        """
        self.stop.listen()
        batches = open_loader(self.run, self.world, self.start.step)
        for callback in self.callbacks:
            callback.at_start()
        for step in self.run.plan.steps(self.start.step):
            for callback in self.callbacks:
                callback.before_step(step)
            result = self.train_step(step, batches)
            for callback in self.callbacks:
                callback.after_step(result)
            if result.is_last:
                break
        return self.progress

    def train_step(self, step: Step, batches: HashingLoader) -> StepResult:
        """Forward and backward of all micro-batches, the status of all ranks, and the optimizer step if it is good."""
        samples = self.run.data.order.span(step.first_position, step.batch)
        learning_rate = set_learning_rate(self.engine, self.run.schedule.ratio(step.tokens_after))
        accumulation = accumulation_steps(step.batch, self.world.data_size, self.run.micro_batch)
        targets = count_targets(self.run, step)
        loss = accumulate_gradients(self.engine, batches, accumulation, targets, self.world, self.clock)
        reduce_status = partial(
            all_reduce_step_status,
            self.stop.is_requested(), self.saver.is_due(), self.saver.is_busy(), batches.take_digest(), loss,
        )  # fmt: skip
        status, decision = self._step_optimizer(step, samples, reduce_status)
        chain = extend_chain(self.progress.chain, step.number, status.digest)
        self.progress = Progress(step.number + 1, step.first_position + step.batch, step.tokens_after, chain)
        is_final = self.progress.step == self.run.plan.total_steps
        return StepResult(
            step, self.progress, samples, learning_rate, status, decision, is_final,
            is_logged=is_final or self.progress.step % self.run.recipe.intervals.log_steps == 0,
            is_save_due=is_final or status.stop or status.save or is_save_planned(self.run, step),
        )  # fmt: skip

    def _step_optimizer(
        self, step: Step, samples: range, reduce_status: Callable[[torch.Tensor], StepStatus]
    ) -> tuple[StepStatus, StepDecision]:
        """Step the optimizer unless the guard vetoes it; `reduce_status` takes the gradient norm."""
        check = partial(self.guard.check, self.engine, step.number + 1, samples)
        if not self.guard.checks_before_step:
            with self.clock.phase("step"):
                grad_norm = apply_gradients(self.engine)
            status = reduce_status(grad_norm)
            return status, check(status)
        with self.clock.phase("step"):
            status = reduce_status(gradient_norm(self.engine))
            decision = check(status)
            if decision.is_applied:
                apply_gradients(self.engine)
            else:
                drop_gradients(self.engine)
        return status, decision

    def _after_save(self, save: Save) -> None:
        for callback in self.callbacks:
            callback.after_save(save)


def is_save_planned(run: Run, step: Step) -> bool:
    """Whether a checkpoint is planned after a step: by tokens, or at a stage's end, where variants branch off."""
    return step.crosses(run.recipe.intervals.save_tokens) or step.number + 1 in run.plan.stage_ends


def save_settings(run: Run) -> SaveSettings:
    """The recipe's settings for checkpoints. The last one of every stage is kept, for variants to branch off."""
    intervals = run.recipe.intervals
    retention = Retention(intervals.keep_last, intervals.keep_tokens, run.plan.stage_ends)
    return SaveSettings(run.run_dir, retention, 60 * intervals.save_minutes, run.model, run.description)
