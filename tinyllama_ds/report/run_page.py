"""The report of a run: one HTML page for people, and the same values for programs."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tinyllama_ds.evaluation.scores import scores_table
from tinyllama_ds.numbers import duration, short_count
from tinyllama_ds.page import Chart, Table, chart, render
from tinyllama_ds.report.charts import PANELS, draw_losses, draw_mixture, draw_tasks
from tinyllama_ds.report.history import History
from tinyllama_ds.report.long_context import all_long_context_tables, long_context_charts

_MAX_ROWS = 40  # of a table; the newest
_SAMPLED = [number / 7 for number in range(8)]  # the places of the samples of a prompt, from first to last
_STATES = {"running": "Running:", "stopped": "Stopped and saved at"}


def summarize(history: History, committed: int, is_held: bool) -> dict[str, Any]:
    """State, progress and speed of a run, with the last value of every metric; None for what is not finite.

    `committed` tokens are in a checkpoint; `is_held`: whether a supervisor that is alive holds the run. The state is
    finished, stopped, running or unfinished; goodput is tokens in checkpoints / (peak rate x uptime).
    """
    plan, last, rate = history.description.get("plan", {}), history.last, history.recent_rate
    total = plan.get("tokens", history.tokens)
    possible = history.peak_rate * last.get("seconds", math.nan)
    events = Counter(entry["event"] for entry in history.ledger)
    state = "running" if is_held else "unfinished"
    summary = last | {
        "Speed/MedianTokensPerSecond": history.median_rate,
        "state": history.state if history.state in ("finished", "stopped") else state,
        "steps_planned": plan.get("steps", last["step"]),
        "tokens_planned": total,
        "goodput": (committed - history.inherited_tokens) / possible if committed and possible > 0 else math.nan,
        "seconds_left": (total - history.tokens) / rate if rate > 0 else math.nan,
        "starts": len(history.starts),
        "skipped_steps": events["skipped"],
        "rollbacks": events["rolled back"],
        "spikes": len(history.spikes),
    }
    summary["verdict"] = _verdict(summary, history.inherited_tokens)
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in summary.items()
    }


def _verdict(summary: dict[str, Any], inherited: int) -> str:
    """One sentence; a branch has inherited tokens from its parent run."""
    tokens, total, seconds = summary["tokens"], summary["tokens_planned"], summary.get("seconds", math.nan)
    rate = "no step was logged yet"
    if "Train/Loss" in summary:
        rate = f"loss {summary['Train/Loss']:.3f}, {summary['Speed/MedianTokensPerSecond']:,.0f} tokens/s"
    if math.isfinite(summary["goodput"]):
        rate += f", goodput {summary['goodput']:.1%}"
    if summary["state"] == "finished":
        own = f", {tokens - inherited:,} of its own" if inherited else ""
        time = f" in {duration(seconds)}" if math.isfinite(seconds) else ""
        return f"Finished: all {summary['steps_planned']:,} steps, {tokens:,} tokens{own}{time}; {rate}"
    state = _STATES.get(summary["state"], "Not finished, and no supervisor holds it:")
    share = f"{tokens:,} of {total:,} tokens ({tokens / max(1, total):.1%})"
    left = f"; about {duration(summary['seconds_left'])} left" if math.isfinite(summary["seconds_left"]) else ""
    return f"{state} step {summary['step']:,} of {summary['steps_planned']:,}, {share}; {rate}{left}"


def report_page(
    history: History, summary: dict[str, Any], place: str, tables: Sequence[Table] = (), charts: Sequence[Chart] = ()
) -> str:
    """The page of a run whose directory is `place`; `summary` is that of `summarize`.

    `tables` and `charts` come after the losses.
    """

    def drawn(draw: Callable[..., None], title: str, is_wide: bool = False) -> Chart:
        return chart(lambda axis: draw(axis, history), title, is_wide)

    name = history.description.get("recipe", {}).get("name", place)
    mixture = "Mixture: areas as trained, dashed lines as planned by the recipe"
    metrics_of_tasks = dict.fromkeys(row["metric"] for row in history.tasks)
    return render(
        "report.html",
        title=f"Run: {name}",
        verdict=summary["verdict"],
        passed=summary["state"] != "unfinished",
        name=name,
        place=place,
        summary=summary,
        description=history.description,
        validated_sources=history.names("Validation/Loss/"),
        short_count=short_count,
        duration=duration,
        as_json=partial(json.dumps, indent=1, ensure_ascii=False),
        loss=drawn(draw_losses, "Loss", True),
        tables=tables,
        charts=charts,
        panels=[drawn(draw, title) for metric, title, draw in PANELS if metric in history.series],
        mixture=[drawn(draw_mixture, mixture, True)] if history.names("Tokens/") else [],
        starts=_starts(history),
        spikes=_spikes(history),
        samples=_samples(history),
        task_charts=[drawn(partial(draw_tasks, metric=metric), metric, True) for metric in metrics_of_tasks],
        scores=list(map(scores_table, history.scores)),
        long_context_charts=long_context_charts(history.long_context),
        long_context_tables=all_long_context_tables(history.long_context),
        machine=_machine(history),
    )


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
    events = [
        (row["event"], row["step"], row["first_sample"], row["last_sample"], row["reason"]) for row in history.ledger
    ]
    events += [
        ("applied", row["step"], row["Guard/FirstSample"], row["Guard/LastSample"], "spike")
        for row in history.spikes
        if "Guard/Spikes" in row
    ]
    rows = [(event, f"{step:,}", f"{first:,} to {last:,}", reason) for event, step, first, last, reason in events]
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
    return {
        prompt: [samples[number] for number in sorted({round(part * (len(samples) - 1)) for part in _SAMPLED})]
        for prompt, samples in by_prompt.items()
    }


def _activations(description: dict) -> str:
    every = description.get("activation_checkpointing", 0)
    if not every:
        return ""
    blocks = "all blocks are recomputed" if every == 1 else f"one in {every} blocks is recomputed"
    return blocks + (", inputs in host memory" if description.get("activation_offloading") else "")


def _machine(history: History) -> Table:
    description, start = history.description, history.starts[-1] if history.starts else {}
    versions = description.get("versions", {})
    zero = description.get("deepspeed_config", {}).get("zero_optimization", {})
    shared = description.get("sequence_parallel", 1)
    rows = [
        ("hosts", ", ".join(f"{host} ({ranks} ranks)" for host, ranks in start.get("hosts", {}).items())),
        ("device", versions.get("device", "CPU" if versions else "")),
        ("ranks", str(description.get("world_size", ""))),
        ("ranks that share a sequence", str(shared) if shared > 1 else ""),
        ("ZeRO stage", str(zero.get("stage", 0)) if description else ""),
        ("micro-batch, sequences", str(description.get("micro_batch", ""))),
        ("attention", str(description.get("attention", ""))),
        ("activations", _activations(description)),
    ]
    return Table("Machine", (), [row for row in rows if row[1]], text_columns=(0, 1))
