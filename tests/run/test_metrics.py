"""The sinks of a run, and what a resumed run does to them."""

import json
import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from launching import wait_until
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.summary.writer import event_file_writer

from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.evaluation.scores import Score
from tinyllama_ds.report.history import read_history, read_metrics
from tinyllama_ds.run import sinks
from tinyllama_ds.run.metrics import MetricsLogger, tensorboard_directory
from tinyllama_ds.run.sinks import JsonlWriter

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_file_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard numbers the files of a process and reads 10 before 9; each start of a run is a process of its own."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def log_steps(run_dir: Path, first: int, last: int, offset: float = 0.0) -> None:
    metrics = MetricsLogger(run_dir, {}, Progress(first, first * 8, first * 100), "{}")
    for step in range(first + 1, last + 1):
        metrics.log(step, step * 100, {"Train/Loss": step + offset, "Speed/MFU": 0.5})
    metrics.close()


def test_a_resumed_run_replaces_the_rows_that_it_repeats(tmp_path: Path) -> None:
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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes between a failure and the next attempt."""
    monkeypatch.setattr(sinks, "_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(sinks, "_FLUSH_SECONDS", 0.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.usefixtures("impatient")
def test_a_full_disk_loses_no_row(small_disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that could not be written on a full disk are written later, in both sinks, in order, each once."""
    run_dir = small_disk(size=2**20) / "run"
    metrics = MetricsLogger(run_dir, {}, Progress(0, 0, 0), "{}")
    row = {"Train/Loss": 1.0} | {f"Tokens/{'source' * 30}{number}": 0.0 for number in range(20)}
    for step in range(1, 10):
        if step == 4:
            fill(run_dir / "others")
        if step == 7:
            (run_dir / "others").unlink()
            now = int(time.time())  # event files are read in the order of the second in their names
            wait_until(lambda now=now: time.time() >= now + 1, "the next second")
        metrics.log(step, step * 100, row)
    metrics.close()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("Train/Loss")] == list(range(1, 10))
    events = EventAccumulator(str(run_dir / "tensorboard" / "over_tokens")).Reload()
    assert [event.step for event in events.Scalars("OverTokens/Train/Loss")] == list(range(100, 1000, 100))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert sum("metrics.jsonl: cannot be written (No space left on device)" in line for line in warnings) == 1
    assert sum("/tensorboard: cannot be written (No space left on device)" in line for line in warnings) == 1


def fill(path: Path) -> None:
    """Fill the disk."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))


@pytest.mark.usefixtures("impatient")
def test_a_folder_that_cannot_be_created_is_retried(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    metrics = MetricsLogger(tmp_path, {}, Progress(0, 0, 0), "{}")
    metrics.log(1, 100, {"Train/Loss": 1.0})
    (tmp_path / "tensorboard").unlink()
    metrics.log(2, 200, {"Train/Loss": 2.0})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("Train/Loss")] == [(1, 1.0), (2, 2.0)]
    assert sorted(events.Tags()["tensors"]) == ["custom_scalars__config__", "run/text_summary"]


def test_tensorboard_groups_the_metrics(tmp_path: Path) -> None:
    """Read back by TensorBoard's own plugin, after a resume too; every figure of a run is in some chart."""
    names = ["Train/Loss", "Train/LearningRate", "Train/BatchTokens", "Train/GradNorm", "Validation/Loss/a", "Tokens/a"]
    names += ["Speed/TokensPerSecond", "Speed/MFU", "Seconds/data", "Ranks/Median", "Memory/PeakGiB"]
    names += ["Guard/SkippedSteps", "Guard/Spikes", "Checkpoint/Seconds", "Checkpoint/StallSeconds", "Tasks/piqa/acc"]
    for first in (0, 4):
        metrics = MetricsLogger(tmp_path, {}, Progress(first, first * 8, first * 100), "{}")
        metrics.log(first + 1, 100 * first + 100, dict.fromkeys(names, 1.0))
        metrics.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path / "tensorboard"))
    plugin = CustomScalarsPlugin(TBContext(data_provider=provider))
    layout = json.loads(plugin.layout_impl(RequestContext(), ""))
    assert [category["title"] for category in layout["category"]] == [
        "Loss", "Tasks", "Schedule", "Speed", "Guard", "Checkpoint",
    ]  # fmt: skip
    patterns = [p for category in layout["category"] for c in category["chart"] for p in c["multiline"]["tag"]]
    assert [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []
    over_tokens = [tag for tag in multiplexer.Runs()["over_tokens"]["tensors"] if tag.startswith("OverTokens/")]
    assert sorted(over_tokens) == [
        f"OverTokens/{name}" for name in ("Tasks/piqa/acc", "Train/Loss", "Validation/Loss/a")
    ]
    assert [sum(bool(re.fullmatch(pattern, name)) for pattern in patterns) for name in over_tokens] == [1, 1, 1]


def test_scores_have_rows_with_errors_and_are_dropped_with_repeated_steps(
    tmp_path: Path,
) -> None:
    for first, value in ((0, 0.25), (2, 0.5)):
        metrics = MetricsLogger(tmp_path, {}, Progress(first, first * 8, first * 100), "{}")
        for step in range(first + 1, first + 4):
            metrics.log_scores(step, step * 100, [Score("piqa", "acc", value, 0.125, 9, 0, "1.0")])
        metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert [(row["step"], row["value"]) for row in rows] == [(1, 0.25), (2, 0.25), (3, 0.5), (4, 0.5), (5, 0.5)]
    assert rows[0] == {"step": 1, "tokens": 100, "task": "piqa", "metric": "acc", "value": 0.25, "stderr": 0.125,
                       "documents": 9, "shots": 0, "version": "1.0"}  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("Tasks/piqa/acc")] == [
        (row["step"], row["value"]) for row in rows
    ]


def test_losses_of_validation_samples_are_dropped_with_repeated_steps(tmp_path: Path) -> None:
    for first, loss in ((0, 1.0), (1, math.nan)):
        metrics = MetricsLogger(tmp_path, {}, Progress(first, first * 8, first * 100), "{}")
        for step in range(first + 1, first + 3):
            metrics.log_sample_losses(step, step * 100, {"a": torch.tensor([[96.0, 32], [loss / 3, 8]])})
        metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [(row["step"], row["losses"]) for row in rows] == [(1, [96, 0.333]), (2, [96, None]), (3, [96, None])]
    assert rows[0] == {"step": 1, "tokens": 100, "source": "a", "losses": [96.0, 0.333], "targets": [32, 8]}


def test_samples_are_dropped_with_repeated_steps(tmp_path: Path) -> None:
    for first, text in ((0, "before"), (2, "after")):
        metrics = MetricsLogger(tmp_path, {}, Progress(first, first * 8, first * 100), "{}")
        for step in range(first + 1, first + 4):
            metrics.log_samples(step, step * 100, [("two\nlines", text)])
        metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["text"]) for row in rows] == [
        (1, "before"), (2, "before"), (3, "after"), (4, "after"), (5, "after"),
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    texts = [event.tensor_proto.string_val[0] for event in events.Tensors("Samples/1/text_summary")]
    assert texts[-1] == b"    two\n    lines|after"


def test_uptime_continues_after_a_resume(tmp_path: Path) -> None:
    log_steps(tmp_path, 0, 6)
    log_steps(tmp_path, 4, 8)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    began = time.perf_counter() - 60
    metrics = MetricsLogger(tmp_path, {}, Progress(8, 64, 800), "{}", began=began)
    metrics.log(9, 900, {})
    metrics.close()
    assert metrics.last_logged_step == 8
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    assert seconds[-1] + 60 <= last <= seconds[-1] + time.perf_counter() - began + 0.001  # rounded
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tokens": 700, "seconds": 99.0}\n')  # of a save, which comes late
    assert JsonlWriter(tmp_path / "metrics.jsonl", 8).last_step == 9


def test_steps_logged_before_the_first_save_are_repeated(tmp_path: Path) -> None:
    """It starts over at step 0, whose validation was logged too."""
    for _ in range(2):
        metrics = MetricsLogger(tmp_path, {}, Progress(0, 0, 0), "{}")
        metrics.log(0, 0, {"Validation/Loss/a": 6.0})
        metrics.log(1, 100, {"Train/Loss": 1.0})
        metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("Validation/Loss/a")] == [0]


def test_tensorboard_can_be_off(tmp_path: Path) -> None:
    metrics = MetricsLogger(tmp_path, {"tensorboard": {"enabled": False}}, Progress(0, 0, 0), "{}")
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
def test_tensorboard_writes_to_the_directory_of_the_json(section: dict, expected: str) -> None:
    assert tensorboard_directory(section, Path("run")) == Path(expected)


def test_metrics_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    """jq, pandas and browsers read no NaN and no Infinity; the report takes null for what those were in older runs."""
    figures = {"Train/Loss": float("nan"), "Train/GradNorm": float("inf"), "Speed/MFU": float("-inf"), "Train/A": 1.5}
    metrics = MetricsLogger(tmp_path, {"tensorboard": {"enabled": False}}, Progress(0, 0, 0), "{}")
    metrics.log(1, 100, figures)
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    row = json.loads(line, parse_constant=refuse)
    assert (row["Train/Loss"], row["Train/GradNorm"], row["Speed/MFU"], row["Train/A"]) == (None, None, None, 1.5)
    older = json.dumps({"step": 2, "tokens": 200, "Train/Loss": float("nan"), "Train/A": float("inf")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{older}\n")
    history = read_history(tmp_path)
    assert history.points("Train/A")[1].tolist() == [1.5]
    assert math.isnan(history.last["Train/Loss"])
    assert [math.isnan(row["Train/Loss"]) for row in read_metrics(tmp_path)] == [True, True]
