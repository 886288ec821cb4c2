"""Differences of validation losses between runs: standard errors are scipy's, in pairs of the same samples."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_ind, ttest_rel
from test_report import STEP_TOKENS, write_lines, write_run

from tinyllama_ds.cli import main
from tinyllama_ds.report.sample_losses import standard_error

SAMPLES, TARGETS = 40, 32
RNG = np.random.default_rng(1)
HARD = RNG.normal(3.0, 0.5, SAMPLES)  # how hard each sample is, for both runs
LOSSES = {"one": HARD + RNG.normal(0, 0.02, SAMPLES), "other": HARD + RNG.normal(0.01, 0.02, SAMPLES)}


def row(losses: np.ndarray, tokens: int, source: str = "a") -> dict:
    return {
        "step": 1,
        "tokens": tokens,
        "source": source,
        "losses": list(TARGETS * losses),
        "targets": [TARGETS] * SAMPLES,
    }


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Evaluated on the same samples at two common points, and once more by the first one."""
    found = {name: write_run(tmp_path / name, 20) for name in LOSSES}
    for name, path in found.items():
        description = json.loads((path / "run.json").read_text())
        description["data"] = {"validation": {"a": {"bin_sha256": ["0"]}, "b": {"bin_sha256": [name]}}}
        (path / "run.json").write_text(json.dumps(description))
        rows = [row(HARD, STEP_TOKENS), row(LOSSES[name], 2 * STEP_TOKENS), row(LOSSES[name], STEP_TOKENS, "b")]
        write_lines(path / "validation.jsonl", rows + [row(HARD, 3 * STEP_TOKENS)] * (name == "one"))
    return found


def compare(runs: dict[str, Path], capsys: pytest.CaptureFixture[str], *more: str) -> str:
    page = next(iter(runs.values())).with_name("page.html")
    assert main(["report", *map(str, runs.values()), "--output", str(page), *more]) == 0
    return capsys.readouterr().out


def test_errors_are_scipys(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    same, different = json.loads(compare(runs, capsys, "--json"))["validation"]
    paired, unpaired = (test(LOSSES["other"], LOSSES["one"]) for test in (ttest_rel, ttest_ind))
    assert (same["source"], same["tokens"], same["is_paired"]) == ("a", [2 * STEP_TOKENS] * 2, True)
    assert same["difference"] == pytest.approx(np.mean(LOSSES["other"] - LOSSES["one"]))
    assert same["difference"] / same["error"] == pytest.approx(paired.statistic)
    assert (different["source"], different["is_paired"]) == ("b", False)
    assert different["difference"] / different["error"] == pytest.approx(unpaired.statistic)
    assert different["error"] > 10 * same["error"]


def test_the_page_has_table_and_picture(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text, page = compare(runs, capsys), runs["one"].with_name("page.html").read_text()
    difference, error = np.mean(LOSSES["other"] - LOSSES["one"]), ttest_rel(LOSSES["other"], LOSSES["one"])
    expected = f"{difference:+.4f} ± {difference / error.statistic:.4f}"
    for shown in (text, page):
        assert expected in shown
        assert "* Different samples or tokenizers" in shown
    assert "Difference from one" in page


@pytest.mark.parametrize("damage", [{"losses": [None] * SAMPLES}, {"targets": [0] * SAMPLES}, {"losses": [[1.0]]}])
def test_what_is_not_a_number_is_not_compared(
    damage: dict, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(runs["other"] / "validation.jsonl", [row(HARD, STEP_TOKENS), row(HARD, 2 * STEP_TOKENS) | damage])
    (found,) = json.loads(compare(runs, capsys, "--json"))["validation"]
    assert found["tokens"] == [STEP_TOKENS] * 2
    assert (found["difference"], found["error"]) == (0, 0)


def test_runs_without_a_common_point_say_so(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(runs["other"] / "validation.jsonl", [row(HARD, 7 * STEP_TOKENS)])
    assert f"Never evaluated at the same tokens as the first run: other at {7 * STEP_TOKENS:,}" in compare(runs, capsys)
    (runs["other"] / "validation.jsonl").unlink()  # as an earlier version has left it
    assert json.loads(compare(runs, capsys, "--json"))["validation"] == []


def test_of_answers_of_different_lengths_it_is_that_of_a_ratio() -> None:
    targets = RNG.integers(1, 200, 400)
    sums = targets * RNG.normal(3.0, 0.5, 400)
    resampled = bootstrap(
        (sums, targets), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, rng=RNG, n_resamples=2000
    )
    assert standard_error(sums, targets) == pytest.approx(resampled.standard_error, rel=0.1)
    assert np.isnan(standard_error(sums[:1], targets[:1]))
