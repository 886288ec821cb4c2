"""Which sample is trained at which position: a pure function of (seed, plan, position), the same on every rank.

A position counts the samples that a run trains on, over all ranks. There is no state and no replay: seeking to position
10^12 costs the same as to 0.

A run that excludes samples (after a rollback) skips them: the global sample index of a position counts the excluded
samples as well, and the mixture and the samples are functions of this index.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tinyllama_ds.config.recipe import Recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.errors import ConfigError

ORDER_VERSION = 1  # recorded with a run; any change of the functions below must increase it
_FEISTEL_ROUNDS = 4
_MAX_RAMP_SAMPLES = 2**31  # their square fits int64
_MAX_DENOMINATOR = 2**30  # of a share: 2 * rest * numerator stays below 2^63


@dataclass(frozen=True)
class MixtureStage:
    """A part of the run with constant weights, reached linearly from the previous stage over `ramp_samples`."""

    samples: int
    weights: Mapping[str, float]
    ramp_samples: int = 0


@dataclass(frozen=True)
class SampleLocation:
    """The samples at some positions: the number of the source of each, the epoch of the source, the sample in it."""

    source: np.ndarray
    epoch: np.ndarray
    sample: np.ndarray


class SampleOrder:
    """The order of a whole run over several sources."""

    def __init__(
        self,
        seed: int,
        num_samples: Mapping[str, int],
        stages: Sequence[MixtureStage],
        excluded_samples: Sequence[range] = (),
    ) -> None:
        """`num_samples` is the size of each source; its key order numbers the sources. `excluded_samples` are ranges
        of global sample indices.

        Raises `ConfigError` for a source without a sample.
        """
        for name, size in num_samples.items():
            if size < 1:
                raise ConfigError(f"source {name!r}: has less than one sample; expected at least one")
        self.sources = list(num_samples)
        self.num_samples = dict(num_samples)
        self.stages = list(stages)
        self.excluded_samples = _merge_ranges(excluded_samples)
        self._seed = seed
        self._sizes = np.array(list(num_samples.values()), dtype=np.int64)
        mixtures = [_Mixture([stage.weights.get(name, 0.0) for name in self.sources]) for stage in stages]
        self._mixtures = [
            _Ramp(mixtures[max(0, number - 1)], mixture, stage.ramp_samples) if stage.ramp_samples else mixture
            for number, (mixture, stage) in enumerate(zip(mixtures, stages, strict=True))
        ]
        self._stage_starts = np.cumsum([0] + [stage.samples for stage in stages], dtype=np.int64)
        self._counts_at_start = [np.zeros(len(self.sources), dtype=np.int64)]
        for mixture, stage in zip(self._mixtures, stages, strict=True):
            self._counts_at_start.append(self._counts_at_start[-1] + mixture.counts(np.array([stage.samples]))[0])

    def global_sample_index(self, positions: np.ndarray) -> np.ndarray:
        """The global sample index of each position (int64, (n,)): the position plus the excluded samples before it."""
        starts = np.array([excluded.start for excluded in self.excluded_samples], dtype=np.int64)
        shifts = np.cumsum([0] + [len(excluded) for excluded in self.excluded_samples], dtype=np.int64)
        return positions + shifts[np.searchsorted(starts - shifts[:-1], positions, side="right")]

    def span(self, position: int, samples: int) -> range:
        """The global sample indices of consecutive positions, from the first to the last."""
        first, last = self.global_sample_index(np.array([position, position + samples - 1])).tolist()
        return range(first, last + 1)

    def counts(self, position: int) -> dict[str, int]:
        """The number of samples of each source before a position, without excluded ones."""
        end = int(self.global_sample_index(np.array([position]))[0])
        counts = self._counts_before(end)
        for excluded in self.excluded_samples:
            if excluded.stop <= end:
                counts = counts - (self._counts_before(excluded.stop) - self._counts_before(excluded.start))
        return dict(zip(self.sources, counts.tolist(), strict=True))

    def _counts_before(self, index: int) -> np.ndarray:
        stage = self._stage_of(np.array([index]))[0]
        within = np.array([index - self._stage_starts[stage]])
        return self._counts_at_start[stage] + self._mixtures[stage].counts(within)[0]

    def locate(self, positions: np.ndarray) -> SampleLocation:
        """Source, epoch and sample of each position (int64, (n,))."""
        global_sample_index = self.global_sample_index(positions)
        source = np.empty(len(global_sample_index), dtype=np.int64)
        drawn = np.empty(len(global_sample_index), dtype=np.int64)  # samples of its source before it
        stage_of = self._stage_of(global_sample_index)
        for stage in np.unique(stage_of):
            here = stage_of == stage
            within = global_sample_index[here] - self._stage_starts[stage]
            before, after = self._mixtures[stage].counts(within), self._mixtures[stage].counts(within + 1)
            source[here] = (after - before).argmax(axis=1)
            drawn[here] = (self._counts_at_start[stage] + before)[np.arange(len(within)), source[here]]
        epoch, place = np.divmod(drawn, self._sizes[source])
        sample = np.empty(len(positions), dtype=np.int64)
        for members in _groups(epoch * len(self.sources) + source):
            number = source[members[0]]
            key = f"{self._seed}/{self.sources[number]}/{epoch[members[0]]}"
            sample[members] = permute(place[members], int(self._sizes[number]), key)
        return SampleLocation(source, epoch, sample)

    def _stage_of(self, global_sample_index: np.ndarray) -> np.ndarray:
        stage = np.searchsorted(self._stage_starts, global_sample_index, side="right") - 1
        return np.minimum(stage, len(self._mixtures) - 1)


def planned_order(
    recipe: Recipe, plan: RunPlan, num_samples: Mapping[str, int], excluded_samples: Sequence[range] = ()
) -> SampleOrder:
    """The order of a recipe's run, given the size of each source in samples."""
    stages = [MixtureStage(stage.samples, stage.weights, stage.ramp_samples) for stage in plan.stages]
    return SampleOrder(recipe.seed, num_samples, stages, excluded_samples)


def rank_positions(first: int, batch: int, rank: int, world_size: int) -> range:
    """The positions of the global batch at `first` that are assigned to a rank: a contiguous part of it.

    The micro-batch does not enter the order.
    """
    share = batch // world_size
    return range(first + rank * share, first + (rank + 1) * share)


def _merge_ranges(ranges: Sequence[range]) -> list[range]:
    """The same numbers in sorted ranges that do not touch."""
    merged: list[range] = []
    for excluded in sorted(ranges, key=lambda excluded: excluded.start):
        if merged and excluded.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, excluded.stop))
        else:
            merged.append(excluded)
    return merged


def _groups(values: np.ndarray) -> list[np.ndarray]:
    """The indices of each distinct value."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1) if len(values) else []


@dataclass(frozen=True)
class _MixtureNode:
    """Of all its samples, round(share * total) come from the left and the others from the right."""

    left: "_MixtureTree"
    right: "_MixtureTree"
    share: Fraction


_MixtureTree = int | _MixtureNode  # a leaf is the number of a source


class _Mixture:
    """Exact integer mixture: how many of the first g samples come from each source, in closed form.

    The sources are split in two recursively by weight, and each node rounds once, so counts are monotone and sum to
    g. With two sources each is within half a sample of its target at every g, with three within one; with more, within
    half the depth of the tree.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = {number: Fraction(str(weight)) for number, weight in enumerate(weights)}
        self._num_sources = len(exact)
        self._tree = _mixture_tree({number: weight for number, weight in exact.items() if weight > 0})

    def counts(self, positions: np.ndarray) -> np.ndarray:
        """Counts (n, sources) among the first g samples of the stage, for each g in `positions` (n,)."""
        counts = np.zeros((len(positions), self._num_sources), dtype=np.int64)
        _distribute(self._tree, positions.astype(np.int64), counts)
        return counts


class _Ramp:
    """From one mixture to the next: of the first g samples, round(g^2 / 2R) come from the next one, and past R all do.

    So the share of the next mixture rises linearly from 0 to 1 over R samples. Both mixtures count independently:
    counts are monotone and sum to g, and the rounding of a source is the sum of both mixtures' and of this split.
    """

    def __init__(self, before: _Mixture, after: _Mixture, ramp_samples: int) -> None:
        if ramp_samples >= _MAX_RAMP_SAMPLES:
            raise ValueError(f"a ramp of {ramp_samples} samples; expected less than {_MAX_RAMP_SAMPLES}")
        self._before = before
        self._after = after
        self._ramp_samples = ramp_samples

    def counts(self, positions: np.ndarray) -> np.ndarray:
        """Counts (n, sources) among the first g samples of the stage, for each g in `positions` (n,)."""
        within = np.minimum(positions, self._ramp_samples)
        from_after = (within * within + self._ramp_samples) // (2 * self._ramp_samples) + positions - within
        return self._before.counts(positions - from_after) + self._after.counts(from_after)


def _mixture_tree(weights: dict[int, Fraction]) -> _MixtureTree:
    members = sorted(weights, key=lambda number: (-weights[number], number))
    if len(members) == 1:
        return members[0]
    total = sum(weights.values())
    shares = [sum(weights[number] for number in members[:cut]) / total for cut in range(1, len(members))]
    share = min(shares, key=lambda share: abs(Fraction(share) - Fraction(1, 2)))
    left, right = members[: shares.index(share) + 1], members[shares.index(share) + 1 :]
    return _MixtureNode(
        _mixture_tree({number: weights[number] for number in left}),
        _mixture_tree({number: weights[number] for number in right}),
        Fraction(share).limit_denominator(_MAX_DENOMINATOR),
    )


def _distribute(tree: _MixtureTree, total: np.ndarray, counts: np.ndarray) -> None:
    if isinstance(tree, int):
        counts[:, tree] = total
        return
    numerator, denominator = tree.share.numerator, tree.share.denominator
    periods, rest = np.divmod(total, denominator)  # whole periods first: no product can overflow
    left = periods * numerator + (2 * rest * numerator + denominator) // (2 * denominator)
    _distribute(tree.left, left, counts)
    _distribute(tree.right, total - left, counts)


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """A keyed bijection of [0, size): a Feistel network on the next even number of bits, walked until it lands inside.

    The network covers less than 4 * size values, so a walk takes fewer than four rounds on average.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    digest = hashlib.sha256(key.encode()).digest()
    round_keys = np.frombuffer(digest, dtype="<u8")[:_FEISTEL_ROUNDS]
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (splitmix64(right ^ round_key) & mask)
    return (left << shift) | right


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Splitmix64's last steps, in place (Steele, Lea and Flood 2014): every bit depends on all."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
