"""The report of a run: one HTML page for people, and the same in numbers for programs."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_ds.evaluation.charts import PANELS, draw_losses, draw_mixture, draw_tasks
from tinyllama_ds.evaluation.history import History
from tinyllama_ds.page import drawing, folded, page, preformatted, section, table

_MOST_ROWS = 40  # of a table; the newest
_MOST_SAMPLES = 8  # of a prompt
_SCIENTIFIC = 1e-2  # what is smaller is written with an exponent


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands."""

    state: str  # finished, stopped, running or unfinished
    step: int
    steps: int  # planned
    tokens: int
    total_tokens: int  # planned
    loss: float | None  # None where no step was logged
    tokens_per_second: float  # median
    peak_tokens_per_second: float
    seconds: float  # that the run was up
    goodput: float  # tokens in checkpoints / (peak rate x seconds); not finite where it is not known
    seconds_left: float
    inherited_tokens: int = 0  # by a branch, from the run it left

    @property
    def sentence(self) -> str:
        """The verdict."""
        share = f"{self.tokens:,} of {self.total_tokens:,} tokens ({self.tokens / max(1, self.total_tokens):.1%})"
        figures = "no step was logged yet"
        if self.loss is not None:
            figures = f"loss {self.loss:.3f}, {self.tokens_per_second:,.0f} tokens/s"
        if math.isfinite(self.goodput):
            figures += f", goodput {self.goodput:.1%}"
        left = f"; about {duration(self.seconds_left)} to go" if math.isfinite(self.seconds_left) else ""
        match self.state:
            case "finished":
                time = f" in {duration(self.seconds)}" if math.isfinite(self.seconds) else ""
                own = f", {self.tokens - self.inherited_tokens:,} of its own" if self.inherited_tokens else ""
                return f"Finished: all {self.steps:,} steps, {self.tokens:,} tokens{own}{time}; {figures}"
            case "running":
                return f"Running: step {self.step:,} of {self.steps:,}, {share}; {figures}{left}"
            case "stopped":
                return f"Stopped and saved at step {self.step:,} of {self.steps:,}, {share}; {figures}{left}"
            case _:
                place = f"step {self.step:,} of {self.steps:,}, {share}"
                return f"Not finished, and held by no supervisor: {place}; {figures}{left}"


def run_status(history: History, committed: int, is_held: bool) -> RunStatus:
    """`committed` tokens are in a checkpoint; `is_held` says whether a supervisor is alive that holds the run."""
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


def duration(seconds: float) -> str:
    """In the two largest units: 3 d 4 h, 12 min 5 s."""
    parts: list[str] = []
    left = round(seconds)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def summarise(history: History, now: RunStatus) -> dict[str, Any]:
    """For programs: the last value of every figure, and what the page says in words; None for what is not finite."""
    summary = history.last | {
        "Speed/MedianTokensPerSecond": now.tokens_per_second,
        "state": now.state,
        "verdict": now.sentence,
        "steps_planned": now.steps,
        "tokens_planned": now.total_tokens,
        "goodput": now.goodput,
        "seconds_left": now.seconds_left,
        "starts": len(history.starts),
        "skipped_steps": sum(entry.get("event") == "skipped" for entry in history.ledger),
        "rollbacks": sum(entry.get("event") == "rolled back" for entry in history.ledger),
        "spikes": len(history.spikes),
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in summary.items()
    }


def report_page(history: History, now: RunStatus, place: str) -> str:
    """The whole page of a run that lies in a place."""
    name = history.description.get("recipe", {}).get("name", place)
    panels = [
        drawing(lambda axis, draw=draw: draw(axis, history), title)  # type: ignore[misc]
        for figure, title, draw in PANELS
        if figure in history.series
    ]
    losses = drawing(lambda axis: draw_losses(axis, history), "Loss", is_wide=True)
    mixture = ""
    if history.names("Tokens/"):
        title = "Mixture: areas are what was trained on, dashed lines what the recipe plans"
        mixture = drawing(lambda axis: draw_mixture(axis, history), title, is_wide=True)
    body = "".join(
        [
            f"<p class=note>{html.escape(f'{name}, in {place}')}</p>",
            _metrics(history, now),
            losses,
            f"<div class=grid>{''.join(panels)}</div>",
            mixture,
            section("Starts", _starts(history), "Every start of the run, and the steps that were done again after it."),
            section("Spikes and skipped steps", _spikes(history)),
            section("Samples", _samples(history), "Greedy continuations of the recipe's prompts, as training went on."),
            section(
                "Scores along the way", _tasks_over_tokens(history), "On the recipe's tasks; bars are standard errors."
            ),
            section("Scores", _scores(history)),
            section("Machine", _machine(history)),
            section("Configuration", _configuration(history)),
        ]
    )
    return page(f"Run: {name}", now.sentence, now.state != "unfinished", body)


def _mfu(last: dict[str, float]) -> str:
    """Of the last step that has it; a step above a measured peak has none."""
    if "Speed/MFU" not in last:
        return "above the measured peak" if "Speed/TokensPerSecond" in last else ""
    return f"{last['Speed/MFU']:.1%}"


def _metrics(history: History, now: RunStatus) -> str:
    last = history.last
    figures = [
        ("tokens", _short(now.tokens)),
        ("training loss", "" if now.loss is None else f"{now.loss:.3f}"),
        *(
            (f"validation, {source}", f"{last[f'Validation/Loss/{source}']:.3f}")
            for source in history.names("Validation/Loss/")
        ),
        ("tokens/s, median", f"{now.tokens_per_second:,.0f}" if math.isfinite(now.tokens_per_second) else ""),
        ("MFU", _mfu(last)),
        ("goodput", f"{now.goodput:.1%}" if math.isfinite(now.goodput) else ""),
        ("time", duration(now.seconds) if math.isfinite(now.seconds) else ""),
        ("starts", f"{len(history.starts)}" if history.starts else ""),
    ]
    cells = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in figures if value
    )
    note = (
        "<p class=note>Goodput: tokens that are in a checkpoint / (highest rate x the time the run was up, loading,"
        " validation and saving in it, the launcher's own start not).</p>"
    )
    return f"<dl>{''.join(cells)}</dl>{note if math.isfinite(now.goodput) else ''}"


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _starts(history: History) -> str:
    rows: list[tuple[str, ...]] = []
    left_out = 0
    for number, start in enumerate(history.starts):
        if number == 0:
            why = "first start"
        elif start.get("left_out", 0) > left_out:
            why = "after a rollback"
        else:
            why = "after a failure, by the supervisor" if start.get("restart") else "started again"
        left_out = start.get("left_out", 0)
        hosts = ", ".join(f"{ranks} on {host}" for host, ranks in start.get("hosts", {}).items())
        again = max(0, start.get("reached", 0) - start["step"])
        time = start.get("time", "").removesuffix("+00:00").replace("T", " ")
        rows.append((time, why, hosts, f"{start['step']:,}", f"{again:,}"))
    return _newest(("time, UTC", "", "ranks", "from step", "steps done again"), rows, words=(0, 1, 2))


def _spikes(history: History) -> str:
    rows: list[tuple[str, ...]] = [
        (
            entry["event"],
            f"{entry['step']:,}",
            f"{entry['first_sample']:,} to {entry['last_sample']:,}",
            entry["reason"],
        )
        for entry in history.ledger
    ]
    rows += [
        (
            "applied",
            f"{row['step']:,}",
            f"{row['Guard/FirstSample']:,} to {row['Guard/LastSample']:,}",
            "spike",
        )
        for row in history.spikes
        if "Guard/Spikes" in row
    ]
    return _newest(("", "step", "samples", "reason"), rows, words=(0, 3))


def _newest(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], words: tuple[int, ...]) -> str:
    more = len(rows) - _MOST_ROWS
    note = f"<p class=note>and {more:,} before these</p>" if more > 0 else ""
    return table(head, rows[-_MOST_ROWS:], words) + note


def _samples(history: History) -> str:
    by_prompt: dict[str, list[dict]] = {}
    for sample in history.samples:
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    parts = []
    for number, (prompt, samples) in enumerate(by_prompt.items(), start=1):
        parts.append(f"<h3>Prompt {number}</h3>")
        parts += [
            f"<div class=sample><span class=note>{sample['tokens']:,} tokens</span>"
            f"<pre><mark>{html.escape(prompt)}</mark>{html.escape(sample['text'])}</pre></div>"
            for sample in _spread(samples)
        ]
    return "".join(parts)


def _spread(samples: list[dict]) -> list[dict]:
    """The first, the last, and some evenly in between."""
    if len(samples) <= _MOST_SAMPLES:
        return samples
    last = len(samples) - 1
    return [samples[round(number * last / (_MOST_SAMPLES - 1))] for number in range(_MOST_SAMPLES)]


def _tasks_over_tokens(history: History) -> str:
    """A chart for each metric: they have scales of their own."""
    metrics = dict.fromkeys(row["metric"] for row in history.tasks)
    return "".join(
        drawing(lambda axis, metric=metric: draw_tasks(axis, history, metric), metric, is_wide=True)  # type: ignore[misc]
        for metric in metrics
    )


def _scores(history: History) -> str:
    """Every file of scores: a suite beside the published rows, in percent; else the tasks one by one."""
    parts = []
    for scores in history.scores:
        trained = f", {_short(scores['tokens'])} tokens" if scores.get("tokens") else ""
        parts.append(f"<h3>{html.escape(scores['name'] + trained)}</h3>")
        parts.append(_suite(scores) if scores.get("percent") else _tasks(scores))
    return "".join(parts)


def _suite(scores: dict) -> str:
    ours, mean = scores["percent"], [scores["average"]] if "average" in scores else []
    head = ("", "tokens", *(score.get("benchmark", "") for score in ours), "average")
    rows = [
        (
            str(row["model"]),
            _short(row.get("tokens") or 0),
            *(f"{value:.2f}" for value in (*row["scores"], row["average"])),
        )
        for row in scores.get("published", [])
    ]
    rows.append(("this run", _short(scores.get("tokens") or 0), *map(_with_error, (*ours, *mean))))
    misprints = "".join(
        f"<p class=note>{html.escape(row['model'])}: {html.escape(row['misprint'])}</p>"
        for row in scores.get("published", [])
        if row.get("misprint")
    )
    return table(head, rows) + misprints


def _with_error(score: dict) -> str:
    error = score.get("stderr")
    return f"{score['value']:.2f}" + (f" ± {error:.2f}" if error is not None else "")


def _tasks(scores: dict) -> str:
    rows = [
        (
            str(row["task"]),
            str(row["metric"]),
            f"{row['value']:.4f}",
            "" if row.get("stderr") is None else f"{row['stderr']:.4f}",
        )
        for row in scores.get("scores", [])
    ]
    return table(("task", "metric", "score", "standard error"), rows, words=(0, 1))


def _machine(history: History) -> str:
    description, start = history.description, history.starts[-1] if history.starts else {}
    versions = description.get("versions", {})
    zero = description.get("deepspeed_config", {}).get("zero_optimization", {})
    rows = [
        ("hosts", ", ".join(f"{host} ({ranks} ranks)" for host, ranks in start.get("hosts", {}).items())),
        ("device", versions.get("device", "CPU" if versions else "")),
        ("ranks", str(description.get("world_size", ""))),
        ("ZeRO stage", str(zero.get("stage", 0)) if description else ""),
        ("micro batch, sequences", str(description.get("micro_batch", ""))),
        ("attention", str(description.get("attention", ""))),
    ]
    return table(("", ""), [row for row in rows if row[1]], words=(0, 1))


def _configuration(history: History) -> str:
    titles = {
        "recipe": "Recipe, resolved",
        "model": "Model",
        "deepspeed_config": "DeepSpeed config, resolved",
        "versions": "Versions",
        "data": "Data",
        "history": "What changed from start to start",
    }
    description = history.description
    return "".join(
        folded(title, preformatted(json.dumps(description[key], indent=1, ensure_ascii=False)))
        for key, title in titles.items()
        if description.get(key)
    )
