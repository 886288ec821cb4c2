"""A disk that is too small or fills up: refused before anything starts, outlived once it has."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import (
    TIMEOUT,
    pretrain,
    pretrain_command,
    read_series,
    wait_for_stopped_rank,
    write_deepspeed_config,
    write_recipe,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinyllama_ds.errors import EXIT_REFUSED
from tinyllama_ds.training.checkpoint import find_checkpoints, verify_checkpoint
from tinyllama_ds.training.faults import FAULT_VARIABLE

MIB = 2**20
STEPS, SAVES = 200, 5


def test_a_full_disk_costs_checkpoints_and_nothing_else(
    small_disk: Callable[..., Path], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody takes all the room after the first save, and gives it back after a save was abandoned.

    Rank 0 stops at the end of every save, and the other one waits for it: nobody writes while that happens.
    """
    monkeypatch.setenv(FAULT_VARIABLE, "save.ended:0:1+:stop")
    run_dir = small_disk(size=20 * MIB) / "run"
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=STEPS // SAVES)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4, tensorboard={"enabled": True})
    command = pretrain_command(recipe, config, data_dir, run_dir, 2)
    others = run_dir.parent / "others"
    errors = (tmp_path / "stderr").open("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        for number in range(SAVES):
            rank = wait_for_stopped_rank(process, 0)
            if number == 0:
                fill(others)
            elif number == 1:
                others.unlink()
            rank.resume()
        said = process.communicate(timeout=TIMEOUT)[0]
    finally:
        process.kill()
    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    (line,) = [line for line in said.splitlines() if "NOT saved" in line]
    assert f"step {2 * STEPS // SAVES}: NOT saved" in line
    assert "a checkpoint needs 2.06 MiB, and 0.00 MiB are free there" in line
    assert f"step {STEPS}: saved" in said
    assert verify_checkpoint(find_checkpoints(run_dir)[-1]).progress.step == STEPS
    assert_every_step_once(run_dir)
    assert read_series(run_dir, "Checkpoint/Failures") == [0, 1, 1, 1, 1]
    warnings = [line for line in (tmp_path / "stderr").read_text().splitlines() if "metrics.jsonl: cannot be" in line]
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


def test_a_disk_that_is_too_small_is_refused_before_anything_starts(
    small_disk: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    disk = small_disk(size=5 * MIB)
    recipe = write_recipe(tmp_path / "small.toml", 8, save_every=4)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4)
    finished = pretrain(recipe, config, data_dir, disk / "run", 2)
    assert finished.returncode == EXIT_REFUSED
    assert finished.stderr == f"tinyllama-ds: {disk}: 4 checkpoints need 8.23 MiB, and 5.00 MiB are free there\n"
    assert list(disk.iterdir()) == []
