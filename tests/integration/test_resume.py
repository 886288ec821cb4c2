"""Stop and continue equals never stopped, bit for bit on the same layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from forked import pretrain
from launching import STEP_TOKENS, read_series, write_deepspeed_config, write_recipe
from safetensors.torch import load_file

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest

HALF = 6
SAMPLES = f"""
[samples]
prompts = ["the small llama", "loss"]
every_tokens = {2 * STEP_TOKENS}
new_tokens = 5
"""


def read_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file, master weights and optimizer state, and the optimizer's step."""
    found = {"step": torch.tensor(read_manifest(checkpoint).optimizer.step)}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_half_and_half_equals_whole(stage: int, data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", 2 * HALF, save_every=HALF, evaluate_every=4)
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=2)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    finished = pretrain(recipe, config, data_dir, whole, 2)
    assert finished.returncode == 0, finished.stderr

    # What a run that died after its first save leaves behind: rows of metrics beyond the checkpoint, no second one.
    shutil.copytree(whole, halves)
    first, second = find_checkpoints(halves)
    shutil.rmtree(second)
    # It shows samples now, which may change from start to start, and must not change anything else.
    recipe.write_text(recipe.read_text() + SAMPLES)
    resumed = pretrain(recipe, config, data_dir, halves, 2, "--resume", "must")
    assert resumed.returncode == 0, resumed.stderr
    assert read_steps(halves / "samples.jsonl") == [8, 8, 10, 10, 12, 12]
    assert not (whole / "samples.jsonl").exists()
    assert f"resumed at step {HALF}" in resumed.stdout + resumed.stderr

    # A save is reported when it has ended, some steps after its own: the order of these rows is not fixed.
    assert sorted(read_series(halves, "step")) == sorted(read_series(whole, "step"))
    for name in ("Train/Loss", "Train/GradNorm", "Train/LearningRate", "Validation/Loss/slimpajama"):
        assert read_series(halves, name) == read_series(whole, name), name
    expected, found = (tensors_of(find_checkpoints(run)[-1]) for run in (whole, halves))
    assert expected.keys() == found.keys()
    assert len(expected) > 10
    for place, tensor in expected.items():
        assert torch.equal(tensor, found[place]), place
    assert first.is_dir()


def test_finished_run_starts_and_ends_at_once(data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", 6, save_every=6)
    config = write_deepspeed_config(tmp_path / "ds.json", 1, micro_batch=4)
    for _ in range(2):
        finished = pretrain(recipe, config, data_dir, tmp_path / "run", 1)
        assert finished.returncode == 0, finished.stderr
    # the rows of steps 0 and 6 beside the training steps are validation, and at the end the save
    assert read_series(tmp_path / "run", "step") == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
