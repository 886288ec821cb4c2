"""What a run trains on: whether ranks are disjoint, nothing is missing, and how often each source is repeated."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tinyllama_ds.data.order import SampleOrder, rank_positions

EXHAUSTIVE_SAMPLES = 5_000_000  # up to which every position of a run is checked; of longer runs, windows are
_WINDOWS = 8
_WINDOW_SAMPLES = 200_000

RankAssignment = Callable[
    [int, int, int, int], Sequence[int]
]  # first position, batch, rank and world size to positions


@dataclass
class Coverage:
    """The result of the check."""

    world_size: int
    checked_samples: int = 0
    total_samples: int = 0
    epochs: dict[str, float] = field(default_factory=dict)  # of each source
    shares: list[dict[str, float]] = field(default_factory=list)  # of the sources in each stage
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_coverage(
    order: SampleOrder, batches: Sequence[int], world_size: int, assign: RankAssignment = rank_positions
) -> Coverage:
    """Assign every global batch to the ranks, as training does, and check the union of their samples.

    `batches` are the samples of one global batch in each stage of the order.
    Runs of up to `EXHAUSTIVE_SAMPLES` are checked as a whole, longer ones in windows from their start to their end.
    """
    coverage = Coverage(world_size, total_samples=sum(stage.samples for stage in order.stages))
    is_exhaustive = coverage.total_samples <= EXHAUSTIVE_SAMPLES
    seen = {name: np.zeros(size if is_exhaustive else 0, dtype=np.int64) for name, size in order.num_samples.items()}
    for steps in _windows(order, batches, is_exhaustive):
        assigned = [
            np.concatenate(
                [np.asarray(assign(first, batch, rank, world_size), dtype=np.int64) for first, batch in steps]
            )
            for rank in range(world_size)
        ]
        _check_window(coverage, order, steps, assigned)
        if is_exhaustive:
            located = order.locate(np.concatenate(assigned))
            for number, name in enumerate(order.sources):
                seen[name] += np.bincount(located.sample[located.source == number], minlength=len(seen[name]))
    if is_exhaustive:
        _check_epochs(coverage, order, seen)
    _describe_mixture(coverage, order)
    return coverage


def _windows(order: SampleOrder, batches: Sequence[int], is_exhaustive: bool) -> Iterator[list[tuple[int, int]]]:
    """Steps to check together, each as (first position, batch)."""
    start = 0
    for stage, batch in zip(order.stages, batches, strict=True):
        steps = stage.samples // batch
        width = max(1, _WINDOW_SAMPLES // batch)
        if is_exhaustive or steps <= _WINDOWS * width:
            begins = range(0, steps, width)
        else:
            begins = np.linspace(0, steps - width, _WINDOWS, dtype=np.int64).tolist()
        for begin in begins:
            numbers = range(begin, min(begin + width, steps))
            yield [(start + number * batch, batch) for number in numbers]
        start += stage.samples


def _check_window(
    coverage: Coverage, order: SampleOrder, steps: list[tuple[int, int]], assigned: list[np.ndarray]
) -> None:
    first, end = steps[0][0], steps[-1][0] + steps[-1][1]
    coverage.checked_samples += end - first
    together = np.concatenate(assigned)
    missing = np.setdiff1d(np.arange(first, end), together)
    if len(missing):
        coverage.problems.append(f"positions {first} to {end}: no rank trains on {len(missing)} of them")
    located = order.locate(together)
    largest = max(order.num_samples.values())
    identities = (located.epoch * len(order.sources) + located.source) * largest + located.sample
    repeated = len(identities) - len(np.unique(identities))
    if repeated:
        coverage.problems.append(f"positions {first} to {end}: {repeated} samples are trained on twice in one epoch")


def _check_epochs(coverage: Coverage, order: SampleOrder, seen: Mapping[str, np.ndarray]) -> None:
    """Over a whole run all samples of a source are seen equally often, apart from its last epoch."""
    for name in order.sources:
        fewest, most = int(seen[name].min()), int(seen[name].max())
        if most - fewest > 1:
            coverage.problems.append(f"{name}: some samples are seen {most} times, others {fewest} times")


def _describe_mixture(coverage: Coverage, order: SampleOrder) -> None:
    position, before = 0, dict.fromkeys(order.sources, 0)
    for stage in order.stages:
        position += stage.samples
        counts = order.counts(position)
        coverage.shares.append({name: (counts[name] - before[name]) / stage.samples for name in order.sources})
        before = counts
    coverage.epochs = {name: before[name] / order.num_samples[name] for name in order.sources}
    for name, epochs in coverage.epochs.items():
        if epochs < 1:
            coverage.warnings.append(f"{name}: {1 - epochs:.1%} of it is never read")
        elif epochs > 4:
            coverage.warnings.append(f"{name}: every sample is seen {epochs:.1f} times")
