"""Learning rate, batch and mixture over tokens, as one PNG."""

import io

from tinyllama_ds.planning.answer import Answer
from tinyllama_ds.planning.course import border_at, sample_order

_POINTS = 200


def picture_of(found: Answer, sizes: dict[str, int]) -> bytes:
    """A PNG of three curves with the stages' borders."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    inputs = found.inputs
    order = sample_order(inputs.recipe, inputs.plan, sizes)
    peak = found.resolved["optimizer"]["params"].get("lr", 1e-3)
    points = [
        border_at(inputs.plan, inputs.schedule, peak, order, number)
        for number in _step_numbers(inputs.plan.total_steps, [border.step for border in found.course.borders])
    ]
    tokens = [point.tokens for point in points]
    figure = Figure(figsize=(11, 7), layout="constrained")
    rate, batch, mixture = figure.subplots(3, 1, sharex=True)
    rate.plot(tokens, [point.learning_rate for point in points])
    rate.set(ylabel="learning rate", ylim=(0, None))
    batch.step(tokens, [point.batch_tokens for point in points], where="pre")
    batch.set(ylabel="batch (tokens)", ylim=(0, None))
    batch.yaxis.set_major_formatter(EngFormatter())
    mixture.stackplot(
        tokens, [[point.mixture[name] for point in points] for name in order.sources], labels=order.sources, alpha=0.8
    )
    mixture.set(ylabel="share of samples", xlabel="tokens", ylim=(0, 1))
    mixture.legend(loc="lower left")
    mixture.xaxis.set_major_formatter(EngFormatter())
    done = 0
    for stage in inputs.plan.stages:
        for axis in (rate, batch, mixture):
            axis.axvline(done, color="gray", linewidth=0.6, linestyle=":")
        rate.annotate(stage.name, (done, 0), xytext=(4, 4), textcoords="offset points", color="gray")
        done += stage.samples * inputs.plan.sequence_length
    figure.suptitle(f"{inputs.recipe.name}: {inputs.plan.total_steps:,} steps, {inputs.plan.total_tokens:,} tokens")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    return drawn.getvalue()


def _step_numbers(total: int, borders: list[int]) -> list[int]:
    even = {max(1, round(total * point / _POINTS)) for point in range(_POINTS + 1)}
    return sorted(even | {number for border in borders for number in (border, min(total, border + 1))})
