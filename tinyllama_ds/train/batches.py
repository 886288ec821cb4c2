"""The micro batches of a rank: samples of the order, with what the model needs beside them."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.data.order import rank_positions
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.fault_injection import maybe_inject_fault
from tinyllama_ds.model.loss import IGNORE_INDEX
from tinyllama_ds.run.resolve import Run

_DIGEST_BYTES = 5  # of a sample; a million of them add up without leaving int64


class Batch(NamedTuple):
    """B samples of T + 1 tokens."""

    tokens: Tensor  # (B, T + 1)
    document_ids: Tensor | None = None  # (B, T) with a document mask: the document of each input token
    loss_mask: Tensor | None = None  # (B, T) with conversations: which labels count; else all do
    ready: "Copied | None" = None  # the model's inputs, where they are under way to a GPU

    @property
    def num_targets(self) -> int:
        return self.tokens[:, 1:].numel() if self.loss_mask is None else int(self.loss_mask.sum())

    def model_inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """Input ids and labels on the device of the model, and perhaps segments in host memory; each (B, T)."""
        if self.ready is not None:
            return self.ready.wait()
        tokens = self.tokens.to(device, non_blocking=True)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if self.loss_mask is not None:
            labels = labels.where(self.loss_mask.to(device, non_blocking=True), IGNORE_INDEX)
        return (inputs, labels) if self.document_ids is None else (inputs, labels, self.document_ids)


@dataclass(frozen=True)
class Copied:
    """The model's inputs, copied to a GPU on a stream that is not the one which computes."""

    inputs: tuple[Tensor, ...]
    end: torch.cuda.Event

    def wait(self) -> tuple[Tensor, ...]:
        """The inputs, for what is computed from now on; the host does not wait."""
        current = torch.cuda.current_stream()
        current.wait_event(self.end)
        for tensor in self.inputs:
            if tensor.is_cuda:
                tensor.record_stream(current)  # its memory is not given away before the computation is done with it
        return self.inputs


def micro_batches(run: Run, world: DistributedInfo, first_step: int) -> Iterator[Batch]:
    """This rank's micro batches of all steps from a number on, beside a GPU with their inputs on the way there."""
    return _copied_ahead(_in_host_memory(run, world, first_step), world.device)


def _in_host_memory(run: Run, world: DistributedInfo, first_step: int) -> Iterator[Batch]:
    for step in run.plan.steps(first_step):
        maybe_inject_fault("data.read", step.number)
        share = rank_positions(step.first_position, step.batch, world.rank, world.size)
        for start in share[:: run.micro_batch]:
            yield read_batch(run, np.arange(start, start + run.micro_batch), world.device)


def _copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            inputs = batch.model_inputs(device)
        yield batch._replace(ready=Copied(inputs, stream.record_event()))


def read_batch(run: Run, positions: np.ndarray, device: torch.device) -> Batch:
    """The samples at some positions, pinned for a GPU."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).pin_memory() if device.type == "cuda" else torch.from_numpy(array)

    return Batch(
        tensor(run.reader.read(positions)),
        tensor(run.reader.read_document_ids(positions)) if run.recipe.document_mask else None,
        tensor(run.reader.read_loss_mask(positions)) if run.reader.has_loss_mask else None,
    )


def count_targets(run: Run, step: Step) -> int:
    """The labels that count in the global batch of a step. Every rank knows it without asking the others."""
    if not run.reader.has_loss_mask:
        return step.batch * run.recipe.sequence_length
    return run.reader.count_targets(np.arange(step.first_position, step.first_position + step.batch))


class HashingLoader:
    """Hands on the micro batches of a rank, and adds up a digest of every sample in them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._sum = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> "Batch":
        batch = next(self._batches)
        for sample in batch.tokens.numpy():
            digest = hashlib.blake2b(sample.tobytes(), digest_size=_DIGEST_BYTES).digest()
            self._sum += int.from_bytes(digest, "little")
        return batch

    def take(self) -> int:
        """The sum since the last call. Sums do not depend on the order, so neither ranks nor micro batches matter."""
        taken, self._sum = self._sum, 0
        return taken
