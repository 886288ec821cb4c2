"""The accumulated gradient before the optimizer step: its norm, and how it is dropped."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def gradient_norm(engine: "DeepSpeedEngine") -> torch.Tensor:
    """The global norm before clipping of the gradients that the next `engine.step()` would apply. Collective.

    DeepSpeed computes it inside its step only; these are the functions it calls for that. Not finite, or -1, where a
    gradient is not finite.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

    optimizer = engine.optimizer
    if not engine.zero_optimization():
        return local_gradient_norm(engine)
    if engine.zero_optimization_stage() == 3:
        return combine_grad_norm_groups(optimizer._get_norm_groups())
    if hasattr(optimizer, "scaled_global_norm"):
        return optimizer.scaled_global_norm()
    gradients, _ = optimizer.get_grads_for_norm()  # stage 1 in bf16 that accumulates in fp32
    return get_global_norm_of_tensors(gradients)


def local_gradient_norm(engine: "DeepSpeedEngine") -> torch.Tensor:
    """The same at stage 0, where the gradients of every rank are whole and averaged before the step."""
    return torch.nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None)


def drop_gradients(engine: "DeepSpeedEngine") -> None:
    """Forget what was accumulated since the last step, as DeepSpeed itself does where a norm is not finite."""
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        engine.zero_grad()
    elif engine.zero_optimization_stage() == 3:
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)
    elif hasattr(optimizer, "scaled_global_norm"):
        optimizer.micro_step_id = -1  # as a step sets it
        optimizer.zero_grad(set_to_none=True)
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
    else:
        optimizer.zero_grad()
