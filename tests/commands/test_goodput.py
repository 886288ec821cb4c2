"""The goodput that `pretrain` prints at its end."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.commands.training import _print_goodput, _watch, add_run_arguments
from tinyllama_ds.launch.launcher import Placement
from tinyllama_ds.launch.supervisor import SupervisionResult
from tinyllama_ds.report.history import read_history
from tinyllama_ds.report.run_page import report_page, summarize
from tinyllama_ds.run.metrics import MetricsLogger

STOPPED = SupervisionResult(code=75, restarts=1, seconds=50.0, tokens=512)


def log(run_dir: Path, *rows: dict[str, float]) -> None:
    metrics = MetricsLogger(run_dir, {"tensorboard": {"enabled": False}}, Progress(0, 0, 0), "{}")
    for number, figures in enumerate(rows):
        metrics.log(number, 256 * number, figures)
    metrics.close()


def test_it_is_the_share_of_the_highest_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(tmp_path, {"Validation/Loss/a": 6.2}, {"Speed/TokensPerSecond": 20.48}, {"Speed/TokensPerSecond": 10.0})
    _print_goodput(tmp_path, STOPPED)
    assert capsys.readouterr().out.startswith("goodput 50.0%: 512 tokens committed in 50 s, ")


END = """
import os, sys
from pathlib import Path
from tinyllama_ds.commands.training import _end
from tinyllama_ds.launch.supervisor import SupervisionResult
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, sys.stdout.fileno())
sys.exit(_end(Path(sys.argv[1]), SupervisionResult(code=75, restarts=1, seconds=50.0, tokens=512)))
"""


def test_a_console_that_is_gone_changes_no_exit_code(tmp_path: Path) -> None:
    log(tmp_path, {"Speed/TokensPerSecond": 20.48})
    finished = subprocess.run([sys.executable, "-c", END, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (75, "")


def test_before_the_first_logged_step_it_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stop saves after any step; there may be no more in the file than the validation at step 0 and that save."""
    log(tmp_path, {"Validation/Loss/a": 6.2}, {"Checkpoint/StallSeconds": 0.1, "Checkpoint/Seconds": 0.5})
    _print_goodput(tmp_path, STOPPED)
    expected = "512 tokens committed in 50 s; no step was logged, so goodput is not known\n"
    assert capsys.readouterr().out == expected
    history = read_history(tmp_path)
    now = summarize(history, 512, is_held=False)
    assert now["verdict"].endswith("; no step was logged yet")
    assert ">nan" not in report_page(history, now, "here")


def test_the_tokens_of_a_branchs_parent_are_not_its_own(tmp_path: Path) -> None:
    """Before its first checkpoint a branch is where its parent was: what a call commits is counted from there."""
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    arguments = ["--recipe", "r", "--deepspeed-config", "c.json", "--data", "d", "--run-dir", str(tmp_path)]
    options = parser.parse_args(arguments, argparse.Namespace(step_timeout=600.0, max_wall_time=None))
    here = Placement(None, [], 1, on_cpu=True)
    assert _watch(options, here, begun=(4, 1024)).committed() == (4, 1024)
    assert _watch(options, here, begun=(0, 0)).committed() == (0, 0)


def test_missing_metrics_do_not_change_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _print_goodput(tmp_path, STOPPED)
    assert "goodput is not known" in capsys.readouterr().out
