"""Scores next to the published ones: as a table, as JSON and as a picture."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from tinyllama_ds.evaluation.published import PUBLISHED, PublishedRow, nearest_checkpoint
from tinyllama_ds.evaluation.suites import Benchmark
from tinyllama_ds.numbers import short_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INSTRUCT_EVAL = (
    "The published rows of this suite come from InstructEval, whose prompts differ from lm-eval's and whose DROP scores"
    " questions with one answer by their first words (here: F1); compare them with care."
)


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


def benchmark_scores(scores: tuple[Score, ...], benchmarks: tuple[Benchmark, ...]) -> list[Score]:
    """The score of each benchmark by its published metric, in percent, in the published order."""
    by_key = {(score.task, score.metric): score for score in scores}
    chosen = [by_key[benchmark.task, benchmark.metric] for benchmark in benchmarks]
    return [
        Score(**asdict(score) | {"value": 100 * score.value, "stderr": score.stderr and 100 * score.stderr})
        for score in chosen
    ]


def average(scores: list[Score]) -> tuple[float, float | None]:
    """Mean of the benchmarks and its standard error, the benchmarks taken as independent."""
    errors = [score.stderr for score in scores]
    mean = sum(score.value for score in scores) / len(scores)
    known = [error for error in errors if error is not None]
    return mean, sqrt(sum(error**2 for error in known)) / len(scores) if len(known) == len(errors) else None


def as_markdown(evaluation: Evaluation, benchmarks: tuple[Benchmark, ...]) -> str:
    """The table, misprints of the sources, and how it was measured."""
    body = _suite_table(evaluation, benchmarks) if evaluation.suite else _task_table(evaluation.scores)
    settings = ", ".join(f"{name} {value}" for name, value in evaluation.settings.items())
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    return f"# {evaluation.model}\n\n{body}\n\nSettings: {settings}.\n\nVersions: {versions}.\n"


def _task_table(scores: tuple[Score, ...]) -> str:
    lines = ["| task | metric | score | version | shots | documents |", "| --- | --- | ---: | --- | ---: | ---: |"]
    for score in scores:
        value = _with_error(score.value, score.stderr, 4)
        documents = "" if score.documents is None else f"{score.documents:,}"
        lines.append(f"| {score.task} | {score.metric} | {value} | {score.version} | {score.shots} | {documents} |")
    return "\n".join(lines)


def _suite_table(evaluation: Evaluation, benchmarks: tuple[Benchmark, ...]) -> str:
    assert evaluation.suite is not None
    rows = PUBLISHED[evaluation.suite]
    near = nearest_checkpoint(evaluation.suite, evaluation.tokens) if evaluation.tokens else None
    lines = [
        "| model | tokens | " + " | ".join(benchmark.title for benchmark in benchmarks) + " | average |",
        "| --- | ---: |" + " ---: |" * (len(benchmarks) + 1),
    ]
    notes = []
    for row in rows:
        mark = ""
        if row.misprint:
            notes.append(row.misprint)
            mark = f" [{len(notes)}]"
        name = f"**{row.model}**, same number of tokens" if row is near else row.model
        cells = " | ".join(f"{score:.2f}" for score in row.scores)
        lines.append(f"| {name}{mark} | {_count(row.tokens)} | {cells} | {row.average:.2f} |")
    ours = benchmark_scores(evaluation.scores, benchmarks)
    cells = " | ".join(f"**{_with_error(score.value, score.stderr)}**" for score in ours)
    mean = _with_error(*average(ours))
    lines.append(f"| **this model** | {_count(evaluation.tokens)} | {cells} | **{mean}** |")
    lines += ["", "In percent, ± one standard error. The averages are computed from the scores."]
    lines += ["", *(f"[{number}] {note}  " for number, note in enumerate(notes, start=1))]
    if evaluation.suite == "instruct":
        lines += ["", _INSTRUCT_EVAL]
    lines += ["", "Tasks: " + ", ".join(_task_words(score) for score in ours) + "."]
    return "\n".join(lines)


def _task_words(score: Score) -> str:
    return f"{score.task} (version {score.version or 'unknown'}, {score.shots or 0}-shot, {score.metric})"


def _with_error(value: float, stderr: float | None, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if stderr is None else f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _count(tokens: float | None) -> str:
    return "" if tokens is None else short_count(tokens)


def as_json(evaluation: Evaluation, benchmarks: tuple[Benchmark, ...], results: dict[str, Any]) -> dict[str, Any]:
    """Everything: the scores, in percent for a suite with its published rows, and lm-eval's own results."""
    found: dict[str, Any] = asdict(evaluation) | {"lm_eval": json.loads(json.dumps(results["results"], default=str))}
    if evaluation.suite:
        ours = benchmark_scores(evaluation.scores, benchmarks)
        mean, stderr = average(ours)
        found |= {
            "percent": [{"benchmark": b.title} | asdict(s) for b, s in zip(benchmarks, ours, strict=True)],
            "average": {"value": mean, "stderr": stderr},
            "published": [asdict(row) | {"average": row.average} for row in PUBLISHED[evaluation.suite]],
        }
    return found


def scores_figure(evaluation: Evaluation, benchmarks: tuple[Benchmark, ...]) -> "Figure":
    """One panel for each benchmark: published scores as dots, ours with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if evaluation.suite:
        figure = _draw_suite(plt, evaluation, evaluation.suite, benchmarks)
    else:
        figure = _draw_tasks(plt, evaluation.scores)
    has_near = evaluation.suite and evaluation.tokens and nearest_checkpoint(evaluation.suite, evaluation.tokens)
    figure.suptitle(f"{evaluation.model}{', orange: TinyLlama at the same number of tokens' if has_near else ''}")
    plt.close(figure)
    return figure


def _draw_suite(plt: Any, evaluation: Evaluation, suite: str, benchmarks: tuple[Benchmark, ...]) -> Any:
    rows = PUBLISHED[suite]
    ours = benchmark_scores(evaluation.scores, benchmarks)
    near = nearest_checkpoint(suite, evaluation.tokens) if evaluation.tokens else None
    names = [*(_label(row.model, row.tokens) for row in rows), _label("this model", evaluation.tokens)]
    panels = len(benchmarks) + 1
    figure, axes = plt.subplots(
        1, panels, figsize=(3.2 + 1.55 * panels, 1.6 + 0.3 * len(names)), sharey=True, layout="constrained"
    )
    values = [*((score.value, score.stderr) for score in ours), average(ours)]
    titles = [*(benchmark.title for benchmark in benchmarks), "average"]
    for number, (axis, title, (value, stderr)) in enumerate(zip(axes, titles, values, strict=True)):
        published = [row.scores[number] if number < len(benchmarks) else row.average for row in rows]
        colors = [_color(row, near) for row in rows]
        axis.axvspan(value - (stderr or 0), value + (stderr or 0), color="tab:red", alpha=0.15, linewidth=0)
        axis.axvline(value, color="tab:red", linewidth=1)
        axis.scatter(published, range(len(rows)), c=colors, s=22, zorder=2)
        axis.errorbar(value, len(rows), xerr=stderr, color="tab:red", marker="D", markersize=5, capsize=2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("%")
        axis.margins(x=0.12)
        axis.grid(axis="y", alpha=0.2)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].get_yticklabels()[-1].set(color="tab:red", fontweight="bold")
    axes[0].invert_yaxis()
    return figure


def _label(model: str, tokens: float | None) -> str:
    return f"{model} ({short_count(tokens)})" if tokens else model


def _color(row: PublishedRow, near: PublishedRow | None) -> str:
    if row is near:
        return "tab:orange"
    return "tab:blue" if row.model.startswith("TinyLlama") else "tab:gray"


def _draw_tasks(plt: Any, scores: tuple[Score, ...]) -> Any:
    """A panel for each metric, because their scales differ."""
    metrics = list(dict.fromkeys(score.metric for score in scores))
    figure, axes = plt.subplots(
        len(metrics), 1, figsize=(8, 1.2 + 0.4 * len(scores) + 0.7 * len(metrics)), layout="constrained", squeeze=False
    )
    for axis, metric in zip(axes[:, 0], metrics, strict=True):
        chosen = [score for score in scores if score.metric == metric]
        for height, score in enumerate(chosen):
            axis.errorbar(score.value, height, xerr=score.stderr, color="tab:red", marker="D", markersize=5, capsize=2)
        axis.set_yticks(range(len(chosen)), [score.task for score in chosen])
        axis.set_ylim(len(chosen) - 0.5, -0.5)
        axis.set_xlabel(metric)
        axis.margins(x=0.2)
        if all(0 <= score.value <= 1 for score in chosen):
            axis.set_xlim(-0.02, 1.02)
        axis.grid(alpha=0.3)
    return figure
