"""The charts of a run over tokens, each drawn into given matplotlib axes, with the starts of its stages."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyllama_ds.numbers import short_count
from tinyllama_ds.report.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIXTURE_COLUMNS = 96
_LINES = ("-", "--", ":", "-.")  # where lines outnumber colors


def draw_losses(axis: Any, history: History) -> None:
    """Training and validation losses, with every stage, restart and spike."""
    tokens, losses = history.points("Train/Loss")
    axis.plot(tokens, losses, linewidth=0.8, alpha=0.7, label="training, every logged step")
    firsts, lowest = [], []
    for source in history.names("Validation/Loss/"):
        points = history.points(f"Validation/Loss/{source}")
        firsts.append(points[1][0])
        lowest.append(points[1].min())
        label = f"validation, {source}: {points[1][-1]:.3f}"
        axis.plot(*points, marker="o", markersize=3.5, label=label, clip_on=False)
    if len(losses):  # a spike may be cut off, the start may not
        highest = max([losses[: max(1, len(losses) // 50)].max(), *firsts])
        low = min([highest - 0.1, losses.min(), *lowest])
        axis.set_ylim(low - 0.05 * (highest - low), highest + 0.15 * (highest - low))
    _mark(axis, [start["tokens"] for start in history.starts[1:]], "^", "start", height=0.02)
    length = history.description.get("recipe", {}).get("sequence_length", 0)
    skipped = [entry["first_sample"] * length for entry in history.ledger]
    _mark(axis, skipped, "x", "step skipped or rolled back", height=0.07)
    _finish(axis, history, "loss, nats per token", with_names=True)
    axis.legend(loc="upper right")


def _mark(axis: Any, tokens: list[int], marker: str, label: str, height: float) -> None:
    if tokens:
        axis.plot(
            tokens, [height] * len(tokens), marker, transform=axis.get_xaxis_transform(), markersize=5,
            linestyle="none", color="C5", label=label, clip_on=False,
        )  # fmt: skip


def draw_line(axis: Any, history: History, name: str, label: str, scale: float = 1.0) -> None:
    """One metric as a line."""
    tokens, values = history.points(name)
    axis.plot(tokens, values * scale, linewidth=0.9)
    _finish(axis, history, label, headroom=1.1)


def draw_phases(axis: Any, history: History) -> None:
    """The phases of the time between two logged steps."""
    for phase in history.names("Seconds/"):
        axis.plot(*history.points(f"Seconds/{phase}"), linewidth=0.9, label=phase)
    _finish(axis, history, "seconds on rank 0", headroom=1.3)
    axis.legend(loc="upper right", ncols=4)


def draw_gradient_norm(axis: Any, history: History) -> None:
    """On a logarithmic scale, for spikes."""
    from matplotlib.ticker import LogLocator

    axis.plot(*history.points("Train/GradNorm"), linewidth=0.9)
    clipping = history.description.get("deepspeed_config", {}).get("gradient_clipping")
    if clipping:
        axis.axhline(clipping, color="C1", linewidth=0.9, linestyle="--", label=f"clipped at {clipping:g}")
        axis.legend(loc="upper right")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    _finish(axis, history, "gradient norm before clipping")


def draw_stalls(axis: Any, history: History) -> None:
    """Stall of every save."""
    tokens, seconds = history.points("Checkpoint/StallSeconds")
    axis.vlines(tokens, 0, seconds, linewidth=0.8)
    axis.plot(tokens, seconds, "o", markersize=3.5, clip_on=False)
    _finish(axis, history, "stall, seconds", headroom=1.1)


def draw_tasks(axis: Any, history: History, metric: str) -> None:
    """Scores during training by one metric, with standard errors; a task has one style in all charts."""
    from matplotlib import rcParams

    colors = len(rcParams["axes.prop_cycle"])
    for number, task in enumerate(dict.fromkeys(row["task"] for row in history.tasks)):
        rows = [row for row in history.tasks if (row["task"], row["metric"]) == (task, metric)]
        if not rows:
            continue
        tokens, values = ([row[key] for row in rows] for key in ("tokens", "value"))
        errors = [row.get("stderr") or 0.0 for row in rows]
        axis.errorbar(
            tokens, values, errors, color=f"C{number % colors}", linestyle=_LINES[number // colors % len(_LINES)],
            marker="o", markersize=3.5, linewidth=0.9, capsize=2, label=f"{task}: {values[-1]:.4g}", clip_on=False,
        )  # fmt: skip
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    _finish(axis, history, metric)


def draw_mixture(axis: Any, history: History) -> None:
    """Shares of the sources: areas as trained, dashed lines as planned."""
    sources = history.names("Tokens/")
    edges, shares = achieved_mixture(history, sources)
    if len(edges):
        axis.stackplot(edges, np.vstack([shares, shares[-1:]]).T * 100, step="post", labels=sources, alpha=0.75)
    for number, (left, right) in enumerate(pairwise(planned_mixture(history, sources))):
        tops = np.cumsum([left[1], right[1]], axis=1) * 100  # (2, sources)
        label = "planned" if number == 0 else None
        for top in tops.T[:-1]:
            axis.plot(
                [left[0], right[0]], top, linestyle="--", linewidth=1.2, color=axis.xaxis.label.get_color(), label=label
            )
            label = None
    axis.set_ylim(0, 100)
    axis.grid(visible=False)
    _finish(axis, history, "% of tokens", with_names=True)
    axis.legend(loc="upper left", ncols=min(6, len(sources) + 1), bbox_to_anchor=(0, -0.14))


def achieved_mixture(history: History, sources: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Edges (N + 1,) in tokens, starts of stages included, and the sources' shares between them (N, sources)."""
    if not sources:
        return np.empty(0), np.empty((0, 0))
    start = history.first_token
    columns = np.linspace(start, history.tokens, _MIXTURE_COLUMNS + 1)
    edges = np.unique(np.concatenate((columns, [max(first, start) for _, first, _ in history.stages()])))
    trained = []
    for source in sources:
        tokens, counts = history.points(f"Tokens/{source}")
        trained.append(np.interp(edges, np.append(0, tokens), np.append(0, counts)))
    drawn = np.diff(trained, axis=1).T  # (N, sources)
    return edges, drawn / np.maximum(drawn.sum(axis=1, keepdims=True), 1)


def planned_mixture(history: History, sources: list[str]) -> list[tuple[float, np.ndarray]]:
    """Corners of the planned shares: tokens, and the share of each source (sources,); straight in between."""
    corners: list[tuple[float, np.ndarray]] = []
    for stage, first, end in history.stages():
        weights = np.array([stage["weights"].get(source, 0.0) for source in sources])
        shares = weights / max(weights.sum(), 1e-12)
        ramp = stage.get("ramp_tokens", 0)
        before = corners[-1][1] if ramp and corners else shares
        reached = min(1.0, (end - first) / ramp) if ramp else 1.0
        after = before + (shares - before) * reached
        corners += [(first, before), (min(first + ramp, end), after), (end, after)]
    return corners


def _finish(axis: Any, history: History, label: str, headroom: float | None = None, with_names: bool = False) -> None:
    """Labels, limits and stages; with headroom, values from 0 to that many times the largest."""
    if headroom is not None:
        axis.set_ylim(0, headroom * axis.dataLim.y1 or 1)
    start, stages = history.first_token, history.stages()
    axis.set_xlim(start, max(start + 1, history.tokens))
    axis.set_xlabel("tokens")
    axis.set_ylabel(label)
    axis.xaxis.set_major_formatter(lambda value, _: short_count(value))
    faint = axis.xaxis.label.get_color()
    for stage, first, end in stages if len(stages) > 1 else []:
        if end <= start:
            continue
        axis.axvline(first, color=faint, linewidth=0.8, linestyle=":")
        if with_names:
            axis.annotate(
                stage["name"], (max(first, start), 1), xycoords=("data", "axes fraction"), xytext=(2, 3),
                textcoords="offset points", color=faint,
            )  # fmt: skip


PANELS: tuple[tuple[str, str, Callable[..., None]], ...] = (  # metric, title, and the function that draws it
    ("Train/LearningRate", "Learning rate", partial(draw_line, name="Train/LearningRate", label="learning rate")),
    ("Train/BatchTokens", "Batch size", partial(draw_line, name="Train/BatchTokens", label="tokens per step")),
    ("Train/GradNorm", "Gradient norm", draw_gradient_norm),
    (
        "Speed/TokensPerSecond",
        "Throughput",
        partial(draw_line, name="Speed/TokensPerSecond", label="tokens per second"),
    ),
    ("Speed/MFU", "Model FLOPs utilization", partial(draw_line, name="Speed/MFU", label="% of peak", scale=100)),
    ("Seconds/forward", "Phases of a step", draw_phases),
    ("Memory/PeakGiB", "Memory", partial(draw_line, name="Memory/PeakGiB", label="peak GiB on rank 0")),
    ("Checkpoint/StallSeconds", "Checkpoint stalls", draw_stalls),
)


def run_figure(history: History, title: str) -> "Figure":
    """Losses, learning rate, gradient norm and speed as one figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_losses(axes[0, 0], history)
    for axis, (name, _, draw) in zip(axes.flat[1:], (PANELS[0], PANELS[2], PANELS[3]), strict=True):
        if name in history.series:
            draw(axis, history)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    return figure
