"""Validation loss per source: fixed samples, sharded so that every rank runs the same number of forward passes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, exp, log

import numpy as np
import torch
from torch import Tensor

from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.model.loss import IGNORE_INDEX

Score = Callable[..., Tensor]  # input ids, labels and perhaps document ids, with a reduction; each (B, T)


@dataclass(frozen=True)
class ValidationSet:
    """Samples spread evenly over a source's validation split, the same for every world size and batch.

    In conversations only the answers are targets.
    """

    source: str
    stream: TokenStream
    sequence_length: int
    samples: int  # at most
    document_mask: bool = False  # as the training is

    def __post_init__(self) -> None:
        self.stream.num_samples(self.sequence_length)  # raises where there is less than one

    @property
    def size(self) -> int:
        """The number of samples."""
        return min(self.samples, self.stream.num_samples(self.sequence_length))

    def batches(self, rank: int, world_size: int, batch: int) -> Iterator[tuple[Tensor, ...]]:
        """The shard of this rank: the numbers of the samples (B,), and input ids, labels, and with a document mask
        document ids, each (B, T).

        Every rank gets the same number of batches; rows past the end repeat the last sample, without targets.
        """
        available, total = self.stream.num_samples(self.sequence_length), self.size
        for number in range(ceil(total / (batch * world_size))):
            first = (number * world_size + rank) * batch
            numbers = [min(first + row, total - 1) for row in range(batch)]
            indices = [sample * available // total for sample in numbers]
            tokens = np.stack([self.stream.sample(index, self.sequence_length) for index in indices])  # (B, T + 1)
            tensor = torch.from_numpy(tokens.astype(np.int64))
            inputs, labels = tensor[:, :-1], tensor[:, 1:].clone()
            if self.stream.has_loss_mask:
                loss_mask = np.stack([self.stream.loss_mask(index, self.sequence_length) for index in indices])
                labels[~torch.from_numpy(loss_mask)] = IGNORE_INDEX
            labels[max(0, total - first) :] = IGNORE_INDEX
            yield torch.tensor(numbers), inputs, labels, *self._document_ids(indices)

    def _document_ids(self, indices: list[int]) -> list[Tensor]:
        if not self.document_mask:
            return []
        rows = [self.stream.document_ids(index, self.sequence_length) for index in indices]
        return [torch.from_numpy(np.stack(rows))]


@torch.no_grad()
def sample_losses(
    sets: list[ValidationSet],
    score: Score,
    sum_over_ranks: Callable[[Tensor], Tensor],
    world: DistributedInfo,
    batch: int,
) -> dict[str, Tensor]:
    """Of every sample of each source the sum of its losses and its number of targets (samples, 2), in float64 in host
    memory, over all ranks; `batch` samples per forward pass. Collective.
    """
    sizes = [held_out.size for held_out in sets]
    found = torch.zeros(sum(sizes), 2, dtype=torch.float64, device=world.device)
    for held_out, of_source in zip(sets, found.split(sizes), strict=True):
        for numbers, inputs, labels, *document_ids in held_out.batches(world.rank, world.size, batch):
            losses = score(inputs.to(world.device), labels.to(world.device), *document_ids, reduction="none")
            counts = (labels != IGNORE_INDEX).sum(1).to(world.device)
            of_source.index_add_(0, numbers.to(world.device), torch.stack((losses.double().sum(1), counts), 1))
    parts = sum_over_ranks(found).cpu().split(sizes)
    return {held_out.source: part for held_out, part in zip(sets, parts, strict=True)}


def mean_losses(samples: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean loss per target token of each source."""
    columns = ((source, of_source.unbind(1)) for source, of_source in samples.items())
    return {source: float(losses.sum() / targets.sum()) for source, (losses, targets) in columns}


def validation_metrics(losses: Mapping[str, float], sets: list[ValidationSet]) -> dict[str, float]:
    """Loss, perplexity and, where the size of the text is known, bits per byte of each source."""
    metrics = {f"Validation/Loss/{source}": loss for source, loss in losses.items()}
    metrics |= {f"Validation/Perplexity/{source}": perplexity(loss) for source, loss in losses.items()}
    sizes = {held_out.source: held_out.stream.bytes_per_token for held_out in sets}
    return metrics | {
        f"Validation/BitsPerByte/{source}": bits_per_byte(losses[source], size)
        for source, size in sizes.items()
        if size
    }


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A mean loss per token in nats as bits per byte of text: independent of the tokenizer (Gao et al. 2020)."""
    return loss / log(2) / bytes_per_token


def perplexity(loss: float) -> float:
    """exp(loss), the effective number of choices per token; infinite where that overflows."""
    return exp(loss) if loss < 700 else float("inf")
