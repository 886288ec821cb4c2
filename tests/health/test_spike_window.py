"""What counts as a spike, compared with an independent median and in situations of a real run."""

import json
import math
import random

import numpy as np
import pytest

from tinyllama_ds.health.spikes import SpikeWindow


def full_window(losses: list[float], sigmas: float = 6.0) -> SpikeWindow:
    window = SpikeWindow(len(losses), sigmas)
    for loss in losses:
        assert window.find(loss * 100, 1.0) is None, "no judgement before the window is full"
        window.add(loss, 1.0)
    return window


def test_the_limit_is_median_and_deviation_of_the_window() -> None:
    rng = np.random.default_rng(1)
    losses = rng.normal(2.5, 0.05, 128)
    window = full_window(losses.tolist())
    deviation = 1.4826 * np.median(np.abs(losses - np.median(losses)))
    assert deviation == pytest.approx(0.05, rel=0.25), "an estimate of the standard deviation"
    limit = np.median(losses) + 6 * deviation
    assert window.find(limit - 1e-6, 1.0) is None
    spike = window.find(limit + 1e-6, 1.0)
    assert spike is not None
    assert (spike.metric, spike.threshold, spike.median) == (
        "loss",
        pytest.approx(limit),
        pytest.approx(np.median(losses)),
    )


def test_a_few_spikes_in_the_window_do_not_hide_a_later_one() -> None:
    """A mean and a standard deviation would be inflated by them."""
    rng = random.Random(1)
    losses = [rng.gauss(2.5, 0.02) for _ in range(128)]
    losses[5:125:10] = [50.0] * 12
    assert full_window(losses).find(4.0, 1.0) is not None
    assert np.mean(losses) + 6 * np.std(losses) > 4.0


def test_a_gradient_norm_spikes_too_and_only_upwards() -> None:
    window = full_window([2.5 + 0.01 * math.sin(n) for n in range(32)])
    assert window.find(0.1, 1.0) is None
    spike = window.find(2.5, 30.0)
    assert spike is not None
    assert spike.metric == "gradient norm"


def test_the_long_tail_of_gradient_norms_is_not_a_spike() -> None:
    """Six deviations above the median are reached every hundred steps; two and a half times the median is not."""
    window = full_window([2.5] * 128)
    norms = random.Random(1)
    for _ in range(1000):
        norm = norms.lognormvariate(0, 0.15)
        assert window.find(2.5, norm) is None
        window.add(2.5, norm)
    assert window.find(2.5, 3.0) is not None


def test_noise_on_a_plateau_is_not_a_spike() -> None:
    window = full_window([0.01] * 16)
    assert window.find(0.010001, 1.0) is None
    assert window.find(0.02, 1.0) is not None


def test_the_window_survives_json_to_the_last_bit() -> None:
    window = full_window([2.5 + 0.1 * math.sin(n) for n in range(32)])
    state = json.loads(json.dumps(window.state()))
    again = SpikeWindow(32, 6.0, **state)
    assert again.state() == window.state()
    assert again.find(9.0, 1.0) == window.find(9.0, 1.0)
