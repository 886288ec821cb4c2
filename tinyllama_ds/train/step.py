"""One optimizer step: the gradients of its micro-batches, then the optimizer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.config.run_plan import Step, accumulation_steps
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.train.batches import Batch
from tinyllama_ds.train.gradients import drop_gradients, local_gradient_norm
from tinyllama_ds.train.phase_clock import PhaseClock

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
    """One optimizer step on batches in which all labels are targets.

    Returns this rank's part of the losses and the global gradient norm before clipping, on the device.
    """
    accumulation = accumulation_steps(step.batch, world.data_size, micro_batch)
    targets = step.tokens_after - step.tokens_before
    loss = accumulate_gradients(engine, batches, accumulation, targets, world, clock)
    with clock.phase("step"):
        return loss, apply_gradients(engine)


def accumulate_gradients(
    engine: "DeepSpeedEngine",
    batches: Iterator[Batch],
    accumulation: int,
    targets: int,
    world: DistributedInfo,
    clock: PhaseClock,
) -> torch.Tensor:
    """Forward and backward of all micro-batches of a step; returns this rank's part of the loss, on the device; of a
    student's training, of [cross-entropy, divergence from the teacher].

    `targets` is the number of labels in the global batch. The mean loss of a micro-batch is weighted by its share of
    them times the ranks, because gradients and losses are averaged over ranks: so their mean is the sum of all token
    losses / targets, however unequal the shares are. Where all are equal the weight is 1 / accumulation. So it is
    with ranks that share sequences: each has targets of its own, perhaps none.
    """
    total = torch.zeros((), device=world.device)
    for number in range(accumulation):
        engine.set_gradient_accumulation_boundary(number == accumulation - 1)
        with clock.phase("data"):
            batch = next(batches)
            inputs = batch.model_inputs(world.device)
        weight = batch.num_targets * world.size / targets
        with clock.phase("forward"):
            loss, parts = forward(engine, inputs)
        with clock.phase("backward"):
            backward(engine, loss * weight)
        total = total + parts * weight
    return total


def forward(engine: "DeepSpeedEngine", inputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of a micro-batch, and what is reported of it: the loss, or of a student its parts."""
    found = engine(*inputs)
    return found if isinstance(found, tuple) else (found, found.detach())


def backward(engine: "DeepSpeedEngine", loss: torch.Tensor) -> None:
    """Add the gradient of a weighted loss to what was accumulated."""
    engine.backward(loss, scale_wrt_gas=False)


def apply_gradients(engine: "DeepSpeedEngine") -> torch.Tensor:
    """Step the optimizer, unless the gradient is not finite; returns the global gradient norm before clipping."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        engine.step()
        return engine.get_global_grad_norm()
    grad_norm = local_gradient_norm(engine)  # stage 0 in fp32, where DeepSpeed neither computes nor checks it
    if torch.isfinite(grad_norm):
        engine.step()
    else:
        drop_gradients(engine)
    return grad_norm
