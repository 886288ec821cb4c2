"""A run with muP: plain PyTorch's curve on two ranks, and a folder of Hugging Face that computes the same."""

import json
from pathlib import Path

import pytest
from forked import plain_curves, pretrain
from launching import read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.cli import main
from tinyllama_ds.errors import EXIT_FINISHED

STEPS = 8


def test_a_run_is_plain_pytorchs_and_its_export_has_the_loss_of_its_probe(data_dir: Path, tmp_path: Path) -> None:
    """Of the size `test`, whose base is half as wide, with heads half as large. The export compares logits with
    transformers', and the loss with that of training, or there is no folder.
    """
    recipe, run, folder = write_recipe(tmp_path / "small.toml", STEPS, STEPS), tmp_path / "run", tmp_path / "hf"
    recipe.write_text(recipe.read_text() + "[mup]\nbase_hidden_size = 32\nbase_head_dim = 8\n")
    finished = pretrain(recipe, write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2), data_dir, run, 2)
    assert finished.returncode == 0, finished.stderr
    assert "ZeRO-3, muP (2 times its base's width), attention" in finished.stdout
    plain = plain_curves("plain_loop.py", recipe, data_dir, STEPS, "mup")["loss"]
    assert read_series(run, "Train/Loss") == pytest.approx(plain, rel=1e-5)
    assert read_series(run, "Train/LearningRate")[4] == pytest.approx(3e-3), "before multipliers"
    manifest = read_manifest(find_checkpoints(run)[-1])
    assert manifest.model["mup"] == {"base_hidden_size": 32, "base_head_dim": 8}
    assert [(group["lr_multiplier"], group["weight_decay"]) for group in manifest.optimizer.groups] == [
        (1.0, 0.1),
        (0.5, 0.2),
    ]
    assert main(["export", str(run), str(folder)]) == EXIT_FINISHED
    assert "mup" not in json.loads((folder / "config.json").read_text())
