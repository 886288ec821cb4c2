"""The DeepSpeed engine around the model: process group, device, blocks, wrapping."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from io import StringIO
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tinyllama_ds.config.param_groups import assign_settings, without_param_groups
from tinyllama_ds.config.validation import problems_of
from tinyllama_ds.distributed.collectives import gather_from_ranks
from tinyllama_ds.distributed.world import DistributedInfo, choose_interface
from tinyllama_ds.errors import ConfigError, raise_problems
from tinyllama_ds.hardware.devices import cpu_has_bf16
from tinyllama_ds.model.llama import Block, LlamaForCausalLM
from tinyllama_ds.model.param_groups import Settings, group_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# For runs without a supervisor, which alone notices earlier that a host has vanished. At the start the ranks may wait
# long for rank 0, which verifies and converts checkpoints alone.
_START_TIMEOUT = timedelta(minutes=30)
_STEP_TIMEOUT = timedelta(minutes=10)
_ALL_PARAMETERS = 2**40  # elements: beyond every parameter


def supports_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products have hardware: GPUs since Ampere, CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_bf16()


def start_process_group(world: DistributedInfo, timeout: timedelta = _START_TIMEOUT) -> None:
    """Join the other ranks: NCCL on GPUs, gloo elsewhere. A collective waits for `timeout`, see `expect_steps`."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    choose_interface(world)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's old names
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its own import has set it to warnings
    if world.device.type == "cpu":
        # Else DeepSpeed compiles a shared-memory all-reduce that only inference uses; no option turns it off.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed("gloo", verbose=False, timeout=timeout)
    else:
        torch.cuda.set_device(world.device)
        deepspeed.init_distributed("nccl", verbose=False, timeout=timeout)


def expect_steps(world: DistributedInfo) -> None:
    """From now on a collective waits no longer than a step can take. Collective."""
    gather_from_ranks(None)
    if world.device.type == "cuda":
        torch.cuda.synchronize()  # all that was started with the long timeout has ended
    everyone = dist.group.WORLD
    assert everyone is not None
    everyone.set_timeout(_STEP_TIMEOUT)


def check_with_deepspeed(config: dict, path: str) -> None:
    """Let DeepSpeed's own parser check the config. Raises `ConfigError` with what it rejects."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        raise_problems(path, problems_of(error))
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def wrap(model: LlamaForCausalLM, config: dict, learning_rate_ratio: float) -> "DeepSpeedEngine":
    """The DeepSpeed engine. Under ZeRO-3 a block is a leaf: gathered as a whole, one collective instead of nine.

    Raises `ConfigError` where the config's `param_groups` do not fit the model.
    """
    import deepspeed

    if config["zero_optimization"].get("stage", 0) == 3:
        if "leaf_module" not in config["zero_optimization"]:
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        if dist.get_world_size() == 1:
            config = _without_release(config)
    groups = _group_parameters(model, config["optimizer"])
    config = without_param_groups(config)
    parameters = [{"params": members} for members in groups.values()]
    silent = redirect_stdout(StringIO())
    with warnings.catch_warnings(), silent, _without_dummy_step(config):  # print()s its memory
        warnings.simplefilter("ignore")
        engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    for group, settings in zip(engine.optimizer.param_groups, groups, strict=True):
        _apply_settings(group, settings)
    set_learning_rate(engine, learning_rate_ratio)
    return engine


def _group_parameters(model: LlamaForCausalLM, optimizer: dict) -> dict[Settings, list[torch.nn.Parameter]]:
    """By the JSON's groups, in the order in which DeepSpeed's optimizer will have them."""
    named = dict(model.named_parameters())
    has_muon = optimizer["type"].lower() == "muon"
    return group_parameters(named.items(), model.config.width_multiplier, assign_settings(named, optimizer), has_muon)


def _apply_settings(group: dict, settings: Settings) -> None:
    """To a group that DeepSpeed has filled from the JSON, so that one rule holds for all optimizers, and Muon's two."""
    group["configured_lr"], group["lr_multiplier"] = group["lr"], settings.lr_multiplier
    if settings.weight_decay is not None:
        group["weight_decay"] = settings.weight_decay
    group["weight_decay"] *= settings.weight_decay_multiplier


def _without_release(config: dict) -> dict:
    """ZeRO-3 on one rank: its partition is the whole weight, so releasing it frees nothing.

    But DeepSpeed waits for the GPU whenever it gathers a released weight, before every block. Persistent weights are
    not released. Offloaded weights keep their configuration.
    """
    zero = config["zero_optimization"]
    if zero.get("offload_param", {}).get("device", "none") != "none":
        return config
    return config | {"zero_optimization": zero | {"stage3_param_persistence_threshold": _ALL_PARAMETERS}}


@contextmanager
def _without_dummy_step(config: dict) -> Iterator[None]:
    """At stage 0 in bf16 DeepSpeed steps on zero gradients, to allocate the optimizer's state while it initializes.

    That decays the master weights once and counts as Adam's first step, which makes the real first step a quarter too
    small. Inside, a step has learning rate 0, and leaves no state.
    """
    if config["zero_optimization"].get("stage", 0) or not config.get("bf16", {}).get("enabled"):
        yield
        return
    rates: dict[Optimizer, list[float]] = {}  # Muon steps an Adam inside

    def before(optimizer: Optimizer, *_: object) -> None:
        rates[optimizer] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    def after(optimizer: Optimizer, *_: object) -> None:
        for group, rate in zip(optimizer.param_groups, rates.pop(optimizer), strict=True):
            group["lr"] = rate
        optimizer.state.clear()

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def set_learning_rate(engine: "DeepSpeedEngine", ratio: float) -> float:
    """Multiply every group's configured learning rate; returns the first one, before its multiplier, for the logs."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["configured_lr"] * ratio * group["lr_multiplier"]
    first = engine.optimizer.param_groups[0]
    return first["lr"] / first["lr_multiplier"]


def hard_exit(code: int) -> NoReturn:
    """End this process. Everything is written by now; the interpreter's own end can abort in gloo's threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather_full_params(engine: "DeepSpeedEngine") -> dict[str, torch.Tensor]:
    """Every parameter on this rank's device: copies where it is partitioned, else the model's own. Collective.

    Raises torch.OutOfMemoryError on the ranks that have no room for the copies, after the last collective.
    """
    from deepspeed.runtime.zero import GatheredParameters

    weights: dict[str, torch.Tensor] = {}
    failure = None
    for name, parameter in engine.module.named_parameters():
        is_partitioned = parameter.numel() == 0  # under ZeRO-3, but for small ones
        with GatheredParameters([parameter], enabled=is_partitioned):
            try:
                weights[name] = parameter.detach().clone() if is_partitioned else parameter.detach()
            except torch.OutOfMemoryError as error:
                failure = error
                weights.clear()
    if failure is not None:
        raise failure
    return weights
