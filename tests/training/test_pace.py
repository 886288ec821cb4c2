"""Which rank is slow."""

import pytest

from tinyllama_ds.training.pace import excesses


def test_a_rank_is_compared_with_the_median_of_the_others() -> None:
    assert excesses([1.0, 1.0, 3.0, 1.0]) == pytest.approx([1.0, 1.0, 3.0, 1.0])
    assert excesses([1.0, 2.0]) == pytest.approx([0.5, 2.0]), "of two ranks, with the other one"
