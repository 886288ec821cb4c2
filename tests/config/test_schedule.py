"""The learning rate against TinyLlama's published function, written here a second time, and transformers' schedules."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_linear_schedule_with_warmup, get_wsd_schedule

from tinyllama_ds.config.recipe import load_recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.schedule import Schedule, make_schedule
from tinyllama_ds.errors import ConfigError

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
def schedule() -> Schedule:
    return Schedule(WARMUP * BATCH, decays=((WARMUP * BATCH, TOTAL * BATCH),), min_ratio=FLOOR / PEAK)


@pytest.mark.parametrize("step", [0, 1, WARMUP - 1, WARMUP, WARMUP + 1, 700_000, TOTAL - 1])
def test_equals_published_function(schedule: Schedule, step: int) -> None:
    rate = PEAK * schedule.ratio((step + 1) * BATCH)  # a step trains at the tokens seen once it is complete
    assert rate == pytest.approx(published(step + 1), rel=1e-12)
    # TinyLlama's loop sets the rate at each of 8 micro-batches; its step runs with the last one's, an eighth earlier.
    assert rate == pytest.approx(published(step + 7 / 8), abs=PEAK / WARMUP / 8 * 1.001)


def test_no_step_is_wasted_and_peak_and_floor_are_reached(schedule: Schedule) -> None:
    assert schedule.ratio(BATCH) > 0
    assert schedule.ratio(WARMUP * BATCH) == 1.0
    assert schedule.ratio(TOTAL * BATCH) == pytest.approx(0.1, rel=1e-12)
    assert schedule.ratio(10 * TOTAL * BATCH) == pytest.approx(0.1, rel=1e-12)


def test_warmup_starts_at_its_ratio() -> None:
    schedule = Schedule(1000, 0.2, ((1000, 2000),), "cosine", 0.1)
    assert schedule.ratio(0) == 0.2
    assert schedule.ratio(500) == pytest.approx(0.6)


def test_no_schedule_is_constant() -> None:
    assert {Schedule().ratio(tokens) for tokens in (0, 1, 10**12)} == {1.0}


def test_warmup_lr_stays_at_the_peak() -> None:
    schedule = Schedule(1000)
    assert [schedule.ratio(tokens) for tokens in (0, 500, 1000, 1500, 2000)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def plan_of(*stages: tuple[int, int]) -> RunPlan:
    """Stages of (steps, sequences per step), of 32 tokens each."""
    (stage, *_), length = load_recipe("demo").stages, 32
    sized = [
        replace(stage, tokens=steps * batch * length, global_batch_tokens=batch * length) for steps, batch in stages
    ]
    return RunPlan(replace(load_recipe("demo"), sequence_length=length, stages=tuple(sized)))


def made(plan: RunPlan, kind: str, **params: Any) -> Schedule:
    return make_schedule({"scheduler": {"type": kind, "params": params}}, Path("ds.json"), plan)


def reference(steps: list[int], make: Any, **params: Any) -> dict[int, float]:
    """The learning rates of a schedule of transformers after so many of its steps, at a peak of 1."""
    scheduler = make(torch.optim.SGD([torch.zeros(1)], lr=1.0), **params)
    return {step: scheduler.lr_lambdas[0](step) for step in steps}


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_wsd_is_that_of_transformers(shape: str, minimum: float) -> None:
    W, S, T = 7, 60, 100  # the last steps of warmup, stable phase and decay
    plan = plan_of((T, 4))
    params = {"num_warmup_steps": W, "num_decay_steps": T - S, "decay_type": shape, "min_lr_ratio": minimum}
    schedule = made(plan, "warmup_stable_decay", **params)
    expected = reference(
        [1, W - 1, W, S - 1, S, S + 1, T - 1, T, T + 1], get_wsd_schedule, num_training_steps=T, **params
    )
    assert {step: schedule.ratio(step * plan.first_batch_tokens) for step in expected} == pytest.approx(
        expected, abs=1e-15
    )


def test_warmup_decay_lr_is_a_line_to_zero() -> None:
    plan = plan_of((100, 4))
    schedule = made(plan, "WarmupDecayLR", warmup_num_steps=10, warmup_type="linear")
    expected = reference([1, 9, 10, 11, 55, 99, 100], get_linear_schedule_with_warmup, num_warmup_steps=10,
                         num_training_steps=100)  # fmt: skip
    assert {step: schedule.ratio(step * plan.first_batch_tokens) for step in expected} == pytest.approx(
        expected, abs=1e-15
    )


def test_a_decay_counts_tokens_where_the_batch_grows() -> None:
    plan = plan_of((10, 4), (10, 8))
    schedule = made(plan, "warmup_stable_decay", num_warmup_steps=0, num_decay_steps=8, decay_type="linear")
    ratios = [schedule.ratio(step.tokens_after) for step in plan.steps(0)]
    assert ratios == pytest.approx([1.0] * 16 + [0.75, 0.5, 0.25, 0.0])


def test_every_stage_may_end_with_a_decay() -> None:
    plan = plan_of((10, 4), (6, 4))
    params = {"num_warmup_steps": 2, "num_decay_steps": 2, "decay_type": "linear", "decay_each_stage": True}
    schedule = made(plan, "warmup_stable_decay", **params)
    ratios = [schedule.ratio(step.tokens_after) for step in plan.steps(0)]
    assert ratios == [0.5, *[1.0] * 7, 0.5, 0.0, *[1.0] * 4, 0.5, 0.0]


def test_every_stage_may_have_a_decay_of_its_own_length() -> None:
    plan = plan_of((10, 4), (6, 4), (4, 4))
    params = {"num_warmup_steps": 0, "num_decay_steps": [1, 3, 0], "decay_type": "linear", "decay_each_stage": True}
    schedule = made(plan, "warmup_stable_decay", **params)
    batch = plan.first_batch_tokens
    assert schedule.decays == ((9 * batch, 10 * batch), (13 * batch, 16 * batch))


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"num_warmup_steps": 3, "num_decay_steps": [2, 2]}, r"num_decay_steps are \[2, 2\]; .* each of the 2 stages$"),
        (
            {"num_warmup_steps": 3, "num_decay_steps": [2, 5], "decay_each_stage": True},
            "num_decay_steps 5 begin before 768 tokens, .* at most 4$",
        ),
        ({"num_warmup_steps": 3, "num_decay_steps": 8}, "num_decay_steps 8 begin before 384 tokens, .* at most 7$"),
        (
            {"num_warmup_steps": 3, "num_decay_steps": 5, "decay_each_stage": True},
            "num_decay_steps 5 begin before 384 tokens, .* at most 3$",
        ),
        ({"num_warmup_steps": 10, "num_decay_steps": 0}, "num_warmup_steps 10 leaves nothing of the run's 10 steps"),
    ],
)
def test_a_decay_that_does_not_fit_is_rejected(params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        made(plan_of((6, 4), (4, 4)), "warmup_stable_decay", **params)


def test_only_what_has_begun_decides_the_past() -> None:
    trunk, branch = (
        Schedule(100, decays=((900, 1000),), min_ratio=0.0),
        Schedule(100, decays=((500, 600),), min_ratio=0.1),
    )
    assert trunk.until(500) == branch.until(500) == Schedule(100)
    assert trunk.until(501) != branch.until(501)
    assert [trunk.until(950).ratio(tokens) for tokens in (50, 900, 950)] == [
        trunk.ratio(tokens) for tokens in (50, 900, 950)
    ]
