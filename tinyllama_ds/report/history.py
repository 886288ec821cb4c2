"""The history of a run, read from its directory: metrics over tokens and events."""

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_ds.bars import progress
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.suites import LONG_CONTEXT
from tinyllama_ds.files import Kinds, parse_row, read_object_if_whole, whole_rows
from tinyllama_ds.layout import LEDGER_FILE, METRICS_FILE, RUN_FILE, STARTS_FILE, STATUS_FILE
from tinyllama_ds.report.run_files import LARGEST, Description, LongContext, Scores, Start, TaskScore, validated

_COLUMNS = 500  # of a drawing
_MOST_POINTS = 65_536  # of a series, before it is thinned out
_TAIL_BYTES = 65_536
_SCORES = ("scores/*.json", "evaluation/*/*.json")  # the latter is by checkpoint
# Required keys of a row: of metrics.jsonl and starts.jsonl, and of the others.
_STEPS: dict[str, Kinds] = {"step": int, "tokens": int}
_SKIPS: dict[str, Kinds] = {"event": str, "step": int, "first_sample": int, "last_sample": int, "reason": str}
_SAMPLES: dict[str, Kinds] = {"tokens": int, "prompt": str, "text": str}
_TASKS: dict[str, Kinds] = {"tokens": int, "task": str, "metric": str, "value": (int, float)}
_DRAWN = (
    "seconds",
    "Train/",
    "Validation/Loss/",
    "Speed/",
    "Seconds/",
    "Tokens/",
    "Memory/",
    "Checkpoint/StallSeconds",
)


class Series:
    """One metric over tokens, downsampled to the columns of a drawing.

    Each column keeps its first, last, smallest and largest value: the line through them is the line through all
    values (M4; Jugel, Jerzak, Hackenbroich and Markl 2014). Memory does not grow with the run.
    """

    def __init__(self, end: int) -> None:
        """`end` is the number of tokens at the right edge."""
        self._scale = _COLUMNS / max(1, end)
        self._tokens, self._values = array("d"), array("d")

    def add(self, tokens: float, value: float) -> None:
        """Add a point, unless it is not finite."""
        if math.isfinite(value):
            self._tokens.append(tokens)
            self._values.append(value)
            if len(self._tokens) == _MOST_POINTS:
                self._downsample()

    def __len__(self) -> int:
        return len(self._tokens)

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, ascending, and values, each (N,); N is four times the number of columns at most."""
        self._downsample()
        return np.array(self._tokens), np.array(self._values)

    def _downsample(self) -> None:
        tokens, values = np.array(self._tokens), np.array(self._values)
        by_tokens = np.argsort(tokens, kind="stable")
        tokens, values = tokens[by_tokens], values[by_tokens]
        columns = (tokens * self._scale).astype(np.int64)
        by_value = np.lexsort((values, columns))
        starts = np.flatnonzero(np.diff(columns, prepend=-1))
        ends = np.append(starts[1:], len(columns)) - 1
        kept = np.unique(np.concatenate((starts, ends, by_value[starts], by_value[ends])))
        self._tokens, self._values = array("d", tokens[kept].tolist()), array("d", values[kept].tolist())


@dataclass
class History:
    """Everything in a run directory that a report shows."""

    description: dict  # run.json
    state: str  # finished, stopped, rolled back or running, as its last process wrote it
    last: dict[str, Any] = field(default_factory=dict)  # last value of every metric
    series: dict[str, Series] = field(default_factory=dict)
    median_rate: float = math.nan  # tokens/s
    recent_rate: float = math.nan
    peak_rate: float = math.nan
    spikes: list[dict] = field(default_factory=list)  # rows of the guard
    starts: list[dict] = field(default_factory=list)
    ledger: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    scores: list[dict] = field(default_factory=list)  # files of `evaluate`
    tasks: list[dict] = field(default_factory=list)  # scores during training, a task and metric per row
    long_context: dict[str, dict] = field(default_factory=dict)  # results of the suite by checkpoint

    @property
    def tokens(self) -> int:
        return int(self.last.get("tokens", 0))

    @property
    def first_token(self) -> int:
        """The start of the run: of a branch, its parent's checkpoint."""
        return self.description.get("parent", {}).get("tokens", 0)

    @property
    def inherited_tokens(self) -> int:
        """Tokens at the first start: those of a branch's parent."""
        return self.starts[0]["tokens"] if self.starts else 0

    def stages(self) -> list[tuple[dict, int, int]]:
        """Every stage of the recipe that was reached, with its first token and the first one after it."""
        found, first = [], 0
        for stage in self.description.get("recipe", {}).get("stages", []):
            if first < self.tokens:
                end = first + -(-stage["tokens"] // stage["global_batch_tokens"]) * stage["global_batch_tokens"]
                found.append((stage, first, min(end, self.tokens)))
                first = end
        return found

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values of a metric, each (N,); empty where it was never logged."""
        return self.series[name].points() if name in self.series else (np.empty(0), np.empty(0))

    def names(self, prefix: str) -> list[str]:
        """The metrics with a prefix, without it."""
        return sorted(name.removeprefix(prefix) for name in self.series if name.startswith(prefix))


def read_metrics(run_dir: Path) -> list[dict]:
    """All whole rows of a run's metrics.jsonl; none without the file. Values are numbers, NaN if not finite."""
    path = run_dir / METRICS_FILE
    return list(_rows(path)) if path.is_file() else []


def read_history(run_dir: Path) -> History:
    """Reads row by row in constant memory. Raises `ConfigError` where nothing was logged."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; expected the directory of a run that has logged a step")
    state = read_object_if_whole(run_dir / STATUS_FILE).get("state")
    history = History(
        validated(read_object_if_whole(run_dir / RUN_FILE), Description),
        state if isinstance(state, str) else "",
        starts=[start for row in _read_lines(run_dir / STARTS_FILE, _STEPS) if (start := validated(row, Start))],
        ledger=_read_lines(run_dir / LEDGER_FILE, _SKIPS),
        samples=_read_lines(run_dir / "samples.jsonl", _SAMPLES),
        tasks=[score for row in _read_lines(run_dir / "tasks.jsonl", _TASKS) if (score := validated(row, TaskScore))],
        scores=[
            content | {"name": f"{file.parent.name}/{file.stem}"}
            for pattern in _SCORES
            for file in sorted(run_dir.glob(pattern))
            if file.stem != LONG_CONTEXT and (content := validated(read_object_if_whole(file), Scores))
        ],
        long_context={
            file.parent.name: content["long_context"]
            for file in sorted(run_dir.glob(f"evaluation/*/{LONG_CONTEXT}.json"))
            if (content := validated(read_object_if_whole(file), LongContext))
        },
    )
    _read_metrics(path, history)
    return history


def _read_metrics(path: Path, history: History) -> None:
    step, end = _reached(path)
    rates = array("d")
    drawn: dict[str, Series | None] = {}  # by metric; None if it is not drawn
    for row in _rows(path):
        tokens = row["tokens"]
        history.last.update(row)
        for name, value in row.items():
            if name not in drawn:
                drawn[name] = Series(end) if name.startswith(_DRAWN) else None
            series = drawn[name]
            if series is not None:
                series.add(tokens, value)
        if math.isfinite(row.get("Speed/TokensPerSecond", math.nan)):
            rates.append(row["Speed/TokensPerSecond"])
        if "Guard/FirstSample" in row and "Guard/LastSample" in row:
            history.spikes.append(row)
    history.series = {name: series for name, series in drawn.items() if series is not None and len(series)}
    history.last |= {"step": step, "tokens": end}  # the row of a save comes later
    if rates:
        history.median_rate, history.peak_rate = float(np.median(rates)), max(rates)
        history.recent_rate = float(np.median(rates[-100:]))


def _reached(path: Path) -> tuple[int, int]:
    """The largest step and number of tokens, from the end of the file."""
    tail, size = _TAIL_BYTES, path.stat().st_size
    while True:
        with path.open("rb") as file:
            file.seek(max(0, size - tail))
            rows = [row for line in file.read().split(b"\n")[:-1] if (row := parse_row(line, **_STEPS))]
        if rows:
            return max(row["step"] for row in rows), max(row["tokens"] for row in rows)
        if tail >= size:
            raise ConfigError(f"{path}: holds no row yet; expected the directory of a run that has logged a step")
        tail *= 16  # past the damaged rows


def _rows(path: Path) -> Iterator[dict]:
    with path.open("rb") as file, progress(
        total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True, delay=2, leave=False
    ) as bar:  # fmt: skip
        for number, (_, row) in enumerate(whole_rows(file, path, **_STEPS)):
            numbers = {name: _number(value) for name, value in row.items()}
            yield {name: number for name, number in numbers.items() if number is not None}
            if number % 4096 == 0:
                bar.update(file.tell() - bar.n)


def _number(value: object) -> float | None:
    """A number that can be drawn; NaN, which is written as null, for any other one; None for what is not a number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) < LARGEST:
        return value
    return math.nan if isinstance(value, float) else None


def _read_lines(path: Path, kinds: dict[str, Kinds]) -> list[dict]:
    """The objects of a file of JSON lines; none without the file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [row for _, row in whole_rows(file, path, **kinds)]
