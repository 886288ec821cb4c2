"""Spikes of the loss or the gradient norm, by robust statistics over the last steps that were applied."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

_SIGMA_OF_MAD = 1.4826  # standard deviation of a normal distribution / its median absolute deviation
# Of the median, what counts as one deviation at least: a loss that stands still may tremble, and gradient norms have
# long tails (six in 700 steps of a small model lay beyond six deviations, none beyond 1.9 times the median).
_LEAST_SPREAD = {"loss": 0.01, "grad_norm": 0.25}


@dataclass(frozen=True)
class Spike:
    """A figure far above what the steps before it had."""

    figure: str
    value: float
    median: float  # of the window
    limit: float  # from which on a value is a spike

    def __str__(self) -> str:
        return f"{self.figure} {self.value:.4g}, beyond {self.limit:.4g} (median {self.median:.4g})"


class SpikeWindow:
    """Loss and gradient norm of the last good steps; to be carried from one process of a run to the next.

    A value is a spike when it lies more than `sigmas` standard deviations above the median, the deviation estimated as
    1.4826 times the median absolute deviation: nearly half of the window may be outliers before either moves far.
    Nothing is judged before the window is full.
    """

    def __init__(self, size: int, sigmas: float, loss: Iterable[float] = (), grad_norm: Iterable[float] = ()) -> None:
        self._sigmas = sigmas
        self._values = {"loss": deque(loss, maxlen=size), "grad_norm": deque(grad_norm, maxlen=size)}

    def find(self, loss: float, grad_norm: float) -> Spike | None:
        """The spike that these finite figures are, if any; the loss is looked at first."""
        for figure, value in {"loss": loss, "grad_norm": grad_norm}.items():
            window = self._values[figure]
            if len(window) < (window.maxlen or 0):
                continue
            middle, limit = _limit(window, self._sigmas, _LEAST_SPREAD[figure])
            if value > limit:
                return Spike(figure.replace("grad_norm", "gradient norm"), value, middle, limit)
        return None

    def add(self, loss: float, grad_norm: float) -> None:
        """Take in the finite figures of a step that was applied."""
        self._values["loss"].append(loss)
        self._values["grad_norm"].append(grad_norm)

    def state(self) -> dict[str, list[float]]:
        """What the constructor takes; survives JSON to the last bit."""
        return {figure: list(values) for figure, values in self._values.items()}


def _limit(window: Iterable[float], sigmas: float, least_spread: float) -> tuple[float, float]:
    """The median of a window, and the value from which on a spike begins."""
    values = list(window)
    middle = median(values)
    spread = _SIGMA_OF_MAD * median(abs(value - middle) for value in values)
    return middle, middle + sigmas * max(spread, least_spread * abs(middle))
