"""The benchmark of saves runs, on the smallest model: what it calls of the package is as it is now."""

import json
import sys
from pathlib import Path

from launching import run

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "checkpoint_stall.py"


def test_saves_are_timed(tmp_path: Path) -> None:
    output = tmp_path / "stall.json"
    command = [sys.executable, str(BENCHMARK), "--model", "test", "--json", str(output), "--directory", str(tmp_path)]
    finished = run(command, CUDA_VISIBLE_DEVICES="")
    assert finished.returncode == 0, finished.stderr
    figures = json.loads(output.read_text())
    assert figures["bytes_per_rank"] > 0
    for name in ("stall_seconds", "seconds_behind_training", "stall_seconds_synchronous", "copy_seconds"):
        assert figures[name], name
        assert all(seconds > 0 for seconds in figures[name]), name
