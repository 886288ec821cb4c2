"""Anytime training: a trunk with a constant learning rate, decays from its checkpoints, and its extension."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import pretrain
from launching import STEP_TOKENS, read_series, tinyllama_ds, write_deepspeed_config, write_recipe
from safetensors.torch import load_file
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.checkpoint.reader import CheckpointReader
from tinyllama_ds.cli import main
from tinyllama_ds.errors import EXIT_CONFIG

STABLE = {"type": "warmup_stable_decay", "params": {"num_warmup_steps": 2, "num_decay_steps": 0}}
TRUNK, AT, OVER = 8, 4, 3  # steps


@pytest.fixture(scope="module")
def trunk(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("anytime")
    recipe = write_recipe(root / "trunk.toml", TRUNK, save_every=2)
    config = write_deepspeed_config(root / "ds.json", 3, micro_batch=2, scheduler=STABLE)
    finished = pretrain(recipe, config, data_dir, root / "trunk", 2)
    assert finished.returncode == 0, finished.stderr
    return root / "trunk"


def assert_same_run(one: Path, other: Path, first: int = 0) -> None:
    """Bit for bit, from a step on."""
    expected, found = (tensors_of(find_checkpoints(path)[-1]) for path in (one, other))
    assert found.keys() == expected.keys()
    assert [place for place in found if not torch.equal(found[place], expected[place])] == []
    for series in ("Train/Loss", "Train/GradNorm", "Train/LearningRate"):
        assert read_series(other, series) == read_series(one, series)[first:]
    assert [read_manifest(find_checkpoints(path)[-1]).progress for path in (one,)] == [
        read_manifest(find_checkpoints(other)[-1]).progress
    ]


def test_a_decay_from_the_middle_equals_a_run_with_this_schedule(trunk: Path, data_dir: Path, tmp_path: Path) -> None:
    """The trunk goes on past the checkpoint; the same command again finds the finished run."""
    command = ["decay", trunk, "--at", AT * STEP_TOKENS, "--over", OVER * STEP_TOKENS, "--data", data_dir]
    placed = ["--run-dir", tmp_path / "short", "--num-gpus", 2]
    finished = tinyllama_ds(*command, *placed)
    assert finished.returncode == 0, finished.stderr
    assert f"{AT * STEP_TOKENS:,} tokens, then a decay over {OVER * STEP_TOKENS:,}" in finished.stderr
    whole = pretrain(tmp_path / "short.toml", tmp_path / "short.json", data_dir, tmp_path / "whole", 2)
    assert whole.returncode == 0, whole.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "short", AT)
    peak = read_series(tmp_path / "whole", "Train/LearningRate")
    assert peak[-1] == 0 < peak[-2] < peak[AT - 1] == max(peak)


def test_a_branch_without_a_source_is_compared_with_its_trunk(
    trunk: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = ("--branch-from", str(trunk), "--without", f"starcoderdata@{AT * STEP_TOKENS}")
    for _ in range(2):  # the same command again finds the finished run
        finished = pretrain(
            trunk.with_name("trunk.toml"), trunk.with_name("ds.json"), data_dir, tmp_path / "a", 2, *without
        )
        assert finished.returncode == 0, finished.stderr
    of_trunk, of_branch = (read_series(path, "Tokens/starcoderdata") for path in (trunk, tmp_path / "a"))
    assert set(of_branch) == {of_trunk[AT - 1]}
    assert main(["report", str(trunk), str(tmp_path / "a"), "--output", str(tmp_path / "c.html"), "--json"]) == 0
    differences = json.loads(capsys.readouterr().out)["validation"]
    assert [(of["source"], of["tokens"], of["is_paired"]) for of in differences] == [
        (source, [TRUNK * STEP_TOKENS] * 2, True) for source in ("slimpajama", "starcoderdata")
    ]
    for of in differences:
        ends = [read_series(path, f"Validation/Loss/{of['source']}")[-1] for path in (trunk, tmp_path / "a")]
        assert of["losses"] == pytest.approx(ends, abs=1e-4)
        assert of["error"] > 0


def test_an_export_may_be_the_mean_of_the_last_checkpoints(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trunk), str(tmp_path / "hf"), "--average", "3"]) == 0, capsys.readouterr().err
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    kept = [dict(CheckpointReader(path).weights()) for path in find_checkpoints(trunk)[-3:]]
    assert exported.keys() == kept[0].keys()
    for name, tensor in exported.items():
        expected = np.mean([weights[name].numpy() for weights in kept], axis=0, dtype=np.float64)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=2.5e-7, atol=1e-7, err_msg=name)
    assert main(["export", str(trunk), str(tmp_path / "more"), "--average", "9"]) == EXIT_CONFIG
    assert "checkpoints up to step_00000008; expected 9 to average" in capsys.readouterr().err


def test_an_extended_trunk_equals_a_longer_run(trunk: Path, data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "trunk.toml", TRUNK + 2, save_every=2)
    config = trunk.with_name("ds.json")
    refused = pretrain(recipe, config, data_dir, trunk, 2)
    assert "--allow-change recipe.stages.0.tokens" in refused.stderr
    finished = pretrain(recipe, config, data_dir, trunk, 2, "--allow-change", "recipe.stages.0.tokens")
    assert finished.returncode == 0, finished.stderr
    assert pretrain(recipe, config, data_dir, tmp_path / "whole", 2).returncode == 0
    assert_same_run(tmp_path / "whole", trunk)
