"""A disk that is too small or fills up: refused before anything starts, outlived once it has."""

import json
from collections.abc import Callable
from pathlib import Path

import psutil
from forked import run_module, started, tinyllama_ds
from launching import read_series, wait_until, write_deepspeed_config, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinyllama_ds.checkpoint.format import find_checkpoints, verify_checkpoint
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.fault_injection import FAULT_VARIABLE
from tinyllama_ds.launch.launcher import PRETRAIN

MIB = 2**20
STEPS, SAVES = 100, 5  # metrics between two saves want more room than is left in their last page


def test_a_full_disk_costs_checkpoints_and_nothing_else(
    small_disk: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    """Somebody takes all the room after the first save, and gives it back after a save was abandoned.

    Rank 0 stops at the end of every save, and the other one waits for it: nobody writes while that happens.
    """
    run_dir = small_disk(size=20 * MIB) / "run"
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=STEPS // SAVES)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4, tensorboard={"enabled": True})
    arguments = ("--recipe", recipe, "--deepspeed-config", config, "--data", data_dir, "--run-dir", run_dir)
    others = run_dir.parent / "others"
    stops = {FAULT_VARIABLE: "save.ended:0:1+:stop"}
    with started(run_module, PRETRAIN, *arguments, ranks=2, **stops) as ranks:
        rank_0 = psutil.Process(ranks.processes[0].pid)
        for number in range(SAVES):
            wait_until(lambda: rank_0.status() == psutil.STATUS_STOPPED, "rank 0 does not stop")
            if number == 0:
                fill(others)
            elif number == 1:
                others.unlink()
            rank_0.resume()
            wait_until(lambda: rank_0.status() != psutil.STATUS_STOPPED, "rank 0 does not go on")
        finished = ranks.finish()
    assert finished.returncode == 0, finished.stderr
    (line,) = [line for line in finished.stdout.splitlines() if "checkpoint save failed" in line]
    assert f"step {2 * STEPS // SAVES}: checkpoint save failed" in line
    assert "1 checkpoint needs 2.18 MiB, and 0.00 MiB are free there" in line
    assert f"step {STEPS}: checkpoint saved" in finished.stdout
    assert verify_checkpoint(find_checkpoints(run_dir)[-1]).progress.step == STEPS
    assert_every_step_once(run_dir)
    assert read_series(run_dir, "Checkpoint/Failures") == [0, 1, 1, 1, 1]
    warnings = [line for line in finished.stderr.splitlines() if "metrics.jsonl: cannot be" in line]
    assert len(warnings) == 1
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def assert_every_step_once(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "Train/Loss" in row] == steps
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("Train/Loss")] == steps


def test_a_disk_that_is_too_small_is_rejected_before_anything_starts(
    small_disk: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    disk = small_disk(size=5 * MIB)
    recipe = write_recipe(tmp_path / "small.toml", 8, save_every=4)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4)
    where = ("--data", data_dir, "--run-dir", disk / "run", "--num-gpus", 2)
    finished = tinyllama_ds("pretrain", "--recipe", recipe, "--deepspeed-config", config, *where)
    assert finished.returncode == EXIT_CONFIG
    assert finished.stderr == f"tinyllama-ds: {disk}: 4 checkpoints need 8.73 MiB, and 5.00 MiB are free there\n"
    assert list(disk.iterdir()) == []
