"""What follows from rounds: acceptance, and Leviathan's speed-up."""

import random

import pytest

from tinyllama_ds.speculative.acceptance import (
    acceptance,
    acceptance_by_position,
    acceptance_for,
    accepted_per_round,
    predicted_speedup,
    tokens_per_round,
)
from tinyllama_ds.speculative.decode import Round


def test_acceptance_of_some_rounds() -> None:
    """Tokens after a rejected one were not tried, and a round without drafted tokens counts nowhere."""
    rounds = [Round(3, 3), Round(3, 0), Round(3, 1), Round(1, 1), Round(0, 0)]
    assert acceptance(rounds) == pytest.approx(5 / 7)
    assert acceptance_by_position(rounds) == [3 / 4, 1 / 2, 1.0]
    assert accepted_per_round(rounds) == 5 / 4
    assert (acceptance([]), acceptance_by_position([]), accepted_per_round([])) == (0, [], 0)


def test_positions_that_were_never_tried_have_no_acceptance() -> None:
    assert acceptance_by_position([Round(5, 1), Round(5, 0)]) == [0.5, 0.0]


def test_the_formulas_are_those_of_simulated_rounds() -> None:
    rng = random.Random(0)
    share, length = 0.7, 4
    rounds = []
    for _ in range(20_000):
        accepted = 0
        while accepted < length and rng.random() < share:
            accepted += 1
        rounds.append(Round(length, accepted))
    assert acceptance(rounds) == pytest.approx(share, abs=0.01)
    assert accepted_per_round(rounds) + 1 == pytest.approx(tokens_per_round(share, length), abs=0.03)
    assert acceptance_by_position(rounds) == pytest.approx([share] * length, abs=0.02)


def test_speedups_of_the_paper() -> None:
    """Leviathan et al. 2022, Table 1: operations and speed-up of a draft that costs nothing."""
    assert predicted_speedup(0.6, 2, 0.0) == pytest.approx(1.96)
    assert predicted_speedup(0.8, 5, 0.0) == pytest.approx(3.69, abs=0.005)
    assert predicted_speedup(0.9, 10, 0.0) == pytest.approx(6.86, abs=0.005)
    assert predicted_speedup(1.0, 3, 0.5) == pytest.approx(4 / 2.5)


def test_the_acceptance_for_a_speedup_is_the_inverse() -> None:
    for length, cost in ((1, 0.3), (4, 0.1), (8, 0.05)):
        needed = acceptance_for(1.2, length, length * cost + 1)
        assert needed is not None
        assert predicted_speedup(needed, length, cost) == pytest.approx(1.2)
    assert acceptance_for(1.2, 3, 3.5) is None
    assert acceptance_for(1.0, 3, 0.5) == pytest.approx(0, abs=1e-6)
