"""Bad numbers never reach weights or checkpoints, and what all ranks do next is agreed in one small sum per step."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.errors import BadNumbers
from tinyllama_ds.plan import Step
from tinyllama_ds.training.engine import gather_from_ranks, sum_over_ranks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Batch = tuple[torch.Tensor, ...]  # tokens (B, T + 1), and with a document mask the segments (B, T)

MAX_SKIPS_IN_A_ROW = 5
_DIGEST_BYTES = 5  # of a sample; a million of them add up without leaving int64
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # to read the bits of a parameter


@dataclass(frozen=True)
class Agreement:
    """What the ranks know of a step together."""

    stop: bool
    save: bool
    busy: bool  # some rank still writes
    is_finite: bool  # loss and gradient, on every rank
    digest: int  # of all samples that were trained on, whoever had them


def agree(
    stop: bool, save: bool, busy: bool, loss: torch.Tensor, grad_norm: torch.Tensor | float, digest: int
) -> Agreement:
    """Collective. One sum over the ranks, read once: the only wait for the device that a step adds to DeepSpeed's."""
    device = loss.device
    norm = torch.as_tensor(grad_norm, device=device)
    is_bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
    ours = torch.tensor([stop, save, busy, digest], dtype=torch.int64, device=device)
    stops, saves, busy_ranks, digests, bad = sum_over_ranks(torch.cat((ours, is_bad.long().reshape(1)))).tolist()
    return Agreement(stops > 0, saves > 0, busy_ranks > 0, bad == 0, digests)


class Guard:
    """Counts the steps whose numbers were bad. The gradient of such a step is thrown away, by DeepSpeed or by us."""

    def __init__(self) -> None:
        self.skipped = 0
        self._in_a_row = 0

    def check(self, engine: "DeepSpeedEngine", step: Step, agreement: Agreement) -> None:
        """Raises `BadNumbers`, on all ranks alike, where bad numbers reached the weights or do not end."""
        if agreement.is_finite:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        place = f"step {step.number + 1} (samples {step.first_position} to {step.first_position + step.batch - 1})"
        if engine.zero_optimization() and engine.was_step_applied():
            raise BadNumbers(f"{place}: loss or gradient is not finite, and DeepSpeed applied it to the weights")
        if self._in_a_row == MAX_SKIPS_IN_A_ROW:
            raise BadNumbers(f"{place}: loss or gradient is not finite for the {self._in_a_row}th step in a row")


def check_parameters(engine: "DeepSpeedEngine") -> None:
    """Collective. Every weight is finite, and what all ranks hold a copy of is equal on all, bit for bit.

    Raises `BadNumbers` on all ranks, naming the parameter and the ranks.
    """
    checksums = {}
    bad = []
    for name, parameter in engine.module.named_parameters():
        is_copy = parameter.numel() > 0  # under ZeRO-3 a partitioned parameter is empty between two steps
        values = (parameter if is_copy else parameter.ds_tensor).detach()
        if not torch.isfinite(values).all():
            bad.append(name)
        if is_copy:
            checksums[name] = int(values.view(_WORD[values.element_size()]).sum(dtype=torch.int64))
    reports = gather_from_ranks([bad, checksums])
    for rank, (names, found) in enumerate(reports):
        if names:
            raise BadNumbers(f"parameter {names[0]!r} is not finite on rank {rank}")
        for name, checksum in found.items():
            if checksum != reports[0][1][name]:
                raise BadNumbers(f"parameter {name!r} differs between rank 0 and rank {rank}, which ought to be copies")


class DigestedBatches:
    """Hands on the micro batches of a rank, and adds up a digest of every sample in them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._sum = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        for sample in batch[0].numpy():
            digest = hashlib.blake2b(sample.tobytes(), digest_size=_DIGEST_BYTES).digest()
            self._sum += int.from_bytes(digest, "little")
        return batch

    def take(self) -> int:
        """The sum since the last call. Sums do not depend on the order, so neither ranks nor micro batches matter."""
        taken, self._sum = self._sum, 0
        return taken


def extend_chain(chain: str, step: int, digest: int) -> str:
    """The hash chain over the samples of all steps: equal chains mean equal samples in every step so far."""
    return hashlib.sha256(f"{chain}/{step}/{digest}".encode()).hexdigest()
