"""The report of a run: one HTML page for people, and the same values for programs."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_ds.evaluation.charts import PANELS, draw_losses, draw_mixture, draw_tasks
from tinyllama_ds.evaluation.history import History
from tinyllama_ds.numbers import duration, short_count
from tinyllama_ds.page import Chart, Table, chart, render

_MAX_ROWS = 40  # of a table; the newest
_MAX_SAMPLES = 8  # of a prompt
_CONFIGURATION = {
    "recipe": "Recipe, resolved",
    "model": "Model",
    "deepspeed_config": "DeepSpeed config, resolved",
    "versions": "Versions",
    "data": "Data",
    "history": "Changes between starts",
}


@dataclass(frozen=True)
class RunStatus:
    """State, progress and speed of a run."""

    state: str  # finished, stopped, running or unfinished
    step: int
    steps: int  # planned
    tokens: int
    total_tokens: int  # planned
    loss: float | None  # None where no step was logged
    tokens_per_second: float  # median
    peak_tokens_per_second: float
    seconds: float  # of uptime
    goodput: float  # tokens in checkpoints / (peak rate x seconds); not finite if unknown
    seconds_left: float
    inherited_tokens: int = 0  # by a branch, from its parent run

    @property
    def sentence(self) -> str:
        """The verdict."""
        share = f"{self.tokens:,} of {self.total_tokens:,} tokens ({self.tokens / max(1, self.total_tokens):.1%})"
        rate = "no step was logged yet"
        if self.loss is not None:
            rate = f"loss {self.loss:.3f}, {self.tokens_per_second:,.0f} tokens/s"
        if math.isfinite(self.goodput):
            rate += f", goodput {self.goodput:.1%}"
        left = f"; about {duration(self.seconds_left)} left" if math.isfinite(self.seconds_left) else ""
        match self.state:
            case "finished":
                time = f" in {duration(self.seconds)}" if math.isfinite(self.seconds) else ""
                own = f", {self.tokens - self.inherited_tokens:,} of its own" if self.inherited_tokens else ""
                return f"Finished: all {self.steps:,} steps, {self.tokens:,} tokens{own}{time}; {rate}"
            case "running":
                return f"Running: step {self.step:,} of {self.steps:,}, {share}; {rate}{left}"
            case "stopped":
                return f"Stopped and saved at step {self.step:,} of {self.steps:,}, {share}; {rate}{left}"
            case _:
                place = f"step {self.step:,} of {self.steps:,}, {share}"
                return f"Not finished, and no supervisor holds it: {place}; {rate}{left}"


def run_status(history: History, committed: int, is_held: bool) -> RunStatus:
    """`committed` tokens are in a checkpoint; `is_held`: whether a supervisor that holds the run is alive."""
    state = history.state if history.state in ("finished", "stopped") else "running" if is_held else "unfinished"
    plan = history.description.get("plan", {})
    seconds = history.last.get("seconds", math.nan)
    possible = history.peak_rate * seconds
    inherited = history.starts[0]["tokens"] if history.starts else 0
    total = plan.get("tokens", history.tokens)
    return RunStatus(
        state=state,
        step=history.last["step"],
        steps=plan.get("steps", history.last["step"]),
        tokens=history.tokens,
        total_tokens=total,
        loss=history.last.get("Train/Loss"),
        tokens_per_second=history.median_rate,
        peak_tokens_per_second=history.peak_rate,
        seconds=seconds,
        goodput=(committed - inherited) / possible if committed and possible > 0 else math.nan,
        seconds_left=(total - history.tokens) / history.recent_rate if history.recent_rate > 0 else math.nan,
        inherited_tokens=inherited,
    )


def summarize(history: History, status: RunStatus) -> dict[str, Any]:
    """For programs: the last value of every metric and the verdict of the page; None for what is not finite."""
    summary = history.last | {
        "Speed/MedianTokensPerSecond": status.tokens_per_second,
        "state": status.state,
        "verdict": status.sentence,
        "steps_planned": status.steps,
        "tokens_planned": status.total_tokens,
        "goodput": status.goodput,
        "seconds_left": status.seconds_left,
        "starts": len(history.starts),
        "skipped_steps": sum(entry.get("event") == "skipped" for entry in history.ledger),
        "rollbacks": sum(entry.get("event") == "rolled back" for entry in history.ledger),
        "spikes": len(history.spikes),
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in summary.items()
    }


def report_page(history: History, status: RunStatus, place: str) -> str:
    """The page of a run whose directory is `place`."""
    name = history.description.get("recipe", {}).get("name", place)

    def drawn(draw: Callable[..., None], title: str, is_wide: bool, *arguments: str) -> Chart:
        return chart(lambda axis: draw(axis, history, *arguments), title, is_wide)

    mixture = "Mixture: areas as trained, dashed lines as planned by the recipe"
    return render(
        "report.html",
        title=f"Run: {name}",
        verdict=status.sentence,
        passed=status.state != "unfinished",
        name=name,
        place=place,
        metrics=_metrics(history, status),
        has_goodput=math.isfinite(status.goodput),
        loss=drawn(draw_losses, "Loss", True),
        panels=[drawn(draw, title, False) for metric, title, draw in PANELS if metric in history.series],
        mixture=[drawn(draw_mixture, mixture, True)] if history.names("Tokens/") else [],
        starts=_starts(history),
        spikes=_spikes(history),
        samples=_samples(history),
        task_charts=[
            drawn(draw_tasks, metric, True, metric) for metric in dict.fromkeys(row["metric"] for row in history.tasks)
        ],
        scores=_scores(history),
        machine=_machine(history),
        configuration=_configuration(history),
    )


def _metrics(history: History, status: RunStatus) -> list[tuple[str, str]]:
    """Names and values for the top of the page; what is unknown is empty."""
    last, rate = history.last, status.tokens_per_second
    return [
        ("tokens", short_count(status.tokens)),
        ("training loss", "" if status.loss is None else f"{status.loss:.3f}"),
        *(
            (f"validation, {source}", f"{last[f'Validation/Loss/{source}']:.3f}")
            for source in history.names("Validation/Loss/")
        ),
        ("tokens/s, median", f"{rate:,.0f}" if math.isfinite(rate) else ""),
        ("MFU", _mfu(last)),
        ("goodput", f"{status.goodput:.1%}" if math.isfinite(status.goodput) else ""),
        ("time", duration(status.seconds) if math.isfinite(status.seconds) else ""),
        ("starts", f"{len(history.starts)}" if history.starts else ""),
    ]


def _mfu(last: dict[str, float]) -> str:
    """Of the last step that has it; a step above a measured peak has none."""
    if "Speed/MFU" in last:
        return f"{last['Speed/MFU']:.1%}"
    return "above the measured peak" if "Speed/TokensPerSecond" in last else ""


def _starts(history: History) -> Table:
    rows: list[tuple[str, ...]] = []
    excluded = 0
    for number, start in enumerate(history.starts):
        if number == 0:
            reason = "first start"
        elif start.get("left_out", 0) > excluded:
            reason = "after a rollback"
        else:
            reason = "after a failure, by the supervisor" if start.get("restart") else "started again"
        excluded = start.get("left_out", 0)
        hosts = ", ".join(f"{ranks} on {host}" for host, ranks in start.get("hosts", {}).items())
        repeated = max(0, start.get("reached", 0) - start["step"])
        time = start.get("time", "").removesuffix("+00:00").replace("T", " ")
        rows.append((time, reason, hosts, f"{start['step']:,}", f"{repeated:,}"))
    head = ("time, UTC", "", "ranks", "from step", "repeated steps")
    return _newest("Starts", head, rows, (0, 1, 2), "Every start of the run, and the steps repeated after it.")


def _spikes(history: History) -> Table:
    def samples(first: int, last: int) -> str:
        return f"{first:,} to {last:,}"

    rows = [
        (row["event"], f"{row['step']:,}", samples(row["first_sample"], row["last_sample"]), row["reason"])
        for row in history.ledger
    ]
    rows += [
        ("applied", f"{row['step']:,}", samples(row["Guard/FirstSample"], row["Guard/LastSample"]), "spike")
        for row in history.spikes
        if "Guard/Spikes" in row
    ]
    return _newest("Spikes and skipped steps", ("", "step", "samples", "reason"), rows, (0, 3))


def _newest(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int], note: str = ""
) -> Table:
    if len(rows) > _MAX_ROWS:
        note = f"{note} The newest {_MAX_ROWS} of {len(rows):,}.".strip()
    return Table(title, head, rows[-_MAX_ROWS:], note, text_columns)


def _samples(history: History) -> dict[str, list[dict]]:
    """By prompt: the first, the last, and some evenly in between."""
    by_prompt: dict[str, list[dict]] = {}
    for sample in history.samples:
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    for prompt, samples in by_prompt.items():
        last = len(samples) - 1
        if last >= _MAX_SAMPLES:
            by_prompt[prompt] = [samples[round(number * last / (_MAX_SAMPLES - 1))] for number in range(_MAX_SAMPLES)]
    return by_prompt


def _scores(history: History) -> list[Table]:
    """Every file of scores: a suite next to the published rows, or the tasks one by one."""
    return [_suite(scores) if scores.get("percent") else _tasks(scores) for scores in history.scores]


def _scores_title(scores: dict) -> str:
    return scores["name"] + (f", {short_count(scores['tokens'])} tokens" if scores.get("tokens") else "")


def _suite(scores: dict) -> Table:
    published, ours = scores.get("published", []), scores["percent"]
    rows = [
        (str(row["model"]), short_count(row.get("tokens") or 0), *(f"{value:.2f}" for value in row["scores"]),
         f"{row['average']:.2f}")
        for row in published
    ]  # fmt: skip
    average = [scores["average"]] if "average" in scores else []
    rows.append(("this run", short_count(scores.get("tokens") or 0), *map(_with_error, (*ours, *average))))
    head = ("", "tokens", *(score.get("benchmark", "") for score in ours), "average")
    misprints = "; ".join(f"{row['model']}: {row['misprint']}" for row in published if row.get("misprint"))
    return Table(_scores_title(scores), head, rows, misprints)


def _with_error(score: dict, digits: int = 2) -> str:
    error = score.get("stderr")
    return f"{score['value']:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def _tasks(scores: dict) -> Table:
    rows = [(row["task"], row["metric"], _with_error(row, digits=4)) for row in scores.get("scores", [])]
    return Table(_scores_title(scores), ("task", "metric", "score"), rows, text_columns=(0, 1))


def _machine(history: History) -> Table:
    description, start = history.description, history.starts[-1] if history.starts else {}
    versions = description.get("versions", {})
    zero = description.get("deepspeed_config", {}).get("zero_optimization", {})
    rows = [
        ("hosts", ", ".join(f"{host} ({ranks} ranks)" for host, ranks in start.get("hosts", {}).items())),
        ("device", versions.get("device", "CPU" if versions else "")),
        ("ranks", str(description.get("world_size", ""))),
        ("ZeRO stage", str(zero.get("stage", 0)) if description else ""),
        ("micro-batch, sequences", str(description.get("micro_batch", ""))),
        ("attention", str(description.get("attention", ""))),
    ]
    return Table("Machine", (), [row for row in rows if row[1]], text_columns=(0, 1))


def _configuration(history: History) -> list[tuple[str, str]]:
    return [
        (title, json.dumps(history.description[key], indent=1, ensure_ascii=False))
        for key, title in _CONFIGURATION.items()
        if history.description.get(key)
    ]
