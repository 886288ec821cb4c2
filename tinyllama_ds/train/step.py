"""One optimizer step: the gradients of its micro batches, and the step that the guard lets through."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.fault_injection import maybe_inject_fault
from tinyllama_ds.health.guard import AnomalyGuard, StepDecision, StepStatus
from tinyllama_ds.run.metrics import PhaseClock
from tinyllama_ds.train.batches import Batch
from tinyllama_ds.train.engine import drop_gradients, gradient_norm, local_gradient_norm

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def train_step(
    engine: "DeepSpeedEngine",
    step: Step,
    batches: Iterator[Batch],
    micro_batch: int,
    world: DistributedInfo,
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
    world: DistributedInfo,
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
            fault = maybe_inject_fault("step.forward", step.number)
            if fault != 1.0:
                loss = loss * fault
        with clock.phase("backward"):
            fault = maybe_inject_fault("step.backward", step.number)
            engine.backward(loss * (fault * weight), scale_wrt_gas=False)
        total += loss.detach() * weight
    return total


def apply_gradients(engine: "DeepSpeedEngine", step: Step) -> torch.Tensor:
    """The optimizer's step, unless the gradient is not finite; returns the global gradient norm before clipping."""
    maybe_inject_fault("step.before_optimizer", step.number)
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
    guard: AnomalyGuard,
    agree_on: Callable[[torch.Tensor], StepStatus],
    clock: PhaseClock,
) -> tuple[StepStatus, StepDecision]:
    """Let the optimizer make its step if the guard does not mind. Collective; `agree_on` takes the gradient norm."""
    if not guard.checks_before_step:
        with clock.phase("step"):
            grad_norm = apply_gradients(engine, step)
        agreed = agree_on(grad_norm)
        return agreed, guard.check(engine, step.number + 1, samples, agreed)
    with clock.phase("step"):
        agreed = agree_on(gradient_norm(engine))
        verdict = guard.check(engine, step.number + 1, samples, agreed)
        if verdict.is_applied:
            apply_gradients(engine, step)
        else:
            drop_gradients(engine)
    return agreed, verdict
