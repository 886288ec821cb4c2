"""The report of a run: downsampled without changing the picture, every text escaped, rendered in a browser."""

import json
import math
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from launching import TIMEOUT
from matplotlib.figure import Figure

from tinyllama_ds.data.order import MixtureStage, SampleOrder
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.report.charts import achieved_mixture, draw_losses, planned_mixture
from tinyllama_ds.report.history import Series, read_history, read_metrics
from tinyllama_ds.report.run_page import report_page, summarize

LENGTH, BATCH, STEPS = 32, 8, 240
STEP_TOKENS = LENGTH * BATCH
HOSTILE = "<script>alert('x')</script>"
STAGES = [
    {"name": "basic", "tokens": 120 * STEP_TOKENS, "global_batch_tokens": STEP_TOKENS, "weights": {"a": 1}},
    {
        "name": HOSTILE,
        "tokens": 120 * STEP_TOKENS,
        "global_batch_tokens": STEP_TOKENS,
        "weights": {"a": 0.6, "b$x$": 0.4},
        "ramp_tokens": 60 * STEP_TOKENS,
    },
]


def order() -> SampleOrder:
    """The samples of these stages, as a run draws them."""
    stages = [MixtureStage(120 * BATCH, {"a": 1.0}), MixtureStage(120 * BATCH, {"a": 0.6, "b$x$": 0.4}, 60 * BATCH)]
    return SampleOrder(1, {"a": 100, "b$x$": 100}, stages)


def write_run(run: Path, steps: int = STEPS, state: str = "finished") -> Path:
    """What a run of two stages leaves behind, with a restart, a rollback, samples and scores."""
    (run / "scores").mkdir(parents=True)
    recipe = {"name": f"toy {HOSTILE}", "sequence_length": LENGTH, "stages": STAGES}
    description = {
        "recipe": recipe,
        "deepspeed_config": {"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}},
        "plan": {"steps": STEPS, "tokens": STEPS * STEP_TOKENS},
        "world_size": 2,
        "versions": {"torch": "2.13.0"},
    }
    (run / "run.json").write_text(json.dumps(description))
    (run / "status.json").write_text(json.dumps({"state": state}))
    write_lines(run / "metrics.jsonl", rows_of(steps))
    starts = [{"step": 0, "tokens": 0, "reached": 0, "hosts": {"n1": 2}, "restart": 0, "left_out": 0, "time": "then"}]
    starts.append(starts[0] | {"step": 50, "tokens": 50 * STEP_TOKENS, "reached": 63, "restart": 1})
    starts.append(starts[1] | {"step": 100, "tokens": 100 * STEP_TOKENS, "reached": 101, "left_out": 8})
    write_lines(run / "starts.jsonl", starts)
    with (run / "starts.jsonl").open("a") as file:
        file.write('{"step": 100, "tok')
    ledger = {"event": "rolled back", "step": 102, "first_sample": 808, "last_sample": 815, "reason": "spike"}
    write_lines(run / "ledger.jsonl", [ledger])
    samples = [
        {"step": n, "tokens": n * STEP_TOKENS, "prompt": HOSTILE, "text": f"&amp;{HOSTILE} {n}"} for n in range(20)
    ]
    write_lines(run / "samples.jsonl", samples)
    along = [
        {"step": n, "tokens": n * STEP_TOKENS, "task": name, "metric": metric, "value": n / steps, "stderr": error}
        for n in range(60, steps + 1, 60)
        for name, metric, error in (("piqa", "acc", 0.01), ("b$x$", "acc", None), (HOSTILE, "word_perplexity", None))
    ]
    write_lines(run / "tasks.jsonl", along)
    task = {"task": "piqa", "metric": "acc_norm", "value": 0.51234, "stderr": None}
    (run / "scores" / "mine.json").write_text(json.dumps({"tokens": 61_440, "scores": [task]}))
    percent = [{"benchmark": "PIQA", "value": 51.234, "stderr": 1.2}]
    pythia = {"model": "Pythia-1.0B", "tokens": 3e11, "scores": [70.7], "average": 70.7, "misprint": "a misprint"}
    suite = {"percent": percent, "average": {"value": 51.234, "stderr": 1.2}, "published": [pythia]}
    (run / "evaluation" / "step_00000240").mkdir(parents=True)
    (run / "evaluation" / "step_00000240" / "suite.json").write_text(json.dumps(suite))
    (run / "scores" / "torn.json").write_text("{")
    return run


def rows_of(steps: int) -> list[dict]:
    drawn = order()
    rows: list[dict] = [{"step": 0, "tokens": 0, "seconds": 9.0, "Validation/Loss/a": 6.2}]
    for step in range(1, steps + 1):
        counts = drawn.counts(step * BATCH)
        rows.append(
            {"step": step, "tokens": step * STEP_TOKENS, "seconds": 10.0 + step}
            | {"Train/Loss": 6 / (1 + step / 99), "Train/LearningRate": 1e-3, "Train/GradNorm": 1.0 + (step == 77) * 50}
            | {"Train/BatchTokens": STEP_TOKENS, "Speed/TokensPerSecond": 500.0 + step % 7, "Speed/MFU": 0.5}
            | {"Memory/PeakGiB": 1.0, "Seconds/forward": 0.1, "Seconds/backward": 0.2}
            | {f"Tokens/{name}": count * LENGTH for name, count in counts.items()}
        )  # fmt: skip
    stall = {"Checkpoint/StallSeconds": 0.3, "Checkpoint/Seconds": 1.0, "Checkpoint/GiB": 0.1}
    saved = {"step": 50, "tokens": 50 * STEP_TOKENS, "seconds": 11.0 + steps} | stall
    return [*rows, {"step": steps, "tokens": steps * STEP_TOKENS, "Validation/Loss/a": 2.5, "seconds": 10.0}, saved]


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def page_of(run: Path, is_held: bool = False) -> str:
    history = read_history(run)
    return report_page(history, summarize(history, history.tokens, is_held), str(run))


def test_a_truncated_row_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8}\n{"step": 2, "tokens": 16}\n{"step": 3, "Train/')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert read_history(tmp_path).last == {"step": 2, "tokens": 16}


@pytest.mark.parametrize(("text", "expected"), [(None, "is missing"), ("", "holds no row yet")])
def test_a_directory_without_metrics_is_rejected(text: str | None, expected: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(
        ConfigError, match=rf"metrics.jsonl: {expected}.*; expected the directory of a run that has logged"
    ):
        read_history(tmp_path)


def test_downsampling_keeps_the_first_last_smallest_and_largest_of_every_column() -> None:
    rng = np.random.default_rng(0)
    tokens, values = np.arange(300_000) * 7.0, rng.standard_normal(300_000).cumsum()
    series = Series(int(tokens[-1]))
    for point in zip(tokens, values, strict=True):
        series.add(*point)
    series.add(5.0, math.nan)
    kept_tokens, kept = series.points()
    assert len(kept) <= 4 * 501
    assert np.all(np.diff(kept_tokens) > 0)
    columns, kept_columns = ((at * (500 / tokens[-1])).astype(int) for at in (tokens, kept_tokens))
    for column in range(501):
        whole, thin = values[columns == column], kept[kept_columns == column]
        assert (thin[0], thin[-1], thin.min(), thin.max()) == (whole[0], whole[-1], whole.min(), whole.max())


def test_the_planned_mixture_is_that_of_the_sample_order(run: Path) -> None:
    """Both as trained, from the metrics, and as planned, from the recipe, against the counts of the real order."""
    history, drawn = read_history(run), order()
    corners = planned_mixture(history, ["a", "b$x$"])
    borders, shares = achieved_mixture(history, ["a", "b$x$"])
    assert 120 * STEP_TOKENS in borders
    at, planned = [first for first, _ in corners], [share[1] for _, share in corners]
    for left, right, share in zip(borders, borders[1:], shares, strict=False):
        before, after = (drawn.counts(round(tokens / LENGTH))["b$x$"] for tokens in (left, right))
        assert share[1] == pytest.approx((after - before) * LENGTH / (right - left), abs=2 * LENGTH / (right - left))
        assert share[1] == pytest.approx(np.interp((left + right) / 2, at, planned), abs=2 * LENGTH / (right - left))


def test_the_charts_of_a_branch_begin_where_it_began(run: Path) -> None:
    """With its losses in the picture, that of a source which is new to it too."""
    description = json.loads((run / "run.json").read_text())
    began = 130 * STEP_TOKENS
    (run / "run.json").write_text(json.dumps(description | {"parent": {"step": 130, "tokens": began}}))
    rows = [row for row in rows_of(STEPS) if row["tokens"] > began]
    new = {"step": 130, "tokens": began, "Validation/Loss/new": 13.0}
    write_lines(run / "metrics.jsonl", [new, *rows, new | {"step": STEPS, "tokens": STEPS * STEP_TOKENS}])
    axis = Figure().subplots()
    draw_losses(axis, read_history(run))
    assert axis.get_xlim() == (began, STEPS * STEP_TOKENS)
    assert axis.get_ylim()[1] > 13.0
    assert [text.get_text() for text in axis.texts] == [HOSTILE], "the first stage was over"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page_of(run)


def test_every_text_is_escaped_and_nothing_is_loaded(run: Path) -> None:
    page = page_of(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10
    assert "&amp;amp;&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=(?!['\"]?#)|@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_the_page_shows_everything(run: Path) -> None:
    page = page_of(run)
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len([ElementTree.fromstring(drawing) for drawing in drawings]) == 12
    for text in ("after a failure, by the supervisor", "after a rollback", ">13<", "rolled back", "808 to 815"):
        assert text in page, text
    for text in ("Pythia-1.0B", ">70.70<", ">51.23 ± 1.20<", "a misprint", ">0.5123<", "300B", "step_00000240/suite"):
        assert text in page, text
    assert "torn" not in page
    assert "Long context" not in page
    for text in (
        "Scores during training",
        "<figcaption>acc</figcaption>",
        "<figcaption>word_perplexity<",
        "piqa: 1",
        "b$x$: 1",
    ):
        assert text in page, text
    for text in ("n1 (2 ranks)", "torch", "b$x$", "clipped at 1"):
        assert text in page, text
    assert [stage["name"] for stage, _, _ in read_history(run).stages()] == ["basic", HOSTILE]


def long_context(length: int, **changes: object) -> str:
    """What `evaluate --suite long-context` writes of a model that answers all questions at the end of a text."""
    loss = {"value": 2.5, "stderr": 0.1}
    cells = [
        {"length": length, "depth": depth, "questions": 4, "right": 4 * (depth == 100), "exact": 0, "low": 0, "high": 1}
        for depth in (0, 50, 100)
    ]
    part = {
        "documents": 7,
        "document_tokens": 2048,
        "sources": {HOSTILE: 7},
        "positions": [loss | {"first": length // 2, "end": length, "tokens": 333}],
        "contexts": [loss | {"context": length, "tokens": 7175, "difference": {"value": -0.25, "stderr": 0.01}}],
        "needle": {"choices": 5, "cells": cells, "all": cells[2] | {"questions": 12, "p_value": 0.205}},
    }
    return json.dumps({"suite": "long-context", "long_context": part | changes})


def test_long_contexts_have_a_section_with_a_line_and_a_heat_map_per_checkpoint(run: Path) -> None:
    for name, length in (("before", 256), ("step_00000240", 2048)):
        (run / "evaluation" / name).mkdir(exist_ok=True)
        (run / "evaluation" / name / "long-context.json").write_text(long_context(length))
    page = page_of(run)
    assert len(re.findall(r"<svg.*?</svg>", page, flags=re.S)) == 12 + 4
    for text in (
        *("Needle in a haystack, right answers: before", "step_00000240: Perplexity by position", ">1,024 to 2,047<"),
        *(
            ">2.5000 ± 0.1000<",
            ">12.18<",
            ">-0.2500 ± 0.0100<",
            ">4/4<",
            "in all 4 of 12: 33.3%",
            "have the probability 0.2",
        ),
    ):
        assert text in page, text
    assert "<script" not in page
    assert "step_00000240/suite" in page, "scores of tasks as before"
    assert "step_00000240/long-context" not in page


@pytest.mark.parametrize("changes", [{"positions": [1]}, {"needle": {}}, {"documents": "7"}, {"contexts": None}])
def test_damaged_results_of_long_contexts_are_not_shown(changes: dict, run: Path) -> None:
    file = run / "evaluation/step_00000240/long-context.json"
    file.write_text(long_context(256, **changes))
    assert read_history(run).long_context == {}
    file.write_text(long_context(256))
    assert list(read_history(run).long_context) == ["step_00000240"]


@pytest.mark.parametrize(
    ("state", "is_held", "steps", "expected"),
    [
        ("finished", False, STEPS, "Finished: all 240 steps, 61,440 tokens in 4 min 11 s; loss 1.752, 503 tokens/s"),
        ("running", True, 120, "Running: step 120 of 240, 30,720 of 61,440 tokens (50.0%)"),
        ("running", False, 120, "Not finished, and no supervisor holds it: step 120 of 240"),
        ("stopped", False, 120, "Stopped and saved at step 120 of 240"),
    ],
)  # fmt: skip
def test_the_verdict(state: str, is_held: bool, steps: int, expected: str, tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run", steps, state))
    now = summarize(history, 50 * STEP_TOKENS, is_held)
    assert now["verdict"].startswith(expected)
    assert now["goodput"] == pytest.approx(50 * STEP_TOKENS / (506 * (11 + steps)))
    assert now["seconds_left"] == pytest.approx((STEPS - steps) * STEP_TOKENS / 503, rel=1e-2)
    assert json.loads(json.dumps(now))["rollbacks"] == 1
    assert (now["step"], now["tokens"]) == (steps, steps * STEP_TOKENS)


def test_the_verdict_separates_a_branchs_own_tokens_from_those_of_its_parent(tmp_path: Path) -> None:
    history = read_history(write_run(tmp_path / "run"))
    history.starts[0]["tokens"] = 1440
    assert "61,440 tokens, 60,000 of its own in 4 min 11 s" in summarize(history, 61_440, is_held=False)["verdict"]


def test_the_goodput_of_a_branch_is_its_own(run: Path) -> None:
    lines = (run / "starts.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"step": 40, "tokens": 40 * STEP_TOKENS}
    write_lines(run / "starts.jsonl", [first, *map(json.loads, lines[1:3])])
    now = summarize(read_history(run), 50 * STEP_TOKENS, False)
    assert now["goodput"] == pytest.approx(10 * STEP_TOKENS / (506 * 251))


def test_metrics_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    row = '{{"step": {0}, "tokens": {0}, "Train/Loss": {1}, "Train/GradNorm": Infinity, "Validation/Loss/a": NaN}}\n'
    (tmp_path / "metrics.jsonl").write_text(row.format(1, 3.5) + row.format(2, "NaN"))
    history = read_history(tmp_path)
    assert [points.tolist() for points in history.points("Train/Loss")] == [[1.0], [3.5]]
    assert list(history.series) == ["Train/Loss"]
    summary = summarize(history, 0, False)
    assert (summary["Train/Loss"], summary["goodput"]) == (None, None)
    assert "loss nan" in page_of(tmp_path)


def test_metrics_alone_give_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "Train/Loss": 3.5}\n')
    page = page_of(tmp_path)
    assert "loss 3.500" in page
    assert "goodput" not in page.lower()


@pytest.mark.parametrize("rows", [100_000, pytest.param(1_400_000, marks=pytest.mark.all_faults)])
def test_a_long_run_gives_a_small_page(rows: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            file.write(
                f'{{"step": {step}, "tokens": {step * 2048}, "seconds": {step}, "Train/Loss": {2 + step % 89 / 97},'
                f' "Train/GradNorm": {1 + step % 83 / 97}, "Speed/TokensPerSecond": {9 + step % 79 / 97}}}\n'
            )
    page = page_of(run)
    assert len(page) < 1_000_000
    assert f"all {STEPS} steps, {rows * 2048:,} tokens" in page


@pytest.fixture(scope="module")
def browser() -> str:
    """A browser that works without a screen."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_errors(scheme: str, browser: str, run: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(page_of(run))
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1100,1600",
    ]
    command += [
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
    ]
    command += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", page.as_uri()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert picture.is_file(), finished.stderr
    assert "CONSOLE" not in finished.stderr, finished.stderr
    pixels = matplotlib.image.imread(picture)[..., :3]
    corner = pixels[:20, :20].mean()
    assert corner > 0.95 if scheme == "light" else corner < 0.15
    drawn = (pixels.max(axis=2) - pixels.min(axis=2) > 0.3).mean(axis=1)  # coloured pixels of each line
    assert (drawn > 0).mean() > 0.2, "charts from top to bottom"
