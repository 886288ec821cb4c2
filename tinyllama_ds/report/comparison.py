"""Several runs on one page: losses over tokens, compute and time, what they reached, and how their settings differ."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from tinyllama_ds.config.validation import validate
from tinyllama_ds.errors import ConfigError, shown_as_json
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.numbers import duration, short_count
from tinyllama_ds.page import Table, chart, render
from tinyllama_ds.report.history import History
from tinyllama_ds.report.long_context import all_long_context_tables, long_context_charts
from tinyllama_ds.report.sample_losses import Difference, draw_differences, loss_table

_SETTINGS = (
    "recipe",
    "model",
    "deepspeed_config",
    "world_size",
    "sequence_parallel",
    "attention",
    "versions",
    "init_from",
    "parent",
)
_ABSENT = "absent"
_LOSSES, _BITS = "Validation/Loss/", "Validation/BitsPerByte/"
Runs = Mapping[str, History]  # by a name that each run has alone


def figures_of(history: History, price_per_hour: float | None) -> dict[str, Any]:
    """What a run has reached and what it took; only what is known.

    FLOPs are those of the model (`LlamaConfig.flops_per_token`) for the run's own tokens, hours are its uptime times
    its ranks.
    """
    last = history.last
    found: dict[str, Any] = {"tokens": history.tokens}
    flops = _flops_per_token(history)
    if flops:
        found["flops"] = flops * (history.tokens - history.inherited_tokens)
    if "seconds" in last:
        found["hours"] = last["seconds"] / 3600 * history.description.get("world_size", 1)
        if price_per_hour is not None:
            found["cost"] = found["hours"] * price_per_hour
    if history.median_rate > 0:
        found["tokens_per_second"] = history.median_rate
    return found | {name: last[name] for name in ("Train/Loss", *sorted(last)) if name in last and _is_loss(name)}


def _is_loss(name: str) -> bool:
    return name == "Train/Loss" or name.startswith((_LOSSES, _BITS))


def _flops_per_token(history: History) -> int:
    """Of the model in run.json; 0 where it is not known."""
    try:
        model = validate(LlamaConfig, history.description.get("model"), "model")
        return model.flops_per_token(history.description["recipe"]["sequence_length"])
    except (ConfigError, KeyError, TypeError):
        return 0


def differences(runs: Runs) -> list[tuple[str, ...]]:
    """The settings in run.json that are not the same in all runs: the key, and the value of each."""
    flat = [dict(_leaves({key: history.description.get(key) for key in _SETTINGS})) for history in runs.values()]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, *(settings.get(key, _ABSENT) for settings in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for number, entry in enumerate(value):
            yield from _leaves(entry, f"{key}[{number}]")
    elif value is not None:
        yield key, shown_as_json(value)


_ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {  # name in the table, and form
    "tokens": ("tokens", "{:,}".format),
    "flops": ("FLOPs", "{:.3g}".format),
    "hours": ("time x ranks", lambda hours: duration(hours * 3600)),
    "cost": ("cost, USD", "{:,.2f}".format),
    "tokens_per_second": ("tokens/s, median", "{:,.0f}".format),
    "Train/Loss": ("training loss, last", "{:.3f}".format),
}


def comparison_table(figures: Mapping[str, dict[str, Any]]) -> Table:
    """A column per run."""
    names = dict.fromkeys(name for found in figures.values() for name in found)
    rows = []
    for name in sorted(names, key=lambda name: name not in _ROWS):
        label, form = _ROWS.get(name, (_metric_label(name), "{:.3f}".format))
        rows.append((label, *(form(found[name]) if name in found else "" for found in figures.values())))
    return Table("Runs", ("", *figures), rows)


def _metric_label(name: str) -> str:
    source = name.split("/", 2)[-1]
    return f"bits per byte, {source}" if name.startswith(_BITS) else f"validation loss, {source}"


def comparison_page(runs: Runs, figures: Mapping[str, dict[str, Any]], losses: list[Difference]) -> str:
    """One self-contained HTML page."""
    sources = dict.fromkeys(name for history in runs.values() for name in history.names(_LOSSES))
    drawn = [
        *(("Train/Loss", f"Training loss over {label}", label) for label in _SCALES),
        *((f"{_LOSSES}{source}", f"Validation loss, {source}", "tokens") for source in sources),
    ]
    charts = [chart(partial(_draw, runs=runs, name=name, label=label), title) for name, title, label in drawn]
    if losses:
        charts.append(chart(partial(draw_differences, differences=losses), f"Difference from {losses[0].first}"))
    rows = differences(runs)
    settings = Table("What differs", ("", *runs), rows, "From each run's run.json.", range(len(runs) + 1))
    measured = {f"{run}, {name}": part for run, of in runs.items() for name, part in of.long_context.items()}
    lowest = min(figures, key=lambda run: figures[run].get("Train/Loss", float("inf")))
    verdict = f"{len(runs)} runs; the lowest last training loss is {lowest}'s"
    return render(
        "comparison.html", title="Comparison of runs", verdict=verdict, passed=True, reached=comparison_table(figures),
        charts=charts, by_source=loss_table(losses), settings=settings,
        long_context_charts=long_context_charts(measured), long_context_tables=all_long_context_tables(measured),
    )  # fmt: skip


def _flops(history: History, tokens: np.ndarray) -> np.ndarray:
    return (tokens - history.inherited_tokens) * _flops_per_token(history)


def _hours(history: History, tokens: np.ndarray) -> np.ndarray:
    known, seconds = history.points("seconds")
    if not len(known):
        return np.full_like(tokens, np.nan)
    return np.interp(tokens, known, seconds) / 3600 * history.description.get("world_size", 1)


_SCALES: dict[str, Callable[[History, np.ndarray], np.ndarray]] = {
    "tokens": lambda history, tokens: tokens,
    "FLOPs": _flops,
    "hours x ranks": _hours,
}


def _draw(axis: Any, runs: Runs, name: str, label: str) -> None:
    for run, history in runs.items():
        tokens, losses = history.points(name)
        places = _SCALES[label](history, tokens)
        if len(losses) and np.isfinite(places).all() and places.any():
            marker = {"marker": "o", "markersize": 3.5} if name != "Train/Loss" else {}
            axis.plot(places, losses, linewidth=0.9, label=f"{run}: {losses[-1]:.3f}", **marker)
    axis.set(xlabel=label, ylabel="loss, nats per token")
    axis.xaxis.set_major_formatter(lambda value, _: short_count(value) if label == "tokens" else f"{value:.3g}")
    if axis.lines:
        axis.legend(loc="upper right")
