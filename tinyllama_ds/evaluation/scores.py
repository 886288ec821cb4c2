"""Scores next to the published ones: as JSON, as a table and as a picture."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from math import hypot
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tinyllama_ds.evaluation.suites import Suite, suite_named
from tinyllama_ds.numbers import short_count
from tinyllama_ds.page import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Score:
    """One metric of one task or group."""

    task: str
    metric: str
    value: float
    stderr: float | None  # None if undefined, as with a single document
    documents: int | None
    shots: int | None
    version: str


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model and how they were measured."""

    model: str
    tokens: int | None  # trained on; None if unknown
    suite: str | None  # None for tasks chosen by the user
    scores: tuple[Score, ...]
    settings: dict[str, Any]
    versions: dict[str, str]


def read_scores(results: dict[str, Any], names: Iterable[str] | None = None) -> tuple[Score, ...]:
    """Every metric in lm-eval's results, of all tasks or of those named."""
    found = []
    for task, metrics in results["results"].items():
        if names is not None and task not in names:
            continue
        documents = results["n-samples"].get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or not filtered or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            found.append(
                Score(
                    task,
                    metric if filtered in ("none", "create_test") else f"{metric}, {filtered}",
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    documents or metrics.get("sample_len"),
                    _shots(task, results),
                    str(results["versions"].get(task, "")),
                )
            )
    return tuple(found)


def outermost(results: dict[str, Any]) -> set[str]:
    """Tasks and groups in lm-eval's results that are not part of another group there."""
    inside = {child for children in results.get("group_subtasks", {}).values() for child in children}
    return set(results["results"]) - inside


def _shots(task: str, results: dict[str, Any]) -> int | None:
    """Shots of a task, or of a group whose tasks all have the same."""
    if task in results["n-shot"]:
        return results["n-shot"][task]
    below = {_shots(child, results) for child in results.get("group_subtasks", {}).get(task, [])}
    return below.pop() if len(below) == 1 else None


def benchmark_scores(scores: tuple[Score, ...], suite: Suite) -> list[Score]:
    """The score of each benchmark by its published metric, in percent, in the published order."""
    by_key = {(score.task, score.metric): score for score in scores}
    chosen = [by_key[benchmark.task, benchmark.metric] for benchmark in suite.benchmarks]
    return [replace(score, value=100 * score.value, stderr=score.stderr and 100 * score.stderr) for score in chosen]


def average(scores: list[Score]) -> tuple[float, float | None]:
    """Mean of the benchmarks and its standard error, the benchmarks taken as independent."""
    known = [score.stderr for score in scores if score.stderr is not None]
    stderr = hypot(*known) / len(scores) if len(known) == len(scores) else None
    return fmean(score.value for score in scores), stderr


def as_json(evaluation: Evaluation, results: dict[str, Any]) -> dict[str, Any]:
    """Everything: the scores, in percent for a suite with its published rows, and lm-eval's own results."""
    found: dict[str, Any] = asdict(evaluation) | {"lm_eval": json.loads(json.dumps(results["results"], default=str))}
    if evaluation.suite:
        suite = suite_named(evaluation.suite)
        ours, near = benchmark_scores(evaluation.scores, suite), suite.nearest_checkpoint(evaluation.tokens)
        value, stderr = average(ours)
        found |= {
            "percent": [{"benchmark": b.title} | asdict(s) for b, s in zip(suite.benchmarks, ours, strict=True)],
            "average": {"value": value, "stderr": stderr},
            "published": [
                asdict(row) | {"average": row.average, "misprint": suite.misprints.get(row.model, "")}
                for row in suite.published
            ],
            "nearest": near and near.model,  # the published row with the same number of tokens
            "note": suite.note,
        }
    return found


def scores_table(found: dict[str, Any]) -> Table:
    """The scores in an object of `as_json`, or in what is left of one: a suite and its published rows, or the tasks."""
    title = found.get("name", "") + (f", {_count(found)} tokens" if _count(found) else "")
    if found.get("percent"):
        return _suite_table(found, title)
    rows = [
        (row["task"], row["metric"], _with_error(row, digits=4), row.get("version", ""))
        + tuple("" if row.get(key) is None else f"{row[key]:,}" for key in ("shots", "documents"))
        for row in found.get("scores", [])
    ]
    return Table(title, ("task", "metric", "score", "version", "shots", "documents"), rows, text_columns=(0, 1, 3))


def _suite_table(found: dict[str, Any], title: str) -> Table:
    published, ours = found.get("published", []), found["percent"]
    notes: list[str] = []
    rows = []
    for row in published:
        name = row["model"] + (", same number of tokens" if row["model"] == found.get("nearest") else "")
        if row.get("misprint"):
            notes.append(f"[{len(notes) + 1}] {row['misprint']}.")
            name += f" [{len(notes)}]"
        rows.append((name, _count(row), *(f"{value:.2f}" for value in (*row["scores"], row["average"]))))
    mean = [found["average"]] if "average" in found else []
    rows.append(("this model", _count(found), *map(_with_error, (*ours, *mean))))
    head = ("model", "tokens", *(score.get("benchmark", "") for score in ours), "average")
    note = "In percent, ± one standard error. The averages are computed from the scores."
    return Table(title, head, rows, " ".join(filter(None, [note, *notes, found.get("note")])))


def _with_error(score: dict, digits: int = 2) -> str:
    error = score.get("stderr")
    return f"{score['value']:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _count(row: dict) -> str:
    return short_count(row["tokens"]) if row.get("tokens") else ""


def as_markdown(found: dict[str, Any]) -> str:
    """The table, misprints of the sources, and how it was measured."""
    table = scores_table(found)
    rows = list(table.rows)
    if found["suite"]:
        rows[-1] = [f"**{cell}**" for cell in rows[-1]]
    lines = [f"# {found['model']}\n", replace(table, rows=rows).as_markdown()]
    if found["suite"]:
        tasks = (
            f"{score['task']} (version {score['version'] or 'unknown'}, {score['shots'] or 0}-shot, {score['metric']})"
            for score in found["percent"]
        )
        lines.append(f"\n{table.note}\n\nTasks: {', '.join(tasks)}.")
    return "\n".join([*lines, *described(found)]) + "\n"


def described(found: dict[str, Any]) -> list[str]:
    """How it was measured, in paragraphs of Markdown."""
    return [
        f"\n{title.capitalize()}: {', '.join(f'{name} {value}' for name, value in found[title].items())}."
        for title in ("settings", "versions")
    ]


def scores_figure(found: dict[str, Any]) -> "Figure":
    """A panel for each benchmark, with published scores as dots, or for each metric; ours with standard errors."""
    from matplotlib.figure import Figure

    published = found.get("published", [])
    names = [_label(row["model"], row) for row in published]
    panels: dict[str, dict[int, dict]] = {}  # by title: our scores by their height
    if found["suite"]:
        names.append(_label("this model", found))
        for score in (*found["percent"], found["average"]):
            panels[score.get("benchmark", "average")] = {len(published): score}
    else:
        names = list(dict.fromkeys(score["task"] for score in found["scores"]))
        for score in found["scores"]:
            panels.setdefault(score["metric"], {})[names.index(score["task"])] = score
    figure = Figure(figsize=(3.2 + 1.55 * len(panels), 1.6 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colors = [_color(row["model"], found.get("nearest")) for row in published]
    for number, (axis, (title, scores)) in enumerate(zip(axes, panels.items(), strict=True)):
        dots = [(*row["scores"], row["average"])[number] for row in published]
        axis.scatter(dots, range(len(dots)), c=colors, s=22, zorder=2)
        _draw_ours(axis, scores, with_line=bool(dots))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("%" if found["suite"] else "")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    if found["suite"]:
        axes[0].get_yticklabels()[-1].set(color="tab:red", fontweight="bold")
    near = ", orange: TinyLlama at the same number of tokens" if found.get("nearest") else ""
    figure.suptitle(f"{found['model']}{near}")
    return figure


def _draw_ours(axis: Any, scores: dict[int, dict], with_line: bool) -> None:
    """Our scores by their height, with a line through them for the comparison with others."""
    for height, score in scores.items():
        value, stderr = score["value"], score["stderr"]
        if with_line:
            axis.axvspan(value - (stderr or 0), value + (stderr or 0), color="tab:red", alpha=0.15, linewidth=0)
            axis.axvline(value, color="tab:red", linewidth=1)
        axis.errorbar(value, height, xerr=stderr, color="tab:red", marker="D", markersize=5, capsize=2)
    axis.margins(x=0.12)
    if all(0 <= score["value"] <= 1 for score in scores.values()):
        axis.set_xlim(-0.02, 1.02)
    axis.grid(axis="y", alpha=0.2)
    axis.tick_params(axis="y", length=0)


def _label(model: str, row: dict) -> str:
    return f"{model} ({_count(row)})" if _count(row) else model


def _color(model: str, near: str | None) -> str:
    if model == near:
        return "tab:orange"
    return "tab:blue" if model.startswith("TinyLlama") else "tab:gray"
