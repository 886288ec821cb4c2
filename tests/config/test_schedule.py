"""The learning rate against TinyLlama's published function, written here a second time from its repository."""

import math

import pytest

from tinyllama_ds.config.schedule import ConstantSchedule, CosineSchedule

BATCH = 2_097_152  # tokens per step of TinyLlama v1
WARMUP, TOTAL = 2000, 1_430_512  # steps
PEAK, FLOOR = 4e-4, 4e-5


def published(it: float) -> float:
    """get_lr of pretrain/tinyllama.py, with `it` in optimizer steps."""
    if it < WARMUP:
        return PEAK * it / WARMUP
    if it > TOTAL:
        return FLOOR
    decay_ratio = (it - WARMUP) / (TOTAL - WARMUP)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return FLOOR + coeff * (PEAK - FLOOR)


@pytest.fixture
def schedule() -> CosineSchedule:
    return CosineSchedule(WARMUP * BATCH, TOTAL * BATCH, warmup_min_ratio=0.0, min_ratio=FLOOR / PEAK)


@pytest.mark.parametrize("step", [0, 1, WARMUP - 1, WARMUP, WARMUP + 1, 700_000, TOTAL - 1])
def test_equals_published_function(schedule: CosineSchedule, step: int) -> None:
    rate = PEAK * schedule.ratio((step + 1) * BATCH)  # a step trains at the tokens seen once it is complete
    assert rate == pytest.approx(published(step + 1), rel=1e-12)
    # TinyLlama's loop sets the rate at each of 8 micro-batches; its step runs with the last one's, an eighth earlier.
    assert rate == pytest.approx(published(step + 7 / 8), abs=PEAK / WARMUP / 8 * 1.001)


def test_no_step_is_wasted_and_peak_and_floor_are_reached(schedule: CosineSchedule) -> None:
    assert schedule.ratio(BATCH) > 0
    assert schedule.ratio(WARMUP * BATCH) == 1.0
    assert schedule.ratio(TOTAL * BATCH) == pytest.approx(0.1, rel=1e-12)
    assert schedule.ratio(10 * TOTAL * BATCH) == pytest.approx(0.1, rel=1e-12)


def test_depends_on_tokens_alone() -> None:
    """Four times the batch leaves the rate at a token count where it was, as v1.1's third stage needs."""
    small = CosineSchedule(10 * 8, 100 * 8, 0.0, 0.1)
    for tokens in range(32, 800, 32):
        assert small.ratio(tokens) == CosineSchedule(80, 800, 0.0, 0.1).ratio(tokens)


def test_warmup_starts_at_its_ratio() -> None:
    schedule = CosineSchedule(1000, 2000, warmup_min_ratio=0.2, min_ratio=0.1)
    assert schedule.ratio(0) == 0.2
    assert schedule.ratio(500) == pytest.approx(0.6)


def test_no_schedule_is_constant() -> None:
    assert {ConstantSchedule().ratio(tokens) for tokens in (0, 1, 10**12)} == {1.0}


def test_warmup_lr_stays_at_the_peak() -> None:
    schedule = CosineSchedule(1000, 2000, warmup_min_ratio=0.0, min_ratio=1.0)
    assert [schedule.ratio(tokens) for tokens in (0, 500, 1000, 1500, 2000)] == [0.0, 0.5, 1.0, 1.0, 1.0]
