"""Reading the figures of a run that may have died while it wrote them."""

from pathlib import Path

import pytest

from tinyllama_ds.errors import Refusal
from tinyllama_ds.evaluation.report import read_metrics


def test_a_row_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "Train/')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_directory_without_figures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"metrics.jsonl: is missing; expected the directory of a run that has logged"):
        read_metrics(tmp_path)
