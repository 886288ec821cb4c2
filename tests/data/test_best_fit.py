"""Best-fit decreasing by length against best-fit decreasing by item, one after the other."""

from bisect import bisect_left, insort

import numpy as np
import pytest

from tinyllama_ds.data.best_fit import best_fit_decreasing


def by_item(lengths: list[int], capacity: int) -> list[list[int]]:
    """As the textbook has it: the longest first, each into the fullest bin that it fits, of equal ones the first."""
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # space and number
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = bisect_left(open_bins, (lengths[item], -1))
        if place == len(open_bins):
            bins.append([])
            space, number = capacity, len(bins) - 1
        else:
            space, number = open_bins.pop(place)
        bins[number].append(item)
        insort(open_bins, (space - lengths[item], number))
    return bins


@pytest.mark.parametrize("capacity", [1, 7, 64, 2048])
@pytest.mark.parametrize("items", [0, 1, 5, 300, 2000])
def test_rows_are_those_of_the_textbook(capacity: int, items: int):
    rng = np.random.default_rng(items)
    spread = rng.lognormal(np.log(capacity) / 2, 1.5, items).astype(int)  # many short documents, a few long ones
    for lengths in (rng.integers(1, capacity + 1, items), rng.integers(1, min(capacity, 9) + 1, items), spread):
        clipped = np.clip(lengths, 1, capacity)
        packs = best_fit_decreasing(clipped, capacity)
        assert [row.tolist() for row in packs] == by_item(clipped.tolist(), capacity)
        assert packs.sums(clipped).tolist() == [clipped[row].sum() for row in packs]


def test_packing_wastes_little():
    lengths = np.random.default_rng(1).integers(10, 700, size=5000)
    packs = best_fit_decreasing(lengths, 2048)
    assert sorted(packs.items.tolist()) == list(range(5000))
    assert packs.sums(lengths).max() <= 2048
    assert lengths.sum() / (2048 * len(packs)) > 0.99
