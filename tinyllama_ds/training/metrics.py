"""Figures of a run: metrics.jsonl, TensorBoard, the monitors of the DeepSpeed JSON, and the console. Rank 0 only."""

import json
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tinyllama_ds.training.checkpoint import Progress

METRICS_FILE = "metrics.jsonl"

# Dense bf16 matrix rate of the data sheets, in FLOP/s (NVIDIA; without sparsity). Matched by substring.
DATA_SHEET_PEAK = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s of one device, where the number comes from): its data sheet, else a matrix product measured now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, peak in DATA_SHEET_PEAK.items():
            if key in name and dtype == torch.bfloat16:
                return peak, f"data sheet of {name}"
    return measured_peak(device, dtype), f"a 2048 x 2048 x 2048 {str(dtype).removeprefix('torch.')} matrix product"


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of several: 8,192 on a GPU, 2,048 elsewhere."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


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
        for name, start, end in self._events:
            end.synchronize()
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


class MetricsLogger:
    """Takes one dict of figures per logged step and hands it to every sink. x is the optimizer step, counted from 1."""

    def __init__(
        self,
        run_dir: Path,
        monitors: dict,
        total_steps: int,
        start: Progress,
        config_text: str,
        is_terminal: bool = False,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        self._forget_after(start.step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = self._over_tokens = None
        section = monitors.get("tensorboard", {})
        if section.get("enabled", True):
            directory = tensorboard_directory(section, run_dir)
            self._tensorboard = _open_tensorboard(directory, start.step)
            # A folder of its own: what a resumed run does again is purged by x, which counts tokens there.
            self._over_tokens = _open_tensorboard(directory / "over_tokens", start.tokens)
            self._tensorboard.add_text("run", f"```json\n{config_text}\n```", start.step)
        self._monitor = _deepspeed_monitor(monitors, run_dir)
        self._bar = tqdm(
            total=total_steps,
            initial=start.step,
            desc="pretrain",
            unit="step",
            dynamic_ncols=True,
            mininterval=1 if is_terminal else 10,  # a log file wants lines, not frames
        )

    def log(self, step: int, tokens: int, figures: dict[str, float]) -> None:
        """Write the figures of a step to every sink. Names are `Namespace/Name`."""
        self._file.write(json.dumps({"step": step, "tokens": tokens} | figures) + "\n")
        self._file.flush()
        if self._tensorboard is not None and self._over_tokens is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, step)
                if "Loss" in name:
                    self._over_tokens.add_scalar(f"OverTokens/{name}", value, tokens)
        if self._monitor is not None:
            self._monitor.write_events([(name, value, step) for name, value in figures.items()])

    def advance(self, step: int, text: str) -> None:
        """Move the progress bar to a step, and say how it goes."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """A line of its own above the progress bar."""
        tqdm.write(text)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        for writer in (self._tensorboard, self._over_tokens):
            if writer is not None:
                writer.close()

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that a resumed run will do again."""
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a crash can leave half a line
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(self._path)


def _open_tensorboard(directory: Path, last_x: int) -> SummaryWriter:
    return SummaryWriter(str(directory), purge_step=last_x + 1 if last_x else None)


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
