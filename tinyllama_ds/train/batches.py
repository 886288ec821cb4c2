"""The micro-batches of a rank: read ahead by a thread, copied to the GPU on a stream of their own, and hashed."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.data.order import rank_positions
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.model.loss import IGNORE_INDEX
from tinyllama_ds.run.resolve import Run

_DIGEST_BYTES = 5  # of a sample; the sum of a million of them fits into int64
_PREFETCHED = 4  # micro-batches
Item = TypeVar("Item")


class Batch(NamedTuple):
    """B samples of T + 1 tokens."""

    tokens: Tensor  # (B, T + 1)
    document_ids: Tensor | None = None  # (B, T) with a document mask: the document of each input token
    loss_mask: Tensor | None = None  # (B, T) of packed rows: which labels are in the loss; without it all are
    teacher: tuple[Tensor, Tensor] | None = None  # its ids (B, T, k) and log-probabilities (B, T, k + 1), of a student
    ready: "InputCopy | None" = None  # the model's inputs on their way to a GPU
    own: slice = slice(None)  # the part of the T tokens that this rank computes

    @property
    def num_targets(self) -> int:
        """In the part of this rank, which may be 0."""
        in_loss = self.loss_mask
        return self.tokens[:, 1:][:, self.own].numel() if in_loss is None else int(in_loss[:, self.own].sum())

    def model_inputs(self, device: torch.device) -> tuple:
        """Input ids and labels on the device, and with a document mask document ids in host memory; each (B, T).

        A student's are the same with document ids or None, and what its teacher predicts, on the device. All but
        document ids are of this rank's part of the sequences.
        """
        if self.ready is not None:
            return self.ready.wait()
        tokens = self.tokens.to(device, non_blocking=True)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if self.loss_mask is not None:
            labels = labels.where(self.loss_mask.to(device, non_blocking=True), IGNORE_INDEX)
        inputs, labels = inputs[:, self.own], labels[:, self.own]
        if self.teacher is not None:
            teacher = tuple(tensor.to(device, non_blocking=True)[:, self.own] for tensor in self.teacher)
            return inputs, labels, self.document_ids, teacher
        return (inputs, labels) if self.document_ids is None else (inputs, labels, self.document_ids)


@dataclass(frozen=True)
class InputCopy:
    """The model's inputs, copied to a GPU on a stream of their own."""

    inputs: tuple
    end: torch.cuda.Event

    def wait(self) -> tuple:
        """The inputs, once the GPU has copied them; the host does not wait."""
        current = torch.cuda.current_stream()
        current.wait_event(self.end)
        for tensor in _tensors(self.inputs):
            if tensor.is_cuda:
                tensor.record_stream(current)  # its memory is not reused before the computation has ended
        return self.inputs


def _tensors(inputs: Iterable) -> Iterator[Tensor]:
    """All tensors of the model's inputs, some of which are tuples or None."""
    for entry in inputs:
        if isinstance(entry, Tensor):
            yield entry
        elif entry is not None:
            yield from entry


def open_loader(run: Run, world: DistributedInfo, first_step: int) -> "HashingLoader":
    """This rank's micro-batches of all steps from `first_step` on, prefetched and hashed."""
    return HashingLoader(prefetch(micro_batches(run, world, first_step), _PREFETCHED), world.sequence_rank == 0)


def micro_batches(run: Run, world: DistributedInfo, first_step: int) -> Iterator[Batch]:
    """This rank's micro-batches of all steps from `first_step` on; for a GPU their inputs are being copied to it."""
    steps = run.plan.steps(first_step)
    return _copied_ahead((batch for step in steps for batch in _read_step(run, world, step)), world.device)


def _read_step(run: Run, world: DistributedInfo, step: Step) -> Iterator[Batch]:
    share = rank_positions(step.first_position, step.batch, world.data_rank, world.data_size)
    for start in share[:: run.micro_batch]:
        yield read_batch(run, np.arange(start, start + run.micro_batch), world)


def _copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            inputs = batch.model_inputs(device)
        yield batch._replace(ready=InputCopy(inputs, stream.record_event()))


def read_batch(run: Run, positions: np.ndarray, world: DistributedInfo) -> Batch:
    """The samples at some positions, pinned for a GPU."""

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).pin_memory() if world.device.type == "cuda" else torch.from_numpy(array)

    reader = run.data.reader
    teacher = reader.read_teacher(positions) if reader.has_teacher else None
    return Batch(
        tensor(reader.read(positions)),
        tensor(reader.read_document_ids(positions)) if run.recipe.document_mask else None,
        tensor(reader.read_loss_mask(positions)) if reader.has_loss_mask else None,
        (tensor(teacher[0]), tensor(teacher[1])) if teacher else None,
        own=world.own_tokens(run.recipe.sequence_length),
    )


def count_targets(run: Run, step: Step) -> int:
    """Labels in the loss of the global batch of a step. Every rank knows the number without communication."""
    if not run.data.reader.has_loss_mask:
        return step.batch * run.recipe.sequence_length
    return run.data.reader.count_targets(np.arange(step.first_position, step.first_position + step.batch))


class HashingLoader:
    """Iterates over the micro-batches of a rank, and sums up a digest of every sample in them."""

    def __init__(self, batches: Iterable[Batch], counts: bool = True) -> None:
        """With `counts` off nothing is summed up: ranks that share sequences read the same, and one of them counts."""
        self._batches = iter(batches)
        self._counts = counts
        self._sum = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        for sample in batch.tokens.numpy() if self._counts else ():
            digest = hashlib.blake2b(sample.tobytes(), digest_size=_DIGEST_BYTES).digest()
            self._sum += int.from_bytes(digest, "little")
        return batch

    def take_digest(self) -> int:
        """The sum since the last call. It does not depend on the order of samples, so on no layout of ranks either."""
        digest, self._sum = self._sum, 0
        return digest


def prefetch(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items, produced up to `depth` ahead by a thread; its exception is raised in the consumer."""
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        ahead: deque[Future] = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
