"""The accumulated gradient before the optimizer step: its norm, and how it is dropped.

DeepSpeed does both inside its step only, so these functions call what its step calls: the norm is its own to the last
bit, where one of the gradients of its public API (`safe_get_local_grad`) would differ by 1e-7.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def gradient_norm(engine: "DeepSpeedEngine") -> torch.Tensor:
    """The global norm before clipping of the gradient that the next `engine.step()` would apply. Collective.

    Not finite, or -1, where a gradient is not finite.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

    optimizer = engine.optimizer
    if not engine.zero_optimization():
        return local_gradient_norm(engine)
    if engine.zero_optimization_stage() == 3:
        groups = enumerate(optimizer.fp16_groups)
        if optimizer.offload_optimizer:
            norms = [optimizer.complete_grad_norm_calculation_for_cpu_offload(group) for _, group in groups]
        else:
            norms = [optimizer.get_grad_norm_direct(optimizer.averaged_gradients[i], group) for i, group in groups]
        return combine_grad_norm_groups(norms)
    if hasattr(optimizer, "scaled_global_norm"):
        return optimizer.scaled_global_norm()
    gradients, _ = optimizer.get_grads_for_norm()  # stage 1 in bf16 that accumulates in fp32
    return get_global_norm_of_tensors(gradients)


def local_gradient_norm(engine: "DeepSpeedEngine") -> torch.Tensor:
    """The same at stage 0, where every rank has whole gradients, averaged before the step."""
    return torch.nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)


def drop_gradients(engine: "DeepSpeedEngine") -> None:
    """Drop what was accumulated since the last step, as DeepSpeed does where a norm is not finite."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        engine.zero_grad()
        return
    optimizer.zero_grad()
    if engine.zero_optimization_stage() == 3:
        optimizer.parameter_offload.partition_all_parameters()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
        else:
            optimizer.averaged_gradients = {}
    elif hasattr(optimizer, "scaled_global_norm"):
        optimizer.micro_step_id = -1  # as a step sets it
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
