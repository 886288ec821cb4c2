"""The pictures of the suite `long-context`, each drawn into given matplotlib axes."""

from collections.abc import Mapping, Sequence
from math import exp
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _TEXT = "#0072b2", "#1d2126"  # series-0 and text of templates/colors.toml, which a page replaces
_MARKED = 0.75  # opacity of a cell in which all answers are right; the text on it stays readable

CONTEXTS = "Perplexity of the same tokens by context, with errors of the difference from the shortest"


def draw_positions(axis: Any, results: Mapping[str, dict[str, Any]]) -> None:
    """Perplexity by position, a line per model, with standard errors."""
    for number, (name, part) in enumerate(results.items()):
        if rows := part.get("positions"):
            middles = [(row["first"] * row["end"]) ** 0.5 for row in rows]
            _draw_losses(axis, middles, rows, f"C{number}", name)
    _finish(axis, "position in the document, tokens")


def draw_contexts(axis: Any, results: Mapping[str, dict[str, Any]]) -> None:
    """Perplexity of the same tokens by the length of their context, a line per model, with the standard errors of the
    differences from the shortest: documents differ more from each other than any context changes them.
    """
    for number, (name, part) in enumerate(results.items()):
        if rows := part.get("contexts"):
            paired = [{"value": row["value"], "stderr": row["difference"]["stderr"]} for row in rows]
            _draw_losses(axis, [row["context"] for row in rows], paired, f"C{number}", name)
    _finish(axis, "longest context, tokens")


def _draw_losses(axis: Any, places: list[float], rows: list[dict[str, Any]], color: str, name: str) -> None:
    losses, errors = ([row[key] or 0.0 for row in rows] for key in ("value", "stderr"))
    low, high = (
        [exp(min(loss + sign * error, 700)) for loss, error in zip(losses, errors, strict=True)] for sign in (-1, 1)
    )
    axis.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    axis.plot(places, [exp(min(loss, 700)) for loss in losses], color=color, marker="o", markersize=3.5, label=name)


def _finish(axis: Any, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set(xlabel=label, ylabel="perplexity")
    if any(axis.get_legend_handles_labels()[1]):
        axis.legend(loc="best")


def draw_needle(axis: Any, needle: dict[str, Any], lengths: Sequence[int] = ()) -> None:
    """Shares of right answers, a column per length, a row per depth; the darker the more. `lengths` are the columns,
    by default those that were measured.
    """
    from matplotlib.patches import Rectangle

    depths = sorted({cell["depth"] for cell in needle["cells"]})
    lengths = lengths or lengths_of(needle)
    for cell in needle["cells"]:
        column, row = lengths.index(cell["length"]), depths.index(cell["depth"])
        share = cell["right"] / cell["questions"]
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=_BLUE, alpha=_MARKED * share, linewidth=0))
        axis.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7.5, color=_TEXT)
    axis.set_xlim(-0.5, len(lengths) - 0.5)
    axis.set_ylim(len(depths) - 0.5, -0.5)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
    axis.grid(visible=False)
    axis.tick_params(length=0)
    axis.set(xlabel="length, tokens", ylabel="depth of the needle")


def lengths_of(needle: dict[str, Any]) -> list[int]:
    """The lengths that were measured, ascending."""
    return sorted({cell["length"] for cell in needle["cells"]})


def long_context_figure(found: dict[str, Any]) -> "Figure":
    """All pictures of one model side by side."""
    from matplotlib.figure import Figure

    part = found["long_context"]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    positions, contexts, needle = figure.subplots(1, 3)
    draw_positions(positions, {"": part})
    draw_contexts(contexts, {"": part})
    draw_needle(needle, part["needle"])
    titles = {
        positions: "Perplexity by position",
        contexts: CONTEXTS,
        needle: f"Needle in a haystack: right answers (chance: {1 / part['needle']['choices']:.0%})",
    }
    for axis, title in titles.items():
        axis.set_title(title, fontsize=10)
    for axis in (positions, contexts):
        axis.grid(alpha=0.3)
    figure.suptitle(found["model"])
    return figure
