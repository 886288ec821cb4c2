"""The quick copy: what DeepSpeed would write for a rank, taken into host memory while training stands still."""

import copy
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class HostStateBuffer:
    """Host memory for one state of this rank, kept from save to save; pinned where the state lies on a GPU.

    Fresh memory would make every copy several times slower: its pages have to be made, and pinned beside a GPU.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, engine: "DeepSpeedEngine", folder: Path) -> tuple[dict[str, Any], str | None]:
        """Collective. (state by the name of the file that it belongs into, what went wrong on this rank).

        Never raises for the copy: an exception inside DeepSpeed's save would leave the other ranks in a barrier.
        The states are valid until the next call.
        """
        states: dict[str, Any] = {}
        failures: list[str] = []

        def take_one(state_dict: dict, path: str) -> None:
            try:
                states[Path(path).name] = self._copy(state_dict, Path(path))
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}")

        original = engine.checkpoint_engine.save
        engine.checkpoint_engine.save = take_one
        engine._copy_recovery_script = lambda _: None  # scripts nobody needs, written where an error would hang a rank
        try:
            engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        finally:
            engine.checkpoint_engine.save = original
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies from the device are under way
        return states, failures[0] if failures else None

    def _copy(self, state: dict, path: Path) -> dict:
        """The state with every tensor in host memory. A tensor that stands in two places is one tensor in the copy."""
        copies: dict[int, Any] = {}
        for number, tensor in enumerate(_tensors_in(state)):
            if id(tensor) not in copies:
                copies[id(tensor)] = self._copy_tensor((path.name, number), tensor)
        return copy.deepcopy(state, copies)

    def _copy_tensor(self, place: tuple[str, int], tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            if buffer is not None and buffer.is_pinned():
                _unpin(buffer)
            buffer = self._buffers[place] = _host_memory_for(tensor)
        return buffer.copy_(tensor.detach(), non_blocking=True)


def _host_memory_for(tensor: torch.Tensor) -> torch.Tensor:
    """Pinned for a tensor on a GPU, in whole pages: `pin_memory=True` would round its size up to a power of two."""
    from deepspeed.accelerator import get_accelerator

    if not tensor.is_cuda or not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    pages = mmap.mmap(-1, tensor.nbytes)
    get_accelerator().register_host_memory(torch.frombuffer(pages, dtype=torch.uint8).data_ptr(), len(pages))
    return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)


def _unpin(buffer: torch.Tensor) -> None:
    """Before memory that was pinned here goes back to the system."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().unregister_host_memory(buffer.untyped_storage().data_ptr())


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors_in(inner)
