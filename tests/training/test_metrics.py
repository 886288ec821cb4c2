"""The sinks of a run, and what a resumed run does to them."""

import json
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinyllama_ds.training.checkpoint import Progress
from tinyllama_ds.training.metrics import MetricsLogger, PhaseClock, peak_flops, tensorboard_directory

CPU = torch.device("cpu")


def log_steps(run_dir: Path, first: int, last: int, offset: float = 0.0) -> None:
    metrics = MetricsLogger(run_dir, {}, 10, Progress(first, first * 8, first * 100), "{}")
    for step in range(first + 1, last + 1):
        metrics.log(step, step * 100, {"Train/Loss": step + offset, "Speed/MFU": 0.5})
    metrics.close()


def test_resumed_run_replaces_the_rows_that_it_does_again(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 6)
    log_steps(tmp_path, 4, 8, offset=0.5)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["Train/Loss"]) for row in rows] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.5), (6, 6.5), (7, 7.5), (8, 8.5),
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("Train/Loss")] == [(r["step"], r["Train/Loss"]) for r in rows]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "over_tokens")).Reload()
    assert [e.step for e in events.Scalars("OverTokens/Train/Loss")] == [row["tokens"] for row in rows]


def test_a_row_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "Train/Lo')
    log_steps(tmp_path, 3, 4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_tensorboard_can_be_off(tmp_path: Path) -> None:
    metrics = MetricsLogger(tmp_path, {"tensorboard": {"enabled": False}}, 1, Progress(0, 0, 0), "{}")
    metrics.log(1, 10, {"Train/Loss": 1.0})
    metrics.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, "run/tensorboard"),
        ({"output_path": "auto", "job_name": "auto"}, "run/tensorboard"),
        ({"output_path": "logs", "job_name": "llama"}, "logs/llama"),
    ],
)
def test_tensorboard_goes_where_the_json_says(section: dict, expected: str) -> None:
    assert tensorboard_directory(section, Path("run")) == Path(expected)


def test_clock_adds_up_phases_and_starts_again() -> None:
    clock = PhaseClock(CPU)
    for _ in range(3):
        with clock.phase("forward"):
            time.sleep(0.01)
    assert 0.03 <= clock.read()["forward"] < 1
    assert clock.read() == {}


def test_unknown_device_is_measured_and_says_so() -> None:
    peak, origin = peak_flops(CPU, torch.float32)
    assert 1e9 < peak < 1e14
    assert origin == "a 2048 x 2048 x 2048 float32 matrix product"
