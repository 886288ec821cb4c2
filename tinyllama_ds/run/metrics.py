"""Metrics of a run: metrics.jsonl, TensorBoard and the monitors of the DeepSpeed JSON. Rank 0 writes them."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.evaluation.scores import Score
from tinyllama_ds.layout import METRICS_FILE, VALIDATION_FILE
from tinyllama_ds.run.sinks import JsonlWriter, TensorBoardWriter, warn

SAMPLES_FILE = "samples.jsonl"
SCORES_FILE = "tasks.jsonl"
# What TensorBoard's page "Custom Scalars" shows: charts by category, each with patterns of names.
_LAYOUT = Path(__file__).parents[1] / "templates" / "tensorboard.json"


class NoMetrics:
    """The metrics logger of all ranks but 0, which writes nothing."""

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step to every sink. Names are `Namespace/Name`."""

    def log_sample_losses(self, step: int, tokens: int, samples: Mapping[str, Tensor]) -> None:
        """Write the losses and targets of each source's validation samples (samples, 2) to `validation.jsonl`."""

    def log_samples(self, step: int, tokens: int, texts: list[tuple[str, str]]) -> None:
        """Write the continuation of each prompt to `samples.jsonl` and to TensorBoard."""

    def log_scores(self, step: int, tokens: int, scores: Sequence[Score]) -> None:
        """Write the scores on tasks with their standard errors to `tasks.jsonl`, and as metrics to every sink."""

    def close(self) -> None:
        """Write what is still waiting, and close all files."""


class MetricsLogger(NoMetrics):
    """Writes one dict of metrics per logged step to every sink. x is the optimizer step, counted from 1."""

    def __init__(
        self, run_dir: Path, monitors: dict, start: Progress, config_text: str, began: float | None = None
    ) -> None:
        """`began` is the start of this process by `time.perf_counter`; without it, now."""
        run_dir.mkdir(parents=True, exist_ok=True)
        last_step, last_tokens = (start.step, start.tokens) if start.step else (-1, -1)
        self._rows = JsonlWriter(run_dir / METRICS_FILE, last_step)
        self._samples = JsonlWriter(run_dir / SAMPLES_FILE, last_step)
        self._scores = JsonlWriter(run_dir / SCORES_FILE, last_step)
        self._validation = JsonlWriter(run_dir / VALIDATION_FILE, last_step)
        self.last_logged_step = max(self._rows.last_step, start.step)  # by earlier processes of the run
        self._began = (time.perf_counter() if began is None else began) - self._rows.last.get("seconds", 0.0)
        self._tensorboard = self._over_tokens = None
        section = monitors.get("tensorboard", {})
        if section.get("enabled", True):
            directory = tensorboard_directory(section, run_dir)
            self._tensorboard = TensorBoardWriter(directory, last_step)
            # A folder of its own: what a resumed run repeats is purged by x, which counts tokens there.
            self._over_tokens = TensorBoardWriter(directory / "over_tokens", last_tokens)
            layout = json.loads(_LAYOUT.read_text())
            self._tensorboard.write(start.step, {"run": f"```json\n{config_text}\n```", "layout": layout})
        self._monitor = _deepspeed_monitor(monitors, run_dir)
        self._monitor_failed = False

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        # The seconds that the run was up, all its processes one after the other.
        seconds = round(time.perf_counter() - self._began, 3)
        self._rows.write({"step": step, "tokens": tokens, "seconds": seconds} | metrics)
        if self._tensorboard is not None and self._over_tokens is not None:
            self._tensorboard.write(step, metrics)
            chosen = {name: value for name, value in metrics.items() if "Loss" in name or name.startswith("Tasks/")}
            if chosen:
                self._over_tokens.write(tokens, {f"OverTokens/{name}": value for name, value in chosen.items()})
        if self._monitor is not None:
            self._write_to_monitor([(name, value, step) for name, value in metrics.items()])

    def log_sample_losses(self, step: int, tokens: int, samples: Mapping[str, Tensor]) -> None:
        for source, of_source in samples.items():
            sums, targets = of_source.unbind(1)
            losses = [round(loss, 3) if isfinite(loss) else None for loss in sums.tolist()]
            row = {"step": step, "tokens": tokens, "source": source}
            self._validation.write(row | {"losses": losses, "targets": targets.long().tolist()})

    def log_samples(self, step: int, tokens: int, texts: list[tuple[str, str]]) -> None:
        for number, (prompt, text) in enumerate(texts, start=1):
            self._samples.write({"step": step, "tokens": tokens, "prompt": prompt, "text": text})
            if self._tensorboard is not None:
                code = "\n".join(f"    {line}" for line in f"{prompt}|{text}".splitlines())  # code in Markdown
                self._tensorboard.write(step, {f"Samples/{number}": code})

    def log_scores(self, step: int, tokens: int, scores: Sequence[Score]) -> None:
        for score in scores:
            self._scores.write({"step": step, "tokens": tokens} | asdict(score))
        self.log(step, tokens, {f"Tasks/{score.task}/{score.metric}": score.value for score in scores})

    def close(self) -> None:
        for sink in (self._rows, self._samples, self._scores, self._validation, self._tensorboard, self._over_tokens):
            if sink is not None:
                sink.close()

    def _write_to_monitor(self, events: list[tuple[str, float, int]]) -> None:
        try:
            self._monitor.write_events(events)
        except OSError as error:
            if not self._monitor_failed:
                warn("a monitor of the DeepSpeed JSON", error)
            self._monitor_failed = True


def tensorboard_directory(section: dict, run_dir: Path) -> Path:
    """Where event files go: DeepSpeed's output_path/job_name where they are given, else the run directory."""
    output, job = (section.get(key, "auto") for key in ("output_path", "job_name"))
    return run_dir / "tensorboard" if output in ("auto", "") else Path(output) / (job if job != "auto" else "")


def _deepspeed_monitor(monitors: dict, run_dir: Path) -> Any:
    """DeepSpeed's own writers for wandb, comet and csv; None where none is enabled. TensorBoard is written here."""
    sections = {name: dict(section) for name, section in monitors.items() if name != "tensorboard"}
    if not any(section.get("enabled") for section in sections.values()):
        return None
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    csv = sections.get("csv_monitor", {})
    if csv.get("output_path", "auto") in ("auto", ""):
        csv["output_path"] = str(run_dir)
    if csv.get("job_name", "auto") == "auto":
        csv["job_name"] = "csv"
    return MonitorMaster(get_monitor_config(sections))
