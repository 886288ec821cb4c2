"""torch.compile of the decoder, block by block, where the machine can."""

import torch

from tinyllama_ds.distributed.collectives import gather_from_ranks
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.llama import LlamaForCausalLM
from tinyllama_ds.model.mlp import SwiGLU


def compile_blocks(model: LlamaForCausalLM) -> None:
    """Compile each decoder block by itself, one graph for all of them, and what is computed in chunks outside of it:
    long MLPs and the softmax of the loss.

    The unit is the block because ZeRO-3's hooks run between blocks, where a graph would break anyway. It is `forward`,
    and not the module by `compile()`, whose graph would begin before those hooks.
    """
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward)
    for module in model.modules():
        if isinstance(module, SwiGLU):
            module.of_chunk = torch.compile(module.of_chunk)
            module.gradients_of_chunk = torch.compile(module.gradients_of_chunk)
            # A graph would hold the products of all chunks.
            module.in_chunks = torch.compiler.disable(module.in_chunks)  # type: ignore[method-assign]
    model.lm_head.loss_and_grad = torch.compile(model.lm_head.loss_and_grad)
    if model.lm_head.distillation_and_grad is not None:
        model.lm_head.distillation_and_grad = torch.compile(model.lm_head.distillation_and_grad)
    model.is_compiled = True


def decide_compilation(choice: str, world: DistributedInfo) -> tuple[bool, str]:
    """Whether blocks are compiled, the same on every rank, and a description for the log. Collective.

    `auto` is on with GPUs, and off on CPUs, where half a minute of compilation gains 10 %. It is off where a rank
    cannot compile; `on` raises `ConfigError` then.
    """
    if choice == "off":
        return False, "off"
    if choice == "auto" and world.device.type == "cpu":
        return False, "off (on CPUs --compile on is 10 % faster, after half a minute)"
    reasons = gather_from_ranks(compile_unavailable_reason(world.device))
    failures = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    if not failures:
        return True, "on"
    if choice == "on":
        raise ConfigError(f"--compile on: {failures[0]}; install what is missing, or choose --compile off")
    return False, f"off, which is slower ({failures[0]})"


def compile_unavailable_reason(device: torch.device) -> str | None:
    """What PyTorch's compiler lacks here (a C compiler, Python's headers, Triton), found by compiling one line."""
    try:
        torch.compile(lambda x: x.square() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a compiler raises
        return f"torch.compile does not work ({summarize_exception(error)})"
    return None


def summarize_exception(error: Exception) -> str:
    """Type and first line of the exception at the bottom of a chain of causes."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:160]}" if lines else type(cause).__name__
