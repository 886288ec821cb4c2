"""What a power loss leaves of a run's small files does not keep it from going on as if nothing had been."""

import json
from pathlib import Path

import torch
from forked import pretrain
from launching import read_series, write_deepspeed_config, write_recipe
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest

STEPS, HALF = 6, 3


def test_a_run_goes_on_from_its_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    """Its second half is trained again, after the small files were lost: the same samples, losses and weights."""
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=HALF)
    config = write_deepspeed_config(tmp_path / "ds.json", 1, micro_batch=8)
    run_dir = tmp_path / "run"
    assert pretrain(recipe, config, data_dir, run_dir, 1).returncode == 0
    older, newest = find_checkpoints(run_dir)
    expected, losses = read_manifest(newest).progress, read_series(run_dir, "Train/Loss")
    tensors = tensors_of(newest)
    (newest / "manifest.json").unlink()
    for name in ("run.json", "status.json", "tokenizer.model"):
        (run_dir / name).write_bytes(b"")
    for name in ("metrics.jsonl", "starts.jsonl"):
        with (run_dir / name).open("r+b") as file:
            file.write(bytes(40))
    finished = pretrain(recipe, config, data_dir, run_dir, 1)
    assert finished.returncode == 0, finished.stderr
    assert f"run.json: was damaged, and is restored from {older}" in finished.stderr
    assert f"{run_dir / 'metrics.jsonl'}:1: damaged line, skipped" in finished.stderr
    assert f"moved to quarantine: {newest / 'manifest.json'}: cannot be read" in finished.stderr
    assert f"resumed at step {HALF} " in finished.stdout
    last = find_checkpoints(run_dir)[-1]
    assert read_manifest(last).progress == expected
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(last).items())
    assert read_series(run_dir, "Train/Loss") == losses
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
    assert json.loads((run_dir / "run.json").read_text())["recipe"]["name"] == "small"
