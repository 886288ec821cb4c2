"""A ladder as tables and charts, on the console and on its page."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tinyllama_ds.ladder.definition import Ladder
from tinyllama_ds.ladder.fit import COVERAGE
from tinyllama_ds.ladder.result import LadderResult, Prediction, SourceFit, points_of, warnings_of
from tinyllama_ds.numbers import duration, short_count
from tinyllama_ds.page import Table, chart, render
from tinyllama_ds.report.history import History

_CURVE = 100  # points of a drawn law
_FORM = (
    "L(N, D) = E + A / N^alpha + B / D^beta over all parameters N and tokens D, Huber loss between logarithms"
    " (Hoffmann et al. 2022, Approach 3), priors of the exponents by Besiroglu et al. 2024;"
    f" intervals: {COVERAGE:.0%}, parametric bootstrap, noise of a single run included."
)


def sizes_table(ladder: Ladder, flops_per_second: float, source: str) -> Table:
    """What is trained; the time of each at a rate of all ranks of a host, or 0 where it is not known."""
    T = ladder.recipe.sequence_length
    flops = [size.flops(T) for size in ladder.sizes]
    head = ("size", "layers", "width", "parameters", "finished at tokens", "learning rate", "FLOPs", "time")
    rows = [
        (
            *(size.name, str(size.model.num_hidden_layers), str(size.model.hidden_size)),
            *(f"{size.model.num_parameters:,}", ", ".join(map(short_count, size.tokens))),
            "as configured" if size.learning_rate is None else f"{size.learning_rate:.3g}",
            *(f"{needed:.2e}", duration(needed / flops_per_second) if flops_per_second else ""),
        )
        for size, needed in zip(ladder.sizes, flops, strict=True)
    ]
    total = duration(sum(flops) / flops_per_second) if flops_per_second else ""
    rows.append(("all", "", "", "", "", "", f"{sum(flops):.2e}", total))
    large = ladder.recipe.model.num_parameters
    note = f"To predict {ladder.recipe.name}: {large:,} parameters. {source}".strip()
    return Table("Sizes", head, rows, note, text_columns=(0, 4))


def predicted_table(fits: Mapping[str, SourceFit], parameters: int, tokens: Sequence[int], title: str) -> Table:
    """Losses of a model that is finished at any of these tokens: a row each, two columns per source."""
    columns = [fitted.predictions(parameters, tokens) for fitted in fits.values()]
    head = ("finished at tokens", *(part for source in fits for part in (source, f"{COVERAGE:.0%} interval")))
    rows = [
        (f"{count:,}", *(part for one in row for part in (f"{one.loss:.3f}", interval_text(one))))
        for count, row in zip(tokens, zip(*columns, strict=True), strict=True)
    ]
    return Table(title, head, rows, _FORM, text_columns=())


def interval_text(one: Prediction) -> str:
    """Low to high, in nats."""
    return f"{one.low:.3f} to {one.high:.3f}"


def held_out_table(result: LadderResult) -> Table:
    """The largest size as predicted without it, next to what it reached."""
    head = ("source", "size", "tokens", "predicted", f"{COVERAGE:.0%} interval", "measured", "difference", "inside")
    rows = [
        (
            *(source, held.size, f"{held.predicted.tokens:,}", f"{held.predicted.loss:.3f}"),
            *(interval_text(held.predicted), f"{held.measured:.3f}", f"{held.error:+.3f}"),
            "yes" if held.is_inside else "NO",
        )
        for source, fitted in result.sources.items()
        for held in fitted.held_out
    ]
    note = "The largest size, predicted by a fit to the smaller ones alone; in nats."
    return Table("Held-out check", head, rows, note, text_columns=(0, 1, 7))


def law_table(result: LadderResult) -> Table:
    """The fitted values, and the largest residual in nats."""
    rows = []
    for source, fitted in result.sources.items():
        points, named = points_of(fitted.measurements), fitted.fit.named
        largest = np.abs(points.losses * (1 - np.exp(-fitted.fit.residuals))).max()
        rows.append((source, *(f"{named[name]:.4g}" for name in ("E", "A", "alpha", "B", "beta")), f"{largest:.3f}"))
    return Table("Fit", ("source", "E", "A", "alpha", "B", "beta", "largest residual, nats"), rows, _FORM)


def ladder_page(ladder: Ladder, result: LadderResult, histories: Mapping[str, History]) -> str:
    """One self-contained HTML page."""
    predicted = predicted_table(result.sources, result.parameters, [result.tokens], f"Predicted: {result.recipe}")
    charts = [
        chart(partial(draw_law, fitted=fitted, target=(result.parameters, result.tokens)), f"Finished models, {source}")
        for source, fitted in result.sources.items()
    ]
    charts += [
        chart(partial(draw_residuals, fitted=fitted), f"Residuals, {source}")
        for source, fitted in result.sources.items()
    ]
    warnings = warnings_of(result)
    is_inside = all(fitted.held_out[-1].is_inside for fitted in result.sources.values())
    losses = chart(partial(draw_training, histories=histories), "Training loss of all sizes", is_wide=True)
    return render(
        "ladder.html", title=f"Ladder: {result.name}", verdict=verdict(result), passed=is_inside, warnings=warnings,
        charts=[*charts, losses],
        tables=[predicted, held_out_table(result), law_table(result), sizes_table(ladder, 0.0, "")],
    )  # fmt: skip


def verdict(result: LadderResult) -> str:
    """The prediction in one sentence."""
    parts = []
    for source, fitted in result.sources.items():
        (one,) = fitted.predictions(result.parameters, [result.tokens])
        parts.append(f"{source} {one.loss:.3f} ({interval_text(one)})")
    return (
        f"{result.recipe}, {short_count(result.parameters)} parameters at {short_count(result.tokens)} tokens:"
        f" predicted final validation loss {', '.join(parts)}"
    )


def draw_law(axis: Any, fitted: SourceFit, target: tuple[int, int]) -> None:
    """Finished models over tokens with the law of their size, and the predicted curve of the large model."""
    parameters, total = target
    first = min(one.tokens for one in fitted.measurements)
    for number, size in enumerate(dict.fromkeys(one.size for one in fitted.measurements)):
        of_size = [one for one in fitted.measurements if one.size == size]
        tokens = np.geomspace(of_size[0].tokens, of_size[-1].tokens, _CURVE)
        axis.plot(tokens, fitted.fit.loss(of_size[0].parameters, tokens), color=f"C{number}", linewidth=0.9)
        losses = [one.loss for one in of_size]
        label = f"{size}, {short_count(of_size[0].parameters)}"
        axis.plot([one.tokens for one in of_size], losses, "o", color=f"C{number}", markersize=4, label=label)
    draw_predicted(axis, fitted, parameters, np.geomspace(first, total, _CURVE))
    axis.set_xscale("log")
    finish(axis, "loss, nats per token")


def draw_predicted(axis: Any, fitted: SourceFit, parameters: int, tokens: np.ndarray) -> None:
    """The law of one size over tokens, with the interval of one model."""
    found = fitted.predictions(parameters, [round(count) for count in tokens])
    color, label = axis.xaxis.label.get_color(), f"predicted, {short_count(parameters)}: {found[-1].loss:.3f}"
    axis.plot(tokens, [one.loss for one in found], "--", color=color, linewidth=1.0, label=label)
    axis.fill_between(tokens, [one.low for one in found], [one.high for one in found], color=color, alpha=0.15)


def draw_residuals(axis: Any, fitted: SourceFit) -> None:
    """Measured less fitted over tokens, by size."""
    residuals = [
        one.loss * (1 - np.exp(-left)) for one, left in zip(fitted.measurements, fitted.fit.residuals, strict=True)
    ]
    for number, size in enumerate(dict.fromkeys(one.size for one in fitted.measurements)):
        pairs = [
            (one.tokens, left) for one, left in zip(fitted.measurements, residuals, strict=True) if one.size == size
        ]
        axis.plot(*zip(*pairs, strict=True), "o-", color=f"C{number}", markersize=4, linewidth=0.7, label=size)
    axis.axhline(0, color=axis.xaxis.label.get_color(), linewidth=0.8)
    axis.set_xscale("log")
    finish(axis, "measured - fitted, nats")


def draw_training(axis: Any, histories: Mapping[str, History]) -> None:
    """Every logged step of all sizes."""
    for number, (name, history) in enumerate(histories.items()):
        axis.plot(*history.points("Train/Loss"), linewidth=0.8, color=f"C{number}", label=name)
    finish(axis, "loss, nats per token")


def finish(axis: Any, label: str) -> None:
    """Labels and the legend, over tokens."""
    from matplotlib.ticker import LogLocator

    axis.set(xlabel="tokens", ylabel=label)
    if axis.get_xscale() == "log":
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axis.xaxis.set_minor_formatter("")
    axis.legend(loc="best")
