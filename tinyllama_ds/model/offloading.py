"""Activation offloading: between forward and backward pass the inputs of recomputed blocks are in host memory."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Offloaded(NamedTuple):
    """What autograd keeps in place of the input of a block."""

    forward_pass: int
    block: int


class ActivationOffloading:
    """Copies the input of a block to pinned memory while the block is computed, and in the backward pass back while
    the block after it is computed: two of them are on the device at a time.

    Copies run on a stream of their own. The computing stream waits for one before it uses or frees an input, so the
    allocator may reuse the memory at once, which it could not after `record_stream`. On CPUs they are plain copies.
    """

    def __init__(self) -> None:
        self._in_host_memory: list[Tensor] = []  # a buffer for each block, kept from micro-batch to micro-batch
        self._on_device: dict[int, Tensor] = {}  # by block: on the way to host memory, or back and used next
        self._forward_pass = self._blocks = 0  # forward passes so far, and blocks of this one
        self._device = torch.device("cpu")
        self._stream: torch.cuda.Stream | None = None

    def begin(self, device: torch.device) -> None:
        """A forward pass begins on a device; after this there is no backward pass of the one before."""
        self._forward_pass += 1
        self._blocks = 0
        self._on_device.clear()
        self._device = device
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)

    def of(self, x: Tensor) -> AbstractContextManager:
        """Inside, `x` is offloaded where autograd saves it; other tensors, as RoPE's tables, stay."""
        address = x.data_ptr()  # the graph keeps these hooks, which must not keep x
        return saved_tensors_hooks(
            lambda saved: self._offload(saved.detach()) if saved.data_ptr() == address else saved, self._restore
        )

    def _offload(self, x: Tensor) -> _Offloaded:
        block = self._blocks
        self._blocks += 1
        self._wait_for_copies()
        self._on_device = {block: x}  # the copy of the one before is complete
        if block == len(self._in_host_memory):
            self._in_host_memory.append(_host_memory_for(x))
        elif self._in_host_memory[block].shape != x.shape:
            self._in_host_memory[block] = _host_memory_for(x)
        with self._copying():
            self._in_host_memory[block].copy_(x, non_blocking=True)
        return _Offloaded(self._forward_pass, block)

    def _restore(self, saved: Tensor | _Offloaded) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        forward_pass, block = saved
        if forward_pass != self._forward_pass:
            raise RuntimeError("activation offloading: a backward pass after another forward pass; expected it before")
        if block not in self._on_device:
            self._fetch(block)
        x = self._on_device.pop(block)
        self._wait_for_copies()
        if block > 0:
            self._fetch(block - 1)
        return x

    def _fetch(self, block: int) -> None:
        """Begin to copy an input back, into memory that the computing stream has no use for by now."""
        host = self._in_host_memory[block]
        x = self._on_device[block] = torch.empty_like(host, device=self._device, pin_memory=False)
        with self._copying():
            x.copy_(host, non_blocking=True)

    def _copying(self) -> AbstractContextManager:
        """Inside, copies are after all that the computing stream was given so far, and next to what comes."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _wait_for_copies(self) -> None:
        """Let the computing stream wait, and not the host."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _host_memory_for(x: Tensor) -> Tensor:
    """Pinned for a GPU, where PyTorch rounds its size up to a power of two."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
