"""Steps, positions and batch sizes, derived from a recipe."""

from dataclasses import replace

import pytest

from tinyllama_ds.config.recipe import Recipe, Stage, load_recipe
from tinyllama_ds.config.run_plan import RunPlan, micro_batch_of
from tinyllama_ds.errors import ConfigError

T = 32


def recipe_of(*stages: tuple[int, int]) -> Recipe:
    """Stages of (tokens, sequences per step)."""
    return replace(
        load_recipe("demo"),
        sequence_length=T,
        stages=tuple(
            Stage(tokens=tokens, global_batch_tokens=batch * T, weights={"slimpajama": 1.0}) for tokens, batch in stages
        ),
    )


def test_steps_follow_each_other_without_gap_or_overlap() -> None:
    plan = RunPlan(recipe_of((10 * T, 4), (100 * T, 8), (T, 2)))
    steps = list(plan.steps(0))
    assert [step.batch for step in steps] == [4] * 3 + [8] * 13 + [2]
    assert plan.total_steps == len(steps) == 17
    position = 0
    for number, step in enumerate(steps):
        assert (step.number, step.first_position) == (number, position)
        position += step.batch
        assert (step.tokens_before, step.tokens_after) == (step.first_position * T, position * T)
    assert plan.total_tokens == position * T


def test_seeking_equals_walking() -> None:
    plan = RunPlan(recipe_of((10 * T, 4), (100 * T, 8)))
    assert list(plan.steps(5)) == list(plan.steps(0))[5:]
    with pytest.raises(IndexError):
        plan.step(plan.total_steps)


@pytest.mark.parametrize("interval", [T, 3 * T, 16 * T, 1000 * T])
def test_intervals_in_tokens_are_met_whatever_the_batch(interval: int) -> None:
    plan = RunPlan(recipe_of((30 * T, 4), (100 * T, 8)))
    due = [step for step in plan.steps(0) if step.crosses(interval)]
    reached = {step.tokens_after // interval for step in plan.steps(0)} - {0}
    assert {step.tokens_after // interval for step in due} == reached
    assert len(due) == len(reached)


@pytest.mark.parametrize(("asked", "ranks", "expected"), [(None, 1, 8), (None, 4, 2), (2, 2, 2), (1, 8, 1)])
def test_micro_batch(asked: int | None, ranks: int, expected: int) -> None:
    assert micro_batch_of(RunPlan(recipe_of((1000, 8))), asked, ranks) == expected


def test_micro_batch_must_divide_every_stage() -> None:
    plan = RunPlan(recipe_of((1000, 8), (1000, 12)))
    assert micro_batch_of(plan, None, 2) == 2
    with pytest.raises(ConfigError, match=r"8 does not divide the 4 sequences .* sizes that work: 1, 2$"):
        micro_batch_of(plan, 8, 2)


def test_ranks_that_do_not_divide_are_rejected_with_those_that_do() -> None:
    with pytest.raises(
        ConfigError, match=r"8 sequences does not divide over 3 data-parallel ranks; .* work: 1, 2, 4, 8$"
    ):
        micro_batch_of(RunPlan(recipe_of((1000, 8))), None, 3)


def test_auto_micro_batch_is_tinyllamas_on_an_a100() -> None:
    assert micro_batch_of(RunPlan(load_recipe("tinyllama-v1")), None, 16) == 8
