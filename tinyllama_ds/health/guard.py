"""Non-finite numbers never reach weights or checkpoints; one small all-reduce per step gives all ranks one status.

A step is bad when its loss or gradient is not finite on any rank, and suspicious when one of them spikes (`spikes.py`).
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.config.recipe import GuardSettings
from tinyllama_ds.distributed.collectives import gather_from_ranks, sum_over_ranks
from tinyllama_ds.errors import NumericsError
from tinyllama_ds.health.spikes import SpikeWindow

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


MAX_SKIPS_IN_A_ROW = 5
_NOT_FINITE = "loss or gradient is not finite"
_FIXED_POINT = 2**32  # units per 1 in which loss and norm are summed
_MAX_VALUE = 1e5  # the sum over ten thousand ranks fits into int64
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # to read the bits of a parameter


@dataclass(frozen=True)
class StepStatus:
    """The status of a step over all ranks, the same on each of them to the last bit."""

    stop: bool
    save: bool
    busy: bool  # some rank still writes a checkpoint
    is_finite: bool  # loss and gradient, on every rank
    digest: int  # of all samples that were trained on, by any rank
    loss: float  # mean over the ranks, if finite
    grad_norm: float  # global, before clipping
    divergence: float | None = None  # of a student from its teacher, likewise


def all_reduce_step_status(
    stop: bool, save: bool, busy: bool, digest: int, loss: torch.Tensor, grad_norm: torch.Tensor | float
) -> StepStatus:
    """Collective. One sum over the ranks, read once: the only wait for the device that a step adds to DeepSpeed's.

    `loss` is a scalar, or [cross-entropy, divergence] of a student. Losses and norm travel as whole numbers of 2^-32,
    whose sum does not depend on the order of the ranks.
    """
    device = loss.device
    norm = torch.as_tensor(grad_norm, device=device)
    values = torch.cat((norm.double().reshape(1), loss.double().reshape(-1)))
    is_bad = ~torch.isfinite(values).all() | (values[0] < 0)  # DeepSpeed marks a norm that is not finite by -1
    fixed = (values.nan_to_num(0, 0, 0).clamp(max=_MAX_VALUE) * _FIXED_POINT).round().long()
    ours = torch.tensor([1, stop, save, busy, digest], dtype=torch.int64, device=device)
    together = sum_over_ranks(torch.cat((ours, is_bad.long().reshape(1), fixed)))
    ranks, stops, saves, busy_ranks, digests, bad, *sums = together.tolist()
    mean_norm, mean_loss, *parts = (value / ranks / _FIXED_POINT for value in sums)
    divergence = parts[0] if parts else None
    return StepStatus(stops > 0, saves > 0, busy_ranks > 0, bad == 0, digests, mean_loss, mean_norm, divergence)


@dataclass(frozen=True)
class StepDecision:
    """What is done with a step."""

    is_applied: bool  # or is to be applied, where the guard checks before the optimizer step
    reason: str | None = None  # of the skip, or the spike that was applied


class Rollback(Exception):
    """A spike under the policy `rollback`, on all ranks alike.

    The run resumes from its last checkpoint, and excludes these samples.
    """

    def __init__(self, step: int, samples: range, reason: str) -> None:
        super().__init__(f"step {step}: {reason} (samples {samples[0]} to {samples[-1]})")
        self.step = step
        self.samples = samples
        self.reason = reason


class AnomalyGuard:
    """Checks every step, and counts skipped steps and spikes. All ranks come to the same decision."""

    def __init__(self, settings: GuardSettings, state: dict, rollbacks: int = 0) -> None:
        """`state` is that of the guard before a restart, or empty; `rollbacks` is how many the run has had."""
        self.skipped = state.get("skipped", 0)
        self.spikes = state.get("spikes", 0)  # that were applied
        self._in_a_row = state.get("in_a_row", 0)
        self._window = SpikeWindow(settings.spike_window, settings.spike_sigmas, **state.get("window", {}))
        self._settings = settings
        self._rollbacks = rollbacks

    @property
    def checks_before_step(self) -> bool:
        """Whether it has to be called before the optimizer step, and not after."""
        return self._settings.spike_policy == "skip"

    def check(self, engine: "DeepSpeedEngine", step: int, samples: range, status: StepStatus) -> StepDecision:
        """Decide about a step.

        Raises, on all ranks, `NumericsError` where non-finite numbers reached the weights or persist, and `Rollback`.
        """
        if not status.is_finite:
            if not self.checks_before_step and engine.zero_optimization() and engine.was_step_applied():
                raise NumericsError(f"{_place(step, samples)}: {_NOT_FINITE}, and DeepSpeed applied it to the weights")
            return self._skip(step, samples, _NOT_FINITE)
        spike = self._window.find(status.loss, status.grad_norm)
        if spike and self._settings.spike_policy == "skip":
            return self._skip(step, samples, f"spike of the {spike}")
        if spike and self._settings.spike_policy == "rollback":
            reason, allowed = f"spike of the {spike}", self._settings.max_rollbacks
            if self._rollbacks < allowed:
                raise Rollback(step, samples, reason)
            raise NumericsError(f"{_place(step, samples)}: {reason}, and the run has used up its {allowed} rollbacks")
        self._in_a_row = 0
        self.spikes += spike is not None
        self._window.add(status.loss, status.grad_norm)
        return StepDecision(True, f"spike of the {spike}" if spike else None)

    def state(self) -> dict:
        """What a later process needs to decide as this one would; exact as JSON."""
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "in_a_row": self._in_a_row,
            "window": self._window.state(),
        }

    def _skip(self, step: int, samples: range, reason: str) -> StepDecision:
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == MAX_SKIPS_IN_A_ROW:
            raise NumericsError(f"{_place(step, samples)}: {reason} for the {self._in_a_row}th step in a row")
        return StepDecision(False, reason)


def _place(step: int, samples: range) -> str:
    return f"step {step} (samples {samples[0]} to {samples[-1]})"


def check_parameters(engine: "DeepSpeedEngine") -> None:
    """Collective. Every weight is finite, and replicated weights are equal on all ranks, bit for bit.

    Raises `NumericsError` on all ranks, naming the parameter and the ranks.
    """
    parameters = dict(engine.module.named_parameters())
    copies = {name for name, p in parameters.items() if p.numel() > 0}  # under ZeRO-3 a partitioned one is empty
    held = [(p if name in copies else p.ds_tensor).detach() for name, p in parameters.items()]
    finite = [torch.isfinite(values).all() for values in held]
    sums = [values.view(_WORD[values.element_size()]).sum(dtype=torch.int64) for values in held]
    bad = [name for name, is_finite in zip(parameters, _read(finite, engine.device), strict=True) if not is_finite]
    checksums = dict(zip(parameters, _read(sums, engine.device), strict=True))
    checksums = {name: value for name, value in checksums.items() if name in copies}
    reports = gather_from_ranks([bad, checksums])
    for rank, (names, found) in enumerate(reports):
        if names:
            raise NumericsError(f"parameter {names[0]!r} is not finite on rank {rank}")
        for name, checksum in found.items():
            if checksum != reports[0][1][name]:
                raise NumericsError(
                    f"parameter {name!r} differs between rank 0 and rank {rank}; expected identical copies"
                )


def _read(values: list[torch.Tensor], device: torch.device) -> list:
    """Scalars on the device, or offloaded, read at once: one read each would wait for the device each time."""
    return torch.stack([value.to(device) for value in values]).tolist()


def extend_chain(chain: str, step: int, digest: int) -> str:
    """The hash chain over the samples of all steps: equal chains mean equal samples in every step so far."""
    return hashlib.sha256(f"{chain}/{step}/{digest}".encode()).hexdigest()
