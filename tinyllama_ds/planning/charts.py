"""Learning rate, batch and mixture of a plan over tokens, for its page and as one picture."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tinyllama_ds.config.run_plan import PlannedStage
from tinyllama_ds.numbers import short_count
from tinyllama_ds.planning.plan import Plan
from tinyllama_ds.planning.timeline import Milestone, milestone_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 200
_MIN_LABELED_SHARE = 0.02  # of the width; a narrower stage has no space for a label


def draw_learning_rate(axis: Any, plan: Plan) -> None:
    """Labeled at the end of the warmup, before a decay, and at the end of every stage."""
    points = _points(plan)
    axis.plot([point.tokens for point in points], [point.learning_rate for point in points])
    axis.set(ylabel="learning rate", ylim=(0, 1.35 * max(point.learning_rate for point in points)))
    for stage, start, end in _labeled_stages(plan):
        ramp = stage.ramp_samples * plan.inputs.plan.sequence_length
        label = f"{stage.name}\n{short_count(end - start)}" + (f"\nramp {short_count(ramp)}" if ramp else "")
        _label(axis, label, ((start + end) / 2, 1), (0, -4), xycoords=("data", "axes fraction"), va="top")
    for milestone in plan.timeline.milestones:
        if milestone.name.startswith(("end of", "start of decay")) and "ramp" not in milestone.name:
            is_early = milestone.tokens < plan.inputs.plan.total_tokens / 9
            at = milestone.tokens, milestone.learning_rate
            axis.plot(*at, "o", color=axis.xaxis.label.get_color(), markersize=3)
            _label(axis, f"{milestone.learning_rate:.3g}", at, (-3, 7), ha="left" if is_early else "right")
    _finish(axis, plan)


def draw_batch(axis: Any, plan: Plan) -> None:
    """Tokens of a step, labeled for every stage."""
    points = _points(plan)
    axis.step([point.tokens for point in points], [point.batch_tokens for point in points], where="pre")
    axis.set(ylabel="batch, tokens", ylim=(0, 1.25 * max(point.batch_tokens for point in points)))
    axis.yaxis.set_major_formatter(lambda value, _: short_count(value))
    for stage, start, end in _labeled_stages(plan):
        tokens = stage.batch * plan.inputs.plan.sequence_length
        _label(axis, f"{tokens:,}", ((start + end) / 2, tokens), (0, 4))
    _finish(axis, plan)


def _label(axis: Any, text: str, at: tuple[float, float], offset: tuple[int, int], **options: Any) -> None:
    """Text at some points from a place."""
    look = {"ha": "center", "color": axis.xaxis.label.get_color()} | options
    axis.annotate(text, at, xytext=offset, textcoords="offset points", **look)


def draw_mixture(axis: Any, plan: Plan) -> None:
    """Shares of the sources, labeled where a stage has reached them."""
    points, sources = _points(plan), plan.inputs.recipe.sources
    shares = [[100 * point.mixture[name] for point in points] for name in sources]
    axis.stackplot([point.tokens for point in points], shares, labels=sources, alpha=0.8)
    axis.set(ylabel="share of samples, %", ylim=(0, 100))
    axis.grid(visible=False)
    for stage, start, end in _labeled_stages(plan):
        ramp = stage.ramp_samples * plan.inputs.plan.sequence_length
        below = 0.0
        for weight in stage.weights.values():
            share = 100 * weight / sum(stage.weights.values())
            axis.text((start + ramp + end) / 2, below + share / 2, f"{share:.4g}", ha="center", va="center")
            below += share
    _finish(axis, plan)
    axis.set_xlabel("tokens")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(sources), frameon=False)


CHARTS: tuple[tuple[str, Callable[[Any, Plan], None]], ...] = (
    ("Learning rate", draw_learning_rate),
    ("Batch", draw_batch),
    ("Mixture", draw_mixture),
)


def plan_figure(plan: Plan) -> "Figure":
    """All charts below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axis, (_, draw) in zip(figure.subplots(len(CHARTS), 1, sharex=True), CHARTS, strict=True):
        draw(axis, plan)
    run = plan.inputs.plan
    figure.suptitle(f"{plan.inputs.recipe.name}: {run.total_steps:,} steps, {run.total_tokens:,} tokens")
    return figure


def _points(plan: Plan) -> list[Milestone]:
    """The run at evenly spread steps, and at the steps of the milestones and after them."""
    run, total = plan.inputs.plan, plan.inputs.plan.total_steps
    steps = {max(1, round(total * point / _POINTS)) for point in range(_POINTS + 1)}
    for milestone in plan.timeline.milestones:
        steps |= {milestone.step, min(total, milestone.step + 1)}
    return [milestone_at(run, plan.inputs.schedule, plan.peak_learning_rate, step) for step in sorted(steps)]


def _stages(plan: Plan) -> Iterator[tuple[PlannedStage, int, int]]:
    """Every stage with its first and last token."""
    run, starts = plan.inputs.plan, [0]
    for stage in run.stages:
        starts.append(starts[-1] + stage.samples * run.sequence_length)
    for stage, (start, end) in zip(run.stages, pairwise(starts), strict=True):
        yield stage, start, end


def _labeled_stages(plan: Plan) -> list[tuple[PlannedStage, int, int]]:
    widest = _MIN_LABELED_SHARE * plan.inputs.plan.total_tokens
    return [(stage, start, end) for stage, start, end in _stages(plan) if end - start >= widest]


def _finish(axis: Any, plan: Plan) -> None:
    """Tokens below, and a dotted line where a stage begins."""
    axis.set_xlim(0, plan.inputs.plan.total_tokens)
    axis.xaxis.set_major_formatter(lambda value, _: short_count(value))
    for _, start, _ in _stages(plan):
        axis.axvline(start, color=axis.xaxis.label.get_color(), linewidth=0.8, linestyle=":")
