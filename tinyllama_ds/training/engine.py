"""The DeepSpeed engine around the model: process group, device, blocks, wrapping."""

import json
import os
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.llama import Block, LlamaForCausalLM

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class World:
    """This process among all others."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """Rank, local rank and world size as the deepspeed launcher and torchrun set them; alone without a launcher."""
    rank, local_rank, size = (int(os.environ.get(name, default)) for name, default in _RANK_VARIABLES)
    if torch.cuda.is_available():
        return World(rank, local_rank, size, torch.device("cuda", local_rank))
    return World(rank, local_rank, size, torch.device("cpu"))


_RANK_VARIABLES = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))


def supports_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products have hardware: GPUs since Ampere, CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def start_process_group(world: World) -> None:
    """Join the other ranks: NCCL on GPUs, gloo elsewhere."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's old names
    import deepspeed

    if world.device.type == "cpu":
        # Without a list of ops DeepSpeed compiles a shared-memory all-reduce that only inference uses.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed("gloo", verbose=False)
    else:
        torch.cuda.set_device(world.device)
        deepspeed.init_distributed("nccl", verbose=False, timeout=timedelta(minutes=30))


def check_with_deepspeed(config: dict, path: str) -> None:
    """Let DeepSpeed's own parser see the config; its complaints become one sentence."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise Refusal(f"{path}: {place}: {first['msg']}") from error
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        raise Refusal(f"{path}: {error}") from error


def wrap(model: LlamaForCausalLM, config: dict, learning_rate_ratio: float) -> "DeepSpeedEngine":
    """The DeepSpeed engine. Under ZeRO-3 a block is a leaf: gathered as a whole, one collective instead of nine."""
    import deepspeed

    if config["zero_optimization"].get("stage", 0) == 3 and "leaf_module" not in config["zero_optimization"]:
        deepspeed.utils.set_z3_leaf_modules(model, [Block])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    _undo_dummy_step(engine)
    for group in engine.optimizer.param_groups:
        group["configured_lr"] = group["lr"]
    set_learning_rate(engine, learning_rate_ratio)
    return engine


def _undo_dummy_step(engine: "DeepSpeedEngine") -> None:
    """Stage 0 in bf16: DeepSpeed steps on zero gradients to allocate the optimizer's state.

    That decays the masters once and counts as Adam's first step, which makes the real first step a quarter too small.
    """
    if engine.zero_optimization() or not engine.bfloat16_enabled():
        return
    wrapper = engine.optimizer
    wrapper.optimizer.state.clear()
    is_flat = hasattr(wrapper, "fp32_groups_flat")
    for number, weights in enumerate(wrapper.fp16_groups):
        masters = [wrapper.fp32_groups_flat[number]] if is_flat else wrapper.fp32_groups[number]
        values = [torch.cat([weight.detach().flatten() for weight in weights])] if is_flat else weights
        for master, value in zip(masters, values, strict=True):
            master.data.copy_(value)


def set_learning_rate(engine: "DeepSpeedEngine", ratio: float) -> float:
    """Multiply every group's configured learning rate; returns the first group's, which is what gets logged."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["configured_lr"] * ratio
    return engine.optimizer.param_groups[0]["lr"]


def leave(code: int) -> NoReturn:
    """End this process. Everything is written by now; the interpreter's own end can abort in gloo's threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """All-reduce in place; returns its argument."""
    dist.all_reduce(values)
    return values


def gather_from_ranks(value: Any) -> list[Any]:
    """A JSON value of every rank, by rank, on every rank. JSON, because what a peer sends is never unpickled."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(text)], device=device))
    longest = int(max(lengths))
    padded = torch.nn.functional.pad(text, (0, longest - len(text)))
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]
