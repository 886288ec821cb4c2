"""A save that fails on any rank is abandoned by all; training goes on, and what was committed stands."""

import json
from pathlib import Path

import pytest
import torch
from forked import pretrain
from launching import TIMEOUT, read_series, write_deepspeed_config, write_recipe
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints, verify_checkpoint
from tinyllama_ds.fault_injection import FAULT_VARIABLE, RESTART_VARIABLE


@pytest.mark.parametrize("fault", ["save.mid_shard:1:4:raise", "save.before_rename:0:4:raise"])
def test_a_failing_rank_makes_all_abandon_the_save(
    fault: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, fault)
    recipe = write_recipe(tmp_path / "small.toml", 6, save_every=2)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4)
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 2)
    assert finished.returncode == 0, finished.stderr
    point, rank, *_ = fault.split(":")
    assert f"checkpoint save failed, continuing: rank {rank}: OSError: injected at {point} of step 4" in finished.stdout
    assert [verify_checkpoint(path).progress.step for path in find_checkpoints(tmp_path / "run")] == [2, 6]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2, "nothing is left of the abandoned save"
    assert read_series(tmp_path / "run", "Checkpoint/Failures") == [0, 1, 1]
    assert all(0 < seconds < TIMEOUT for seconds in read_series(tmp_path / "run", "Checkpoint/StallSeconds"))


def test_a_run_whose_last_save_failed_is_not_finished(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks fail, so that the supervisor starts them again; it goes on from the save before."""
    monkeypatch.setenv(FAULT_VARIABLE, "save.mid_shard:1:6:raise")
    recipe = write_recipe(tmp_path / "small.toml", 6, save_every=3)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4)
    failed = pretrain(recipe, config, data_dir, tmp_path / "run", 2)
    assert failed.returncode == 1, failed.stderr
    assert "the last save failed: rank 1: OSError: injected" in failed.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "running"
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 2, **{RESTART_VARIABLE: "1"})
    assert finished.returncode == 0, finished.stderr
    assert "resumed at step 3" in finished.stdout
    assert [verify_checkpoint(path).progress.step for path in find_checkpoints(tmp_path / "run")] == [3, 6]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(1, {"bf16": {"enabled": True}}), *(pytest.param(stage, precision, marks=pytest.mark.all_faults)
     for stage, precision in [(0, {}), (0, {"bf16": {"enabled": True}}), (2, {}), (3, {})])],
)  # fmt: skip
def test_a_save_holds_the_state_of_its_step(
    stage: int, precision: dict, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on while rank 0 waits five seconds with its writing: what it writes is of the step of the save."""
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=4, **precision)
    recipe = write_recipe(tmp_path / "small.toml", 8, save_every=4)
    for name in ("slow", "alone"):
        monkeypatch.setenv(FAULT_VARIABLE, "save.begin:0:4:pause" if name == "slow" else "")
        finished = pretrain(recipe, config, data_dir, tmp_path / name, 2)
        assert finished.returncode == 0, finished.stderr
    slow, alone = (find_checkpoints(tmp_path / name)[0] for name in ("slow", "alone"))
    assert slow.name == alone.name == "step_00000004"
    assert read_series(tmp_path / "slow", "Checkpoint/Seconds")[0] > 5
    expected, found = tensors_of(alone), tensors_of(slow)
    assert len(expected) > 10
    assert [place for place in expected if not torch.equal(found[place], expected[place])] == []
