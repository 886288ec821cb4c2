"""`benchmarks/on_gpu.sh`: the rehearsal on this machine's CPU, and what becomes of parts that crash or find no end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launching import TIMEOUT, Finished, wait_until

import on_gpu
from gpu_parts.figures import Figures, read_figures
from gpu_parts.gpu_tests import result_of
from gpu_parts.shares import PARTS, limit
from on_gpu import Outcome, error_line, shorten

HERE = Path(__file__).parent
SCRIPT = Path(on_gpu.__file__).with_suffix(".sh")
WITH_OTHER_PARTS = """
import sys
import on_gpu
from gpu_parts.shares import Share

names = sys.argv[1].split(",")
on_gpu.PARTS = tuple(Share(name, f"parts_for_tests {name}", 10, 10, 1) for name in names)
del sys.argv[1]
sys.exit(on_gpu.main())
"""


def command_of(*names: str) -> tuple[list[str], dict[str, str]]:
    """The driver with parts of `parts_for_tests.py` in place of its own."""
    paths = os.pathsep.join(map(str, (HERE, SCRIPT.parent, SCRIPT.parents[1])))
    return [sys.executable, "-c", WITH_OTHER_PARTS, ",".join(names), "--rehearse"], os.environ | {"PYTHONPATH": paths}


def result(out: Path) -> dict:
    return json.loads((out / "on_gpu.json").read_text())


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def rehearse(out: Path, *parts: str) -> dict[str, dict]:
    """The figures of the parts, each of which has to come to its end; a busy machine is given its time."""
    command = [str(SCRIPT), "--rehearse", "--budget", str(3 * TIMEOUT), "--out", str(out), *parts]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = result(out)["parts"]
    assert {name: part["status"] for name, part in found.items()} == dict.fromkeys(parts, "done")
    table = (out / "on_gpu.txt").read_text()
    assert finished.stdout.endswith(table)
    assert len(table.splitlines()) <= on_gpu.TABLE_LINES
    return {name: part["figures"] for name, part in found.items()}


SHORT = ("machine", "training", "attention")  # those that start no launcher


def test_parts_are_rehearsed_to_their_end(tmp_path: Path) -> None:
    """On one rank of a tiny model."""
    figures = rehearse(tmp_path, *SHORT)
    assert figures["machine"]["matmul_flops"] > 0
    for config in ("zero3_keep", "zero3", "zero1"):
        assert figures["training"][f"{config}.measured"]["kernels"]["kinds"]["gemm"]["count"] > 0
    assert figures["attention"]["blocked.documents"]["relative_error"] < 2e-2


@pytest.mark.rehearsal
def test_so_are_the_others(tmp_path: Path) -> None:
    figures = rehearse(tmp_path, *(part.name for part in PARTS if part.name not in SHORT))
    assert all(figures["lifecycle"][name] for name in ("resume", "other_stage", "export", "generate"))
    assert figures["peers"]["transformers + DeepSpeed ZeRO-3.ours_by_it"] > 0
    assert figures["tests"]["counts"] == {"passed": 1}
    assert figures["long_context"]["128.share_of_matmul"] > 0
    assert len(figures["full_size"]["losses"]) == 30


def run_parts(*names: str, budget: int, out: Path) -> Finished:
    command, environment = command_of(*names)
    command += ["--budget", str(budget), "--out", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_a_part_that_crashes_or_finds_no_end_keeps_its_figures_and_harms_no_other(tmp_path: Path) -> None:
    finished = run_parts("crashing", "endless", "failing", "good", budget=60, out=tmp_path)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    parts = result(tmp_path)["parts"]
    assert parts["crashing"]["status"] == "failed: ValueError: as ordered"
    assert parts["endless"]["status"].startswith("cut at ")
    assert parts["failing"]["status"] == "failed: failing is good"
    assert parts["good"]["status"] == "done"
    assert all(part["figures"]["before"] == 1 for part in parts.values())
    assert "as ordered" in (tmp_path / "parts" / "crashing.log").read_text()
    assert not any(map(is_alive, parts["endless"]["figures"]["pids"]))
    for line in ("crashing has begun", "endless has begun", "PASS good is good", "FAIL failing is good"):
        assert f"   {line}" in finished.stdout.splitlines()


def test_without_time_the_parts_are_left_out_and_the_table_is_there(tmp_path: Path) -> None:
    finished = run_parts("good", budget=1, out=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert result(tmp_path)["parts"]["good"]["status"] == "skipped: 0 s were left for it, of 1 at least"
    assert "== good: skipped" in finished.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_and_shows_what_there_is(number: signal.Signals, tmp_path: Path) -> None:
    command, environment = command_of("good", "endless", "failing")
    command += ["--budget", str(TIMEOUT), "--out", str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        stored = tmp_path / "parts" / "endless.json"
        wait_until(lambda: process.poll() is not None or "pids" in read_figures(stored)["figures"], "it does not begin")
        process.send_signal(number)
        said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    parts = result(tmp_path)["parts"]
    statuses = [part["status"] for part in parts.values()]
    assert statuses == ["done", "cut by a signal", "skipped: not reached"]
    assert "   endless has begun" in said.splitlines()
    assert not any(map(is_alive, parts["endless"]["figures"]["pids"]))


def test_a_machine_without_a_gpu_is_rejected(tmp_path: Path) -> None:
    command = [str(SCRIPT), "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert finished.returncode == on_gpu.EXIT_CONFIG
    assert finished.stderr == "on_gpu: PyTorch sees no GPU; expected one, or --rehearse\n"


def test_time_goes_to_the_first_parts_where_it_is_short_and_to_all_where_it_is_not() -> None:
    assert limit([30, 160, 200], 60) == 30
    assert limit([160, 200], 40) == 40
    assert limit([30, 60], 180) == 60
    assert limit([60], 500) == 500


def test_figures_are_on_the_disk_at_once_and_go_on_in_a_new_process(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    figures = Figures(path)
    figures.put("rate", 1, "slow")
    figures.put("rate", 2, "fast")
    assert read_figures(path) == {"figures": {"rate": 2}, "lines": {"rate": "fast"}}
    figures.check("verdict", False, "it is wrong")
    again = Figures(path)
    again.put("other", [3])
    assert read_figures(path)["lines"] == {"rate": "fast", "verdict": "FAIL it is wrong"}
    assert again.end() == 1


def test_the_table_fits_and_says_what_it_leaves_out() -> None:
    outcomes = {"long": Outcome("done", 3.0, lines=[f"line {n}" for n in range(99)]), "short": Outcome(lines=["one"])}
    lines = list(shorten(outcomes, 20))
    assert len(lines) == 20
    assert lines[0] == "== long: done (3 s)"
    assert lines[-3:] == ["   and 83 lines more in on_gpu.json", "== short: skipped: not reached", "   one"]


def test_the_line_that_names_an_error_is_found() -> None:
    assert error_line("a\nTraceback\nError: first\nError: second\nlast", 1) == "first"
    assert error_line("Traceback\n  ValueError: x\nRuntimeError: y\nlast", 1) == "RuntimeError: y"
    assert error_line("killed\n", -9) == "killed"
    assert error_line("", -9) == "exit code -9"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("[gw3] [ 12%] PASSED tests/a/test_b.py::test_c[flash-1] ", ("PASSED", "tests/a/test_b.py::test_c[flash-1]")),
        ("tests/a/test_b.py::test_c SKIPPED (no kernel) [ 50%]", ("SKIPPED", "tests/a/test_b.py::test_c")),
        ("tests/a/test_b.py::test_c ", None),
        ("3 workers [72 items]", None),
    ],
)
def test_results_are_read_as_pytest_prints_them(line: str, found: tuple[str, str] | None) -> None:
    assert result_of(line) == found


def test_a_flash_attn_for_one_head_size_is_kept_from_the_tests(tmp_path: Path) -> None:
    """It gives wrong gradients for others, which the models of `pytest --gpu` have."""
    assert [part.name for part in on_gpu.PARTS if not part.has_head_size_64] == ["tests"]
    assert str(tmp_path) in on_gpu.environment(False, tmp_path, tmp_path)["PYTHONPATH"].split(":")
    assert str(tmp_path) not in on_gpu.environment(False, tmp_path, None)["PYTHONPATH"].split(":")
