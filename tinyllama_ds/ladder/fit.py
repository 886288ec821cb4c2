"""Loss over parameters and tokens, L(N, D) = E + A / N^alpha + B / D^beta, with prediction intervals by bootstrap.

The form and the objective, a Huber loss between logarithms, are Approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556,
appendix D.3). N counts all parameters, as theirs: Pearce and Song 2024 (arXiv 2406.12907) trace Kaplan's different
exponents to counting without embeddings, which are a large part of small models.

Five values from a dozen finished models are not determined by the models alone: over a decade of N, E can be traded for
A and the exponents. So each exponent has a prior, Besiroglu et al.'s (2024, arXiv 2404.10102) estimate from 245 of
Hoffmann's models, that weighs as much as one model does: an exponent off by `PRIOR_WIDTH` costs what a loss costs that
is off by `HUBER_DELTA`. With many models it has no weight.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyllama_ds.errors import ConfigError

HUBER_DELTA = 1e-3  # of a difference of logarithms, where the loss turns from quadratic to linear; Hoffmann et al.'s
PRIOR_EXPONENTS = (0.3478, 0.3658)  # alpha and beta of Besiroglu et al. 2024
PRIOR_WIDTH = 0.1
DRAWS = 200
COVERAGE = 0.9  # of the interval of a prediction
_START = (0.35, 0.37)  # exponents
_STARTS_E = (0.2, 0.5, 0.8)  # E as a share of the lowest loss
_LARGEST_EXPONENT = 2.0


@dataclass(frozen=True)
class Points:
    """Finished models: parameters, tokens and loss of each, (n,) arrays."""

    parameters: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Fit:
    """Values of the law (5,), and those of bootstrap draws (draws, 5): log A, log B, log E, alpha, beta.

    `residuals` (n,) are log loss - log fit; `noise` (draws,) is that of one more model by each draw.
    """

    values: np.ndarray
    residuals: np.ndarray
    draws: np.ndarray
    noise: np.ndarray

    def loss(self, parameters: Any, tokens: Any) -> np.ndarray:
        """The law at arrays of one shape."""
        return np.exp(_log_losses(self.values, *np.broadcast_arrays(parameters, tokens)))

    def interval(self, parameters: float, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low and high end (m,) of what one new model's loss is at numbers of tokens (m,), with `COVERAGE`."""
        laws = np.array([_log_losses(draw, np.full(len(tokens), parameters), tokens) for draw in self.draws])
        losses = np.exp(laws + self.noise[:, None])
        low, high = np.quantile(losses, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
        return low, high

    @property
    def named(self) -> dict[str, float]:
        """E, A, alpha, B and beta."""
        log_a, log_b, log_e, alpha, beta = self.values
        return {
            "E": float(np.exp(log_e)), "A": float(np.exp(log_a)), "alpha": float(alpha),
            "B": float(np.exp(log_b)), "beta": float(beta),
        }  # fmt: skip


def fit(points: Points, draws: int, has_prior: bool = True) -> Fit:
    """The law of the points, and laws that could as well be true: a parametric bootstrap.

    Each draw is fitted to the law's losses with new noise, and to new centers of the priors. The size of the noise is
    drawn as well, as Student's t has it: a few residuals know it roughly. Points are not drawn, since each is one of a
    grid, and without some of them nothing tells N from D.
    """
    logs, lowest = np.log(points.losses), points.losses.min()
    prior = np.array(PRIOR_EXPONENTS) if has_prior else None
    starts = [_start(points, share * lowest) for share in _STARTS_E]
    best = min((_minimize(points, logs, start, prior) for start in starts), key=lambda found: found.fun)
    law = _log_losses(best.x, points.parameters, points.tokens)
    free = max(1, len(logs) - len(best.x))
    generator = np.random.default_rng(0)
    sizes = np.sqrt(((logs - law) ** 2).sum() / generator.chisquare(free, draws))
    again = [
        _minimize(
            points,
            generator.normal(law, size),
            best.x,
            None if prior is None else generator.normal(prior, PRIOR_WIDTH),
        ).x
        for size in sizes
    ]
    return Fit(best.x, logs - law, np.array(again).reshape(-1, len(best.x)), generator.normal(0, sizes))


def objective(values: np.ndarray, points: Points) -> float:
    """Hoffmann et al.'s: the sum of Huber losses between logarithms, without a prior."""
    from scipy.special import huber

    residuals = _log_losses(values, points.parameters, points.tokens) - np.log(points.losses)
    return float(huber(HUBER_DELTA, residuals).sum())


def require_scipy() -> None:
    """Raise `ConfigError` where scipy is not installed."""
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "a ladder's fit needs scipy, which is not installed; pip install tinyllama-ds[ladder]"
        ) from error


def _log_losses(values: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """log(E + A / N^alpha + B / D^beta), by logsumexp as in the paper."""
    return np.logaddexp.reduce(_terms(values, parameters, tokens), axis=0)


def _terms(values: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The logarithms of the three terms, (3, n)."""
    log_a, log_b, log_e, alpha, beta = values
    return np.stack(
        [log_a - alpha * np.log(parameters), log_b - beta * np.log(tokens), np.full(np.shape(tokens), log_e)]
    )


def _start(points: Points, e: float) -> np.ndarray:
    """Both terms explain half of what E leaves, at the middle of the points."""
    alpha, beta = _START
    left = np.log((points.losses.mean() - e) / 2)
    n, d = np.log(points.parameters).mean(), np.log(points.tokens).mean()
    return np.array([left + alpha * n, left + beta * d, np.log(e), alpha, beta])


def _minimize(points: Points, logs: np.ndarray, start: np.ndarray, prior: np.ndarray | None) -> Any:
    """scipy's result: values in `x`, and the objective in `fun`.

    In units of `HUBER_DELTA` squared: at its own size, L-BFGS's tolerances end it where it begins, which made
    Hoffmann et al.'s published values (Besiroglu et al. 2024).
    """
    from scipy.optimize import minimize
    from scipy.special import huber

    weight, expected = (0.0, np.zeros(2)) if prior is None else (HUBER_DELTA / PRIOR_WIDTH, prior)

    def with_gradient(values: np.ndarray) -> tuple[float, np.ndarray]:
        terms = _terms(values, points.parameters, points.tokens)
        fitted = np.logaddexp.reduce(terms, axis=0)
        a, b, e = np.exp(terms - fitted)
        slopes = np.stack([a, b, e, -a * np.log(points.parameters), -b * np.log(points.tokens)], axis=1)
        residuals = np.append(fitted - logs, weight * (values[3:] - expected))
        jacobian = np.vstack([slopes, weight * np.eye(5)[3:]])
        inner = np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)
        return huber(HUBER_DELTA, residuals).sum() / HUBER_DELTA**2, inner @ jacobian / HUBER_DELTA**2

    bounds = [(None, None), (None, None), (None, logs.min()), *[(0.0, _LARGEST_EXPONENT)] * 2]
    options = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-12, "gtol": 1e-9}
    return minimize(with_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
