"""A probe: one sample with its loss, a fingerprint by which the same weights are recognised after any transfer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative difference of the loss of the same weights in a different environment: number of threads, kernel, chip, or
# fp32 instead of bf16.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}


@dataclass(frozen=True)
class Probe:
    """Stored with weights to verify them."""

    tokens: list[int]  # T + 1
    document_ids: list[int] | None  # T, which document each input token belongs to; with a document mask
    loss: float
    dtype: str  # of the weights in the forward pass
    numerics_environment: dict  # under equal ones the loss is the same to the last bit


@torch.no_grad()
def probe_loss(
    score: Callable[..., Tensor],
    tokens: list[int],
    document_ids: list[int] | None,
    rows: int,
    device: torch.device,
    own: slice = slice(None),
) -> float:
    """The mean loss that `score`, a decoder, has on its `own` part of the probe's sample, repeated to fill a batch of
    `rows`.

    So a probe has the shape of a training batch, and compiled blocks and kernels need no second one.
    """
    batch = torch.tensor([tokens], device=device).repeat(rows, 1)  # (B, T + 1)
    parts = (
        [] if document_ids is None else [torch.tensor([document_ids], device=device, dtype=torch.int32).repeat(rows, 1)]
    )
    return score(batch[:, :-1][:, own], batch[:, 1:][:, own], *parts).item()


def loss_difference(probe: Probe, loss: float) -> float:
    """How far a loss is from the probe's, relative to it; infinite where it is not finite."""
    relative = abs(loss - probe.loss) / max(abs(probe.loss), 1e-12)
    return relative if relative == relative else float("inf")
