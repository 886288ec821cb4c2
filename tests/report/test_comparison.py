"""Several runs on one page: what they reached, and which settings differ."""

import json
from pathlib import Path

import pytest
from test_report import STEP_TOKENS, STEPS, long_context, write_run

from tinyllama_ds.cli import main
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.model.config import MODEL_SIZES


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs; the second one of a known model, longer, at another learning rate and with a key more."""
    one, other = write_run(tmp_path / "one", 120), write_run(tmp_path / "other")
    description = json.loads((other / "run.json").read_text())
    description["deepspeed_config"] |= {"optimizer": {"params": {"lr": 1e-3}}, "gradient_clipping": 0.5}
    description["model"] = MODEL_SIZES["test"].to_dict()
    (other / "run.json").write_text(json.dumps(description))
    (other / "starts.jsonl").unlink()
    return [one, other]


def test_runs_are_compared_by_tokens_compute_and_cost(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    arguments = ["report", *map(str, runs), "--output", str(page), "--price-per-hour", "36", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    one, other = found["runs"]["one"], found["runs"]["other"]
    assert (one["tokens"], other["tokens"]) == (120 * STEP_TOKENS, STEPS * STEP_TOKENS)
    assert "flops" not in one, "the model is not known"
    assert other["flops"] == MODEL_SIZES["test"].flops_per_token(32) * STEPS * STEP_TOKENS
    assert other["cost"] == pytest.approx(36 * other["hours"]) == pytest.approx(36 * 2 * (11.0 + STEPS) / 3600)
    assert one["Validation/Loss/a"] == 2.5
    differing = found["differences"]
    assert differing["deepspeed_config.gradient_clipping"] == {"one": "1.0", "other": "0.5"}
    assert differing["deepspeed_config.optimizer.params.lr"] == {"one": "absent", "other": "0.001"}
    assert not any(key.startswith("recipe") for key in differing)
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "deepspeed_config.gradient_clipping" in text
    assert "<script" not in text


def test_long_contexts_of_all_runs_are_in_one_chart(runs: list[Path], tmp_path: Path) -> None:
    for run, length in zip(runs, (256, 2048), strict=True):
        (run / "evaluation" / "step_00000240" / "long-context.json").write_text(long_context(length))
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 0
    text = page.read_text()
    assert text.count("<svg") == 4 + 2 + 2
    for part in ("Long context", "one, step_00000240: Perplexity by position", "right answers: other, step_00000240"):
        assert part in text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_run(tmp_path / parent / "run", 20) for parent in ("a", "b")]
    assert main(["report", *map(str, paths), str(paths[0]), "--output", str(tmp_path / "c.html"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["runs"]) == [str(path) for path in paths]


def test_what_cannot_be_compared_is_rejected(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *map(str, runs), "--picture", str(tmp_path / "p.png")]) == EXIT_CONFIG
    assert "--picture: is of one run" in capsys.readouterr().err
    assert main(["report", str(runs[0]), str(tmp_path / "none")]) == EXIT_CONFIG
    assert "none/metrics.jsonl: is missing" in capsys.readouterr().err
