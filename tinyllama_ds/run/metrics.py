"""Figures of a run: metrics.jsonl, TensorBoard, the monitors of the DeepSpeed JSON, and the console. Rank 0 only."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import torch

from tinyllama_ds.bars import progress
from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.distributed.collectives import gather_from_ranks
from tinyllama_ds.evaluation.scores import Score
from tinyllama_ds.gpus import gpu_of_device
from tinyllama_ds.layout import METRICS_FILE
from tinyllama_ds.model.config import dtype_name
from tinyllama_ds.run.sinks import JsonlWriter, TensorBoardWriter, warn

SAMPLES_FILE = "samples.jsonl"
SCORES_FILE = "tasks.jsonl"
# What TensorBoard's page "Custom Scalars" shows: charts by category, each with patterns of names.
_LAYOUT = {
    "Loss": {
        "training and validation, over steps": ["Multiline", ["Train/Loss", "Validation/Loss/.*"]],
        "training and validation, over tokens": ["Multiline", ["OverTokens/(Train|Validation)/.*"]],
    },
    "Tasks": {
        "scores, over steps": ["Multiline", ["Tasks/.*"]],
        "scores, over tokens": ["Multiline", ["OverTokens/Tasks/.*"]],
    },
    "Schedule": {
        "learning rate": ["Multiline", ["Train/LearningRate"]],
        "batch in tokens": ["Multiline", ["Train/BatchTokens"]],
        "tokens of each source": ["Multiline", ["Tokens/.*"]],
    },
    "Speed": {
        "tokens per second": ["Multiline", ["Speed/TokensPerSecond"]],
        "MFU": ["Multiline", ["Speed/MFU"]],
        "seconds by phase": ["Multiline", ["Seconds/.*"]],
        "seconds of the ranks' own work": ["Multiline", ["Ranks/(Min|Median|Max)"]],
        "memory in GiB": ["Multiline", ["Memory/PeakGiB"]],
    },
    "Guard": {
        "gradient norm before clipping": ["Multiline", ["Train/GradNorm"]],
        "skipped steps and spikes": ["Multiline", ["Guard/(SkippedSteps|Spikes)"]],
    },
    "Checkpoint": {
        "seconds of a save, and those that training stood still": [
            "Multiline",
            ["Checkpoint/Seconds", "Checkpoint/StallSeconds"],
        ],
        "saves abandoned": ["Multiline", ["Checkpoint/Failures"]],
    },
}


@cache  # a matrix product takes a moment
def peak_flops(device: torch.device, dtype: torch.dtype, ranks: int = 1) -> tuple[float, str]:
    """(FLOP/s of one device, where the number comes from): its data sheet, else a matrix product measured now.

    With several ranks that is collective the first time, because they share a machine's cores, caches and clock: all
    measure at once, as they will compute, and the best is kept.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu = gpu_of_device(name)
        if gpu is not None and dtype == torch.bfloat16:
            return gpu.peak_flops, f"data sheet of {name}"
    size, kind = _product_size(device), dtype_name(dtype)
    return measured_together(device, dtype, ranks), f"a measured {size} x {size} x {size} {kind} matrix product"


def measured_together(device: torch.device, dtype: torch.dtype, ranks: int) -> float:
    """FLOP/s of a large matrix product while all ranks compute one, of the fastest. Collective with several ranks."""
    if ranks == 1:
        return measured_peak(device, dtype)
    gather_from_ranks(None)  # all begin at the same time
    return max(gather_from_ranks(measured_peak(device, dtype)))


def utilisation(flops: float, peak: float) -> float | None:
    """The share of the peak; None where it is above: then the peak was measured too low, and nobody knows the share."""
    return flops / peak if flops <= peak else None


def _product_size(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 2048


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of several: 8,192 on a GPU, 2,048 elsewhere."""
    size, products = _product_size(device), 10 if device.type == "cuda" else 1
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / products

    seconds()  # loads the kernel
    return 2 * size**3 / min(seconds() for _ in range(4))


class PhaseClock:
    """Seconds by phase since the last reading. On a GPU the phases are marked by events and nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._on_gpu and name != "data":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Seconds by phase, then start again at zero. Waits for the device, so call it on logged steps only."""
        if self._events:
            self._events[-1][-1].synchronize()  # and with it all before
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds


def memory_bytes(device: torch.device) -> int:
    """Peak memory: what the allocator held on a GPU, the resident size of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory(device: torch.device) -> str:
    """The same in words, beside what a GPU has."""
    held = f"{memory_bytes(device) / 2**30:.1f} GiB"
    if device.type == "cuda":
        held += f" of {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB"
    return held


class MetricsLogger:
    """Takes one dict of figures per logged step and hands it to every sink. x is the optimizer step, counted from 1."""

    def __init__(
        self,
        run_dir: Path,
        monitors: dict,
        total_steps: int,
        start: Progress,
        config_text: str,
        terminal: TextIO | None = None,
        began: float | None = None,
    ) -> None:
        """`terminal` gets the progress bar, stderr lines where there is none.

        `began` is when this process did, by `time.perf_counter`; without it, now.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        last_step, last_tokens = (start.step, start.tokens) if start.step else (-1, -1)
        self._rows = JsonlWriter(run_dir / METRICS_FILE, last_step)
        self._samples = JsonlWriter(run_dir / SAMPLES_FILE, last_step)
        self._scores = JsonlWriter(run_dir / SCORES_FILE, last_step)
        self.reached = max(self._rows.reached, start.step)  # by the processes before
        self._began = (time.perf_counter() if began is None else began) - self._rows.last.get("seconds", 0.0)
        self._tensorboard = self._over_tokens = None
        section = monitors.get("tensorboard", {})
        if section.get("enabled", True):
            directory = tensorboard_directory(section, run_dir)
            self._tensorboard = TensorBoardWriter(directory, last_step)
            # A folder of its own: what a resumed run does again is purged by x, which counts tokens there.
            self._over_tokens = TensorBoardWriter(directory / "over_tokens", last_tokens)
            self._tensorboard.write_text("run", f"```json\n{config_text}\n```", start.step)
            self._tensorboard.write_layout(_LAYOUT, start.step)
        self._monitor = _deepspeed_monitor(monitors, run_dir)
        self._monitor_failed = False
        self._bar = progress(
            file=terminal, total=total_steps, initial=start.step, desc="pretrain", unit="step", dynamic_ncols=True,
            mininterval=1,
        )  # fmt: skip

    def log(self, step: int, tokens: int, figures: dict[str, float]) -> None:
        """Write the figures of a step to every sink. Names are `Namespace/Name`.

        A row has beside them the seconds that the run was up, all its processes one after the other.
        """
        seconds = round(time.perf_counter() - self._began, 3)
        self._rows.write({"step": step, "tokens": tokens, "seconds": seconds} | figures)
        if self._tensorboard is not None and self._over_tokens is not None:
            self._tensorboard.write(step, figures)
            chosen = {name: value for name, value in figures.items() if "Loss" in name or name.startswith("Tasks/")}
            if chosen:
                self._over_tokens.write(tokens, {f"OverTokens/{name}": value for name, value in chosen.items()})
        if self._monitor is not None:
            self._write_to_monitor([(name, value, step) for name, value in figures.items()])

    def log_samples(self, step: int, tokens: int, texts: list[tuple[str, str]]) -> None:
        """Write what the model made of each prompt, to `samples.jsonl` and to TensorBoard."""
        for number, (prompt, text) in enumerate(texts, start=1):
            self._samples.write({"step": step, "tokens": tokens, "prompt": prompt, "text": text})
            if self._tensorboard is not None:
                code = "\n".join(f"    {line}" for line in f"{prompt}|{text}".splitlines())  # Markdown leaves it alone
                self._tensorboard.write_text(f"Samples/{number}", code, step)

    def log_scores(self, step: int, tokens: int, scores: Sequence[Score]) -> None:
        """Write the scores on tasks with their standard errors to `tasks.jsonl`, and as figures to every sink."""
        for score in scores:
            self._scores.write({"step": step, "tokens": tokens} | asdict(score))
        self.log(step, tokens, {f"Tasks/{score.task}/{score.metric}": score.value for score in scores})

    def advance(self, step: int, text: str) -> None:
        """Move the progress bar to a step, and say how it goes."""
        with suppress(OSError):  # a log file on a full disk
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def log_line(self, text: str) -> None:
        """A line of its own above the progress bar."""
        with suppress(OSError):
            self._bar.clear()  # it comes again with the next step
            print(text, flush=True)

    def close(self) -> None:
        with suppress(OSError):
            self._bar.close()
        self._rows.close()
        self._samples.close()
        self._scores.close()
        for events in (self._tensorboard, self._over_tokens):
            if events is not None:
                events.close()

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
