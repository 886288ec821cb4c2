"""A recipe without one of its sources: what is excluded, from where on, and what stays."""

from dataclasses import replace

import pytest

from tinyllama_ds.config.ablation import Ablation
from tinyllama_ds.config.recipe import Recipe, Stage, load_recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.errors import ConfigError

BATCH = 256


@pytest.fixture
def recipe() -> Recipe:
    """10 steps of a and b, 6 of all three with a ramp over 2, and 4 of c alone."""
    stages = (
        Stage(name="one", tokens=10 * BATCH - 1, global_batch_tokens=BATCH, weights={"a": 3, "b": 1}),
        Stage(
            name="two", tokens=6 * BATCH, global_batch_tokens=BATCH, weights={"a": 1, "b": 1, "c": 2}, ramp_tokens=512
        ),
        Stage(name="three", tokens=4 * BATCH, global_batch_tokens=BATCH, weights={"c": 1}),
    )
    return replace(load_recipe("demo"), name="mixed", sequence_length=32, stages=stages)


@pytest.mark.parametrize(
    ("ablation", "expected"),
    [
        (Ablation("b"), [("one", 10, "a"), ("two", 6, "ac"), ("three", 4, "c")]),
        (
            Ablation("b", 4 * BATCH),
            [("one", 4, "ab"), ("one without b", 6, "a"), ("two", 6, "ac"), ("three", 4, "c")],
        ),
        (
            Ablation("b", 12 * BATCH),
            [("one", 10, "ab"), ("two", 2, "abc"), ("two without b", 4, "ac"), ("three", 4, "c")],
        ),
    ],
    ids=str,
)
def test_the_others_keep_their_proportions_and_every_step(ablation: Ablation, expected: list, recipe: Recipe) -> None:
    found = ablation.apply(recipe)
    plan, whole = RunPlan(found), RunPlan(recipe)
    assert [(stage.name, stage.steps, "".join(stage.weights)) for stage in plan.stages] == expected
    assert [step.tokens_after for step in plan.steps(0)] == [step.tokens_after for step in whole.steps(0)]
    weights = [stage.weights for stage in found.stages]
    assert weights[-2] == {"a": 1, "c": 2}
    assert found.stages[-2].ramp_tokens == (0 if "without" in found.stages[-2].name else 512)
    assert replace(found, stages=recipe.stages) == recipe


@pytest.mark.parametrize(
    ("ablation", "sentence"),
    [
        (Ablation("d"), "--without d: expected a source of the recipe 'mixed': a, b, c"),
        (Ablation("c"), "--without c: stage 'three' has no other source; expected one of at least two"),
        (
            Ablation("b", 16 * BATCH),
            "--without b@4096: no stage of the recipe 'mixed' has this source any more at 4,096",
        ),
        (Ablation("b", 11 * BATCH), "--without b@2816: the mixture changes there until 3,072 tokens; expected a later"),
    ],
    ids=str,
)
def test_what_cannot_be_excluded_is_rejected(ablation: Ablation, sentence: str, recipe: Recipe) -> None:
    with pytest.raises(ConfigError) as error:
        ablation.apply(recipe)
    assert str(error.value).startswith(sentence)
