"""Learning rate, batch and mixture over tokens."""

from itertools import pairwise
from typing import TYPE_CHECKING

from tinyllama_ds.config.run_plan import PlannedStage
from tinyllama_ds.planning.plan import Plan
from tinyllama_ds.planning.timeline import Milestone, milestone_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 200
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_NAMED_SHARE = 0.02  # of the picture's width; no words fit into a narrower stage
_GRAY = "#555555"


def plan_figure(found: Plan) -> "Figure":
    """Three curves with the stages, their borders and what holds there."""
    from matplotlib.figure import Figure

    inputs = found.inputs
    peak = found.resolved["optimizer"]["params"].get("lr", 1e-3)
    points = [
        milestone_at(inputs.plan, inputs.schedule, peak, number)
        for number in _step_numbers(
            inputs.plan.total_steps, [milestone.step for milestone in found.timeline.milestones]
        )
    ]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    rate, batch, mixture = figure.subplots(3, 1, sharex=True)
    _draw_curves(points, inputs.recipe.sources, rate, batch, mixture)
    starts = [0]
    for stage in inputs.plan.stages:
        starts.append(starts[-1] + stage.samples * inputs.plan.sequence_length)
    for stage, (start, end) in zip(inputs.plan.stages, pairwise(starts), strict=True):
        for axis in (rate, batch, mixture):
            axis.axvline(start, color=_GRAY, linewidth=0.8, linestyle=":")
        if end - start >= _NAMED_SHARE * starts[-1]:
            _name_stage(stage, start, end, inputs.plan.sequence_length, (rate, batch, mixture))
    _name_rates(found.timeline.milestones, rate)
    figure.suptitle(f"{inputs.recipe.name}: {inputs.plan.total_steps:,} steps, {inputs.plan.total_tokens:,} tokens")
    return figure


def _draw_curves(points: list[Milestone], sources: list[str], rate: "Axes", batch: "Axes", mixture: "Axes") -> None:
    tokens = [point.tokens for point in points]
    rate.plot(tokens, [point.learning_rate for point in points])
    rate.set(ylabel="learning rate", ylim=(0, 1.35 * max(point.learning_rate for point in points)))
    batch.step(tokens, [point.batch_tokens for point in points], where="pre")
    batch.set(ylabel="batch, tokens", ylim=(0, 1.25 * max(point.batch_tokens for point in points)))
    batch.yaxis.set_major_formatter(lambda value, _: short_tokens(value))
    shares = [[100 * point.mixture[name] for point in points] for name in sources]
    mixture.stackplot(tokens, shares, labels=sources, alpha=0.8)
    mixture.set(ylabel="share of samples, %", xlabel="tokens", ylim=(0, 100), xlim=(0, tokens[-1]))
    mixture.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=len(sources), frameon=False)
    mixture.xaxis.set_major_formatter(lambda value, _: short_tokens(value))


def _name_stage(
    stage: PlannedStage, start: int, end: int, sequence_length: int, axes: "tuple[Axes, Axes, Axes]"
) -> None:
    """Its name and size above the learning rate, its batch, and its shares once they are reached."""
    rate, batch, mixture = axes
    middle, total = (start + end) / 2, sum(stage.weights.values())
    ramp = stage.ramp_samples * sequence_length
    words = f"{stage.name}\n{short_tokens(end - start)}" + (f"\nramp {short_tokens(ramp)}" if ramp else "")
    rate.annotate(words, (middle, 1), xycoords=("data", "axes fraction"), xytext=(0, -4), textcoords="offset points",
                  ha="center", va="top", color=_GRAY, fontsize=9)  # fmt: skip
    tokens = stage.batch * sequence_length
    batch.annotate(f"{tokens:,}", (middle, tokens), xytext=(0, 4), textcoords="offset points", ha="center",
                   color=_GRAY, fontsize=8)  # fmt: skip
    below = 0.0
    for weight in stage.weights.values():
        share = 100 * weight / total
        mixture.text((start + ramp + end) / 2, below + share / 2, f"{share:.4g}", ha="center", va="center", fontsize=8)
        below += share


def _name_rates(milestones: list[Milestone], rate: "Axes") -> None:
    """The learning rate at the end of the warm-up and of every stage."""
    for milestone in milestones:
        if milestone.name.startswith("end of") and "ramp" not in milestone.name:
            is_early = milestone.tokens < milestones[-1].tokens / 9
            rate.plot(milestone.tokens, milestone.learning_rate, "o", color=_GRAY, markersize=3)
            rate.annotate(
                f"{milestone.learning_rate:.3g}", (milestone.tokens, milestone.learning_rate), xytext=(-3, 7),
                textcoords="offset points", ha="left" if is_early else "right", color=_GRAY, fontsize=8,
            )  # fmt: skip


def short_tokens(tokens: float) -> str:
    """1.5T, 350B, 114.7k: four digits at most."""
    size, unit = next(((size, unit) for size, unit in _UNITS if tokens >= size), (1, ""))
    return f"{tokens / size:.4g}{unit}"


def _step_numbers(total: int, milestones: list[int]) -> list[int]:
    even = {max(1, round(total * point / _POINTS)) for point in range(_POINTS + 1)}
    return sorted(even | {number for milestone in milestones for number in (milestone, min(total, milestone + 1))})
