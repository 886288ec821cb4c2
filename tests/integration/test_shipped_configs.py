"""The shipped DeepSpeed files train, not only parse: those that the parity matrix does not cover, two ranks in bf16."""

import json
from pathlib import Path

import pytest
from forked import pretrain
from launching import read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import find_checkpoints
from tinyllama_ds.checkpoint.reader import stream_weights
from tinyllama_ds.model.config import model_config

ROOT = Path(__file__).parents[2]
STEPS = 8


def shrink(name: str, path: Path) -> Path:
    """A shipped file with buckets, micro batch, warm-up and peak of the small test, everything else as it is."""
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    config["train_micro_batch_size_per_gpu"] = 2
    config["scheduler"]["params"]["warmup_num_steps"] = 2
    config["optimizer"]["params"]["lr"] = 3e-3
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        if key in zero:
            zero[key] = 20_000
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = 2  # the two ranks are one node
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def reference(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A recipe, and its losses at stage 3 in bf16 with the test's own config."""
    root = tmp_path_factory.mktemp("reference")
    recipe = write_recipe(root / "small.toml", STEPS, save_every=STEPS)
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    config = json.loads(write_deepspeed_config(root / "ds.json", 3, micro_batch=2, **bf16).read_text())
    config["scheduler"]["params"]["warmup_num_steps"] = 2
    (root / "ds.json").write_text(json.dumps(config))
    assert pretrain(recipe, root / "ds.json", data_dir, root / "run", 2).returncode == 0
    return recipe, read_series(root / "run", "Train/Loss")


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3_keep", "zero3_hpz", "zero3_offload"])
def test_curve_is_that_of_zero3(name: str, reference: tuple, data_dir: Path, tmp_path: Path) -> None:
    recipe, losses = reference
    finished = pretrain(recipe, shrink(name, tmp_path / "ds.json"), data_dir, tmp_path / "run", 2)
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(losses, rel=2e-3)  # fused AdamW rounds in bf16
    assert_whole(tmp_path / "run")


def assert_whole(run_dir: Path) -> None:
    """What export takes from the fragments of all ranks is a whole model."""
    _, weights = stream_weights(find_checkpoints(run_dir)[-1])
    assert sum(tensor.numel() for _, tensor in weights) == model_config("test").num_parameters


def test_states_in_bf16_stay_within_one_percent(reference: tuple, data_dir: Path, tmp_path: Path) -> None:
    """Master weights in bf16 lose updates smaller than half of their last digit."""
    recipe, losses = reference
    finished = pretrain(recipe, shrink("zero2_bf16_states", tmp_path / "ds.json"), data_dir, tmp_path / "run", 2)
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(losses, rel=1e-2)
    assert_whole(tmp_path / "run")


@pytest.mark.parametrize("name", ["zero1_muon", "zero2_muon", "zero3_muon"])
def test_muon_learns(name: str, reference: tuple, data_dir: Path, tmp_path: Path) -> None:
    recipe, losses = reference
    finished = pretrain(recipe, shrink(name, tmp_path / "ds.json"), data_dir, tmp_path / "run", 2)
    assert finished.returncode == 0, finished.stderr
    found = read_series(tmp_path / "run", "Train/Loss")
    assert found[0] == pytest.approx(losses[0], rel=1e-3)
    assert found[-1] < losses[0] - 0.2
    assert_whole(tmp_path / "run")
