"""A step that DeepSpeed skips changes no weight, and the schedule goes on in tokens as if it had not happened."""

from pathlib import Path

import pytest
from forked import on_ranks, run_script
from launching import write_deepspeed_config, write_recipe


@pytest.mark.parametrize("stage", [1, 3])
def test_learning_rate_survives_a_skipped_step(stage: int, data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", 12, save_every=12)
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=8, bf16={"enabled": True})
    script = Path(__file__).with_name("skip_one_step.py")
    finished = on_ranks(run_script, script, recipe, config, data_dir, tmp_path / "run", ranks=1)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "skipped 1" in finished.stdout
