"""Staging: a rank's fragments of the training state, copied into host memory during the stall of training."""

import mmap
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinyllama_ds.checkpoint.format import Progress, tensor_name
from tinyllama_ds.checkpoint.fragments import fragments_to_save, kinds_of, optimizer_state
from tinyllama_ds.distributed.world import DistributedInfo

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

StagedState = dict[str, dict[str, Tensor]]  # kind -> "kind/parameter[start:stop]" -> values on the host


class HostStateBuffer:
    """Host memory for the state of this rank, kept from save to save; pinned if the state is on a GPU.

    Fresh memory would make every copy several times slower: its pages have to be allocated, and pinned for a GPU.
    """

    def __init__(self, world: DistributedInfo) -> None:
        self._world = world
        self._buffers: dict[str, Tensor] = {}

    def copy_from(self, engine: "DeepSpeedEngine", progress: Progress) -> StagedState:
        """The values of all fragments that this rank saves, valid until the next call. Not collective."""
        staged: StagedState = {}
        for fragment in fragments_to_save(engine, self._world.rank, self._world.size):
            state = optimizer_state(engine, fragment)
            for kind in kinds_of(state):
                key = tensor_name(kind, fragment.name, fragment.start, fragment.stop)
                staged.setdefault(kind, {})[key] = self._copy(key, fragment.values(state, kind))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies from the device are under way
        return staged

    def _copy(self, key: str, values: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = _host_memory_for(values)
        return buffer.copy_(values, non_blocking=True)


def _host_memory_for(tensor: Tensor) -> Tensor:
    """Pinned for a tensor on a GPU, in whole pages: `pin_memory=True` would round its size up to a power of two."""
    from deepspeed.accelerator import get_accelerator

    if not tensor.is_cuda:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    pages = mmap.mmap(-1, tensor.nbytes)
    get_accelerator().register_host_memory(torch.frombuffer(pages, dtype=torch.uint8).data_ptr(), len(pages))
    return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
