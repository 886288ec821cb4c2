"""`--deterministic`: kernels that give the same bits every time, and a run that is no other on a CPU."""

import json
import os
from pathlib import Path

import pytest
import torch
from forked import on_ranks, pretrain, run_script
from launching import read_series, write_deepspeed_config, write_recipe
from test_resume import SAMPLES, tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints
from tinyllama_ds.errors import EXIT_CONFIG

# Operators for which CUDA has no deterministic kernel, from the documentation of torch.use_deterministic_algorithms.
NOT_DETERMINISTIC = {
    *("nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "put_", "histc", "kthvalue", "_embedding_bag"),
    *("median.dim", "nanmedian.dim", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "max_unpool2d"),
}
OF_FLOATS = ("cumsum", "cumsum_", "bincount")  # for whole numbers the same every time
STEPS = 6


def test_no_operator_of_a_run_is_without_a_deterministic_kernel(data_dir: Path, tmp_path: Path) -> None:
    """Training, validation, samples, the probe and saves: on a GPU each of these operators would end the run."""
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=3, evaluate_every=3, document_mask=True)
    recipe.write_text(recipe.read_text() + SAMPLES)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    arguments = ["--recipe", recipe, "--deepspeed-config", config, "--data", data_dir, "--run-dir", tmp_path / "run"]
    watched_run = Path(__file__).with_name("watched_run.py")
    finished = on_ranks(run_script, watched_run, *arguments, "--deterministic", ranks=1)
    assert finished.returncode == 0, finished.stderr
    watched = json.loads(finished.stdout.splitlines()[-1])
    assert watched["switches"] == [[True, ":4096:8"]]
    names = {operator.partition(" ")[0] for operator in watched["operators"]}
    assert {"mm", "embedding", "scatter_add_", "embedding_dense_backward"} <= names
    assert not names & NOT_DETERMINISTIC
    assert not [
        operator for operator in watched["operators"] if operator.startswith(tuple(f"{n} torch.f" for n in OF_FLOATS))
    ]


def test_a_deterministic_run_is_the_same_run_on_a_cpu(data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=3, evaluate_every=3)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    plain, deterministic = tmp_path / "plain", tmp_path / "deterministic"
    for run_dir, more in ((plain, []), (deterministic, ["--deterministic"])):
        finished = pretrain(recipe, config, data_dir, run_dir, 2, *more)
        assert finished.returncode == 0, finished.stderr
        description = json.loads((run_dir / "run.json").read_text())
        assert description["deterministic"] == bool(more)
        assert (", deterministic, torch.compile" in finished.stdout + finished.stderr) == bool(more)
    for name in ("Train/Loss", "Train/GradNorm", "Validation/Loss/slimpajama"):
        assert read_series(plain, name) == read_series(deterministic, name), name
    expected, found = (tensors_of(find_checkpoints(run_dir)[-1]) for run_dir in (plain, deterministic))
    assert expected.keys() == found.keys()
    for place, tensor in expected.items():
        assert torch.equal(tensor, found[place]), place


def test_a_workspace_that_is_not_deterministic_is_rejected(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=3)
    config = write_deepspeed_config(tmp_path / "ds.json", 1, micro_batch=2)
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 2, "--deterministic")
    assert finished.returncode == EXIT_CONFIG
    (line,) = (line for line in finished.stderr.splitlines() if line.startswith("tinyllama-ds: "))
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8 in the environment" in line
    assert not (tmp_path / "run").exists()
