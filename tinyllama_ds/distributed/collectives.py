"""Collectives of small values, which all ranks call in the same order."""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import ConfigError

_POLL_SECONDS = 0.1  # between two polls


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """All-reduce in place; returns its argument."""
    dist.all_reduce(values)
    return values


def gather_from_ranks(value: Any) -> list[Any]:
    """A JSON value of every rank, by rank, on every rank. JSON, because what a peer sends must not run code."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(text)], device=device))
    longest = int(max(lengths))
    padded = torch.nn.functional.pad(text, (0, longest - len(text)))
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded)
    return [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)]


def broadcast_from_rank0(find: Callable[[], Any], world: DistributedInfo) -> Any:
    """A JSON value that rank 0 finds, on every rank; a `ConfigError` of its is raised on all. Collective."""
    answer: dict[str, Any] = {}
    if world.is_rank0:
        try:
            answer = {"found": find()}
        except ConfigError as error:
            answer = {"error": str(error)}
    answer = gather_from_ranks(answer)[0]
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer["found"]


def broadcast_state_dict(
    weights: dict[str, torch.Tensor], shapes: dict[str, torch.Size], dtype: torch.dtype, world: DistributedInfo
) -> dict[str, torch.Tensor]:
    """A model's weights in one dtype, which rank 0 has and the others get, on their devices. Collective."""
    received = {}
    for name, shape in shapes.items():
        tensor = weights[name] if world.is_rank0 else torch.empty(shape, dtype=dtype)
        received[name] = tensor.to(world.device)
        dist.broadcast(received[name], src=0)
    return received


def barrier_with_callback(device: torch.device, meanwhile: Callable[[], None]) -> None:
    """Wait for all ranks, and call something repeatedly meanwhile. Collective."""
    arrived = dist.all_reduce(torch.zeros(1, device=device), async_op=True)
    while not arrived.is_completed():
        meanwhile()
        time.sleep(_POLL_SECONDS)
    arrived.wait()
