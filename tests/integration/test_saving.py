"""A save that fails on any rank is abandoned by all; training goes on, and what was committed stands."""

from pathlib import Path

import pytest
from launching import pretrain, read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.training.checkpoint import find_checkpoints, verify_checkpoint
from tinyllama_ds.training.faults import FAULT_VARIABLE


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
    assert f"NOT saved, training goes on: rank {rank}: OSError: injected at {point} of step 4" in finished.stdout
    assert [verify_checkpoint(path).progress.step for path in find_checkpoints(tmp_path / "run")] == [2, 6]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2, "nothing is left of the abandoned save"
    assert read_series(tmp_path / "run", "Checkpoint/Failures") == [0, 1, 1]
    assert all(0 < seconds < 60 for seconds in read_series(tmp_path / "run", "Checkpoint/StallSeconds"))


def test_a_run_whose_last_save_failed_is_not_finished(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on from the save before."""
    monkeypatch.setenv(FAULT_VARIABLE, "save.mid_shard:1:6:raise")
    recipe = write_recipe(tmp_path / "small.toml", 6, save_every=3)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4)
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 2)
    assert finished.returncode == 0, finished.stderr
    assert "the last save failed: rank 1: OSError: injected" in finished.stderr
    assert "at checkpoint 3; starting it again" in finished.stderr
    assert [verify_checkpoint(path).progress.step for path in find_checkpoints(tmp_path / "run")] == [3, 6]
