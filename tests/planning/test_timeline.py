"""The planned timeline of a run is what the order draws."""

import pytest

from tinyllama_ds.config.recipe import load_recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.schedule import Schedule
from tinyllama_ds.planning.timeline import milestone_at, sample_order


@pytest.mark.parametrize("name", ["demo-v1.1", "demo-v1.1-math-code", "demo-v1.1-chinese"])
def test_the_planned_mixture_sums_up_to_what_is_drawn(name: str) -> None:
    """In a run of a few hundred steps too, and within its ramp."""
    recipe = load_recipe(name)
    plan = RunPlan(recipe)
    order = sample_order(recipe, plan, {})
    planned = dict.fromkeys(recipe.sources, 0.0)
    for step in plan.steps(0):
        mixture = milestone_at(plan, Schedule(), 1.0, step.number + 1).mixture
        assert sum(mixture.values()) == pytest.approx(1)
        for source, share in mixture.items():
            planned[source] += share * step.batch
        drawn = order.counts(step.first_position + step.batch)
        assert drawn == pytest.approx(planned, abs=1.5), step.number
