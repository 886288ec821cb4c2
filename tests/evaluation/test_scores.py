"""The table and the picture of made-up results, next to the published rows."""

import math
from pathlib import Path

import matplotlib.image
import pytest

from tinyllama_ds.evaluation.scores import (
    Evaluation,
    as_json,
    as_markdown,
    average,
    benchmark_scores,
    read_scores,
    scores_figure,
)
from tinyllama_ds.evaluation.suites import load_suites
from tinyllama_ds.outputs import write_figure

COMMONSENSE = load_suites()["commonsense"]


def results_of(value: float) -> dict:
    """As lm-eval writes them: every metric under its name and filter, with metrics that are not the published one."""
    names = [benchmark.task for benchmark in COMMONSENSE.benchmarks]
    metrics = {"acc,none": value / 2, "acc_stderr,none": 0.5, "acc_norm,none": value, "acc_norm_stderr,none": 0.01}
    only_acc = {"acc,none": value, "acc_stderr,none": 0.01}
    return {
        "results": {
            b.task: {"alias": b.task, "sample_len": 100} | (only_acc if b.metric == "acc" else metrics)
            for b in COMMONSENSE.benchmarks
        },
        "n-samples": {name: {"original": 100, "effective": 100} for name in names},
        "n-shot": dict.fromkeys(names, 0),
        "versions": dict.fromkeys(names, 1.0),
    }


@pytest.fixture
def measured() -> Evaluation:
    scores = read_scores(results_of(0.5))
    return Evaluation("runs/v1", 503_000_000_000, "commonsense", scores, {"decoding": "greedy"}, {"lm-eval": "1.2.3"})


def test_benchmarks_are_scored_by_their_published_metric_in_percent(measured: Evaluation) -> None:
    ours = benchmark_scores(measured.scores, COMMONSENSE)
    assert [score.metric for score in ours] == [benchmark.metric for benchmark in COMMONSENSE.benchmarks]
    assert [(score.value, score.stderr) for score in ours] == [(50.0, 1.0)] * 7
    assert average(ours) == (50.0, pytest.approx(math.sqrt(7) / 7))


def test_the_table_has_our_row_errors_published_rows_and_marked_misprints(measured: Evaluation) -> None:
    text = as_markdown(as_json(measured, results_of(0.5)))
    lines = text.splitlines()
    assert "| model | tokens | HellaSwag | OpenBookQA | WinoGrande | ARC-c | ARC-e | BoolQ | PIQA | average |" in lines
    ours = next(line for line in lines if "**this model**" in line)
    assert ours.count("**50.00 ± 1.00**") == 7
    assert "503B" in ours
    assert "| TinyLlama, 240k steps, same number of tokens | 503B | 49.56 |" in text
    assert "| TinyLlama v1.0 [3] | 3T | 59.20 | 36.00 | 59.12 | 30.12 | 55.25 | 57.83 | 73.29 | 52.97 |" in lines
    assert "[3] all sources print 52.99" in text
    assert "[1] the paper prints 57.83 for BoolQ" in text
    assert "lm-eval 1.2.3" in text
    assert "arc_challenge (version 1.0, 0-shot, acc_norm)" in text


def test_json_holds_everything(measured: Evaluation) -> None:
    found = as_json(measured, results_of(0.5))
    assert found["average"]["value"] == 50.0
    assert found["percent"][0]["benchmark"] == "HellaSwag"
    assert found["published"][-1]["model"] == "TinyLlama v1.1 Chinese"
    assert found["nearest"] == "TinyLlama, 240k steps"
    assert found["lm_eval"]["hellaswag"]["acc,none"] == 0.25


def test_the_picture_is_drawn(measured: Evaluation, tmp_path: Path) -> None:
    write_figure(scores_figure(as_json(measured, results_of(0.5))), tmp_path / "suite.png")
    own = Evaluation("model", None, None, measured.scores, {}, {})
    write_figure(scores_figure(as_json(own, results_of(0.5))), tmp_path / "own.png")
    for name in ("suite.png", "own.png"):
        assert matplotlib.image.imread(tmp_path / name).std() > 0.05


def test_a_single_document_has_no_error() -> None:
    results = results_of(1.0)
    results["results"]["hellaswag"]["acc_norm_stderr,none"] = "N/A"
    ours = benchmark_scores(read_scores(results), COMMONSENSE)
    assert ours[0].stderr is None
    assert average(ours) == (100.0, None)
