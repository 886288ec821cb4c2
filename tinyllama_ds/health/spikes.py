"""Spikes of the loss or the gradient norm, by robust statistics over the last steps that were applied."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

_SIGMA_OF_MAD = 1.4826  # standard deviation of a normal distribution / its median absolute deviation
# The least deviation, as a fraction of the median: a loss on a plateau varies little, and gradient norms have
# long tails (six in 700 steps of a small model lay beyond six deviations, none beyond 1.9 times the median).
_MIN_SPREAD = {"loss": 0.01, "grad_norm": 0.25}


@dataclass(frozen=True)
class Spike:
    """A metric far above that of the steps before."""

    metric: str
    value: float
    median: float  # of the window
    threshold: float  # above it a value is a spike

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4g}, beyond {self.threshold:.4g} (median {self.median:.4g})"


class SpikeWindow:
    """Loss and gradient norm of the last good steps; the state moves from one process of a run to the next.

    A value is a spike when it lies more than `sigmas` standard deviations above the median, the deviation estimated as
    1.4826 times the median absolute deviation: nearly half of the window may be outliers before either moves far.
    There are no spikes before the window is full.
    """

    def __init__(self, size: int, sigmas: float, loss: Iterable[float] = (), grad_norm: Iterable[float] = ()) -> None:
        self._sigmas = sigmas
        self._values = {"loss": deque(loss, maxlen=size), "grad_norm": deque(grad_norm, maxlen=size)}

    def find(self, loss: float, grad_norm: float) -> Spike | None:
        """The spike that these finite values are, if any; the loss is checked first."""
        for metric, value in {"loss": loss, "grad_norm": grad_norm}.items():
            window = self._values[metric]
            if len(window) < (window.maxlen or 0):
                continue
            middle, threshold = _threshold(window, self._sigmas, _MIN_SPREAD[metric])
            if value > threshold:
                return Spike(metric.replace("grad_norm", "gradient norm"), value, middle, threshold)
        return None

    def add(self, loss: float, grad_norm: float) -> None:
        """Add the finite values of a step that was applied."""
        self._values["loss"].append(loss)
        self._values["grad_norm"].append(grad_norm)

    def state(self) -> dict[str, list[float]]:
        """What the constructor takes; exact as JSON."""
        return {metric: list(values) for metric, values in self._values.items()}


def _threshold(window: Iterable[float], sigmas: float, min_spread: float) -> tuple[float, float]:
    """The median of a window, and the threshold of a spike."""
    values = list(window)
    middle = median(values)
    spread = _SIGMA_OF_MAD * median(abs(value - middle) for value in values)
    return middle, middle + sigmas * max(spread, min_spread * abs(middle))
