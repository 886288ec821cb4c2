"""The law of loss over parameters and tokens is found again where it is known, with intervals that hold it."""

import numpy as np
import pytest
from scipy.special import huber

from tinyllama_ds.ladder import fit as module
from tinyllama_ds.ladder.fit import HUBER_DELTA, Fit, Points, fit, objective

# Besiroglu et al. 2024 (arXiv 2404.10102), table 1: Hoffmann et al.'s data fitted again.
EPOCH_AI = {"E": 1.8172, "A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658}
SIZES, TOKENS = (40e6, 80e6, 160e6, 320e6), (1e9, 2e9, 4e9)


def law(parameters: np.ndarray, tokens: np.ndarray, named: dict[str, float]) -> np.ndarray:
    return named["E"] + named["A"] / parameters ** named["alpha"] + named["B"] / tokens ** named["beta"]


def points(
    parameters: np.ndarray, tokens: np.ndarray, named: dict[str, float], noise: float = 0, seed: int = 0
) -> Points:
    factors = np.exp(noise * np.random.default_rng(seed).standard_normal(len(parameters)))
    return Points(parameters, tokens, law(parameters, tokens, named) * factors)


def spread(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and tokens as widely as Hoffmann et al.'s."""
    generator = np.random.default_rng(1)
    return 10 ** generator.uniform(7.6, 10.2, count), 10 ** generator.uniform(8.7, 11.3, count)


def grid() -> tuple[np.ndarray, np.ndarray]:
    """A ladder's."""
    first, second = np.meshgrid(SIZES, TOKENS, indexing="ij")
    return first.ravel(), second.ravel()


@pytest.mark.parametrize("named", [EPOCH_AI, {"E": 3.0, "A": 50.0, "alpha": 0.25, "B": 300.0, "beta": 0.5}])
def test_the_values_of_exact_points_are_found(named: dict[str, float]) -> None:
    found = fit(points(*grid(), named), 0, has_prior=False)
    assert found.named == pytest.approx(named, rel=1e-3)
    assert np.abs(found.residuals).max() < 1e-6


def test_the_reproduction_of_hoffmann_is_found_from_noisy_points() -> None:
    """245 points, as in the paper, within what its bootstrap gives as standard errors; the prior has no weight."""
    given = points(*spread(245), EPOCH_AI, noise=0.01)
    free, prior = fit(given, 0, has_prior=False).named, fit(given, 0).named
    errors = {"E": 0.03, "alpha": 0.02, "beta": 0.02}
    for name, error in errors.items():
        assert free[name] == pytest.approx(EPOCH_AI[name], abs=2 * error)
        assert prior[name] == pytest.approx(free[name], abs=error / 20)


def test_the_objective_is_scipys_huber_loss_between_logarithms() -> None:
    given = points(*grid(), EPOCH_AI, noise=0.01)
    values = np.log([400.0, 2000.0, 1.8, 1, 1])
    values[3:] = 0.34, 0.36
    direct = 1.8 + 400 / given.parameters**0.34 + 2000 / given.tokens**0.36
    expected = huber(HUBER_DELTA, np.log(direct) - np.log(given.losses)).sum()
    assert objective(values, given) == pytest.approx(expected)
    best = fit(given, 0, has_prior=False)
    worse = [best.values + step for step in 1e-3 * np.vstack([np.eye(5), -np.eye(5)])]
    assert all(objective(best.values, given) <= objective(near, given) for near in worse)


def test_the_gradient_is_that_of_the_objective() -> None:
    """Wherever L-BFGS begins, it ends in the same place: it is not ended by its tolerances."""
    given = points(*grid(), EPOCH_AI, noise=0.003)
    logs, prior = np.log(given.losses), np.array(module.PRIOR_EXPONENTS)
    ends = [
        module._minimize(given, logs, module._start(given, share * given.losses.min()), prior) for share in (0.1, 0.9)
    ]
    assert ends[0].fun == pytest.approx(ends[1].fun, rel=1e-4)


def test_intervals_hold_what_they_should() -> None:
    """Nominally 90 %: of eight ladders with noise, the next size's loss is outside of three at most."""
    inside, large, tokens = 0, np.array(640e6), np.array([4e9])
    for seed in range(8):
        found = fit(points(*grid(), EPOCH_AI, noise=0.003, seed=seed), 20)
        low, high = found.interval(float(large), tokens)
        noise = np.exp(0.003 * np.random.default_rng(100 + seed).standard_normal())
        inside += bool(low[0] <= law(large, tokens, EPOCH_AI)[0] * noise <= high[0])
        assert 0.02 < high[0] - low[0] < 0.4
    assert inside >= 5


def test_an_interval_grows_with_the_distance() -> None:
    found = fit(points(*grid(), EPOCH_AI, noise=0.003), 40)
    near, far = (np.subtract(*found.interval(size, np.array([tokens]))) for size, tokens in ((3e8, 4e9), (3e10, 4e11)))
    assert abs(far[0]) > 2 * abs(near[0])
    assert isinstance(found, Fit)
