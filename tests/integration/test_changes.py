"""A resume with other settings, weights that are not those that were saved, tokens that are not those prepared."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from forked import pretrain
from launching import SEQUENCE_LENGTH, Finished, read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import File, find_checkpoints, read_manifest
from tinyllama_ds.data.order import rank_positions
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_NUMERICS
from tinyllama_ds.run.resolve import Options, resolve_run

STEPS, HALF = 4, 2
slow = pytest.mark.all_faults
OPTIMIZER = {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2, "torch_adam": True}
SCHEDULER = {"warmup_num_steps": 2, "warmup_type": "linear", "warmup_min_ratio": 0.0, "cos_min_ratio": 0.1}


@dataclass(frozen=True)
class Setup:
    """One rank, a run with a checkpoint in its middle and at its end."""

    root: Path
    data: Path
    recipe: Path

    def config(self, stage: int, micro_batch: int = 8, clipping: float = 1.0, **optimizer: object) -> Path:
        return write_deepspeed_config(
            self.root / "ds.json",
            stage,
            micro_batch=micro_batch,
            gradient_clipping=clipping,
            optimizer={"type": "AdamW", "params": OPTIMIZER | optimizer},
            scheduler={"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"} | SCHEDULER},
        )

    def start(self, config: Path, *more: str) -> Finished:
        return pretrain(self.recipe, config, self.data, self.root / "run", 1, *more)


@pytest.fixture
def setup(data_dir: Path, tmp_path: Path) -> Setup:
    return Setup(tmp_path, data_dir, write_recipe(tmp_path / "small.toml", STEPS, save_every=HALF))


LAYOUTS = [(1, 1), (2, 2), (0, 0), (3, 1), (1, 3), (2, 0), (0, 3)]


@pytest.mark.parametrize(("before", "after"), [(3, 3), *(pytest.param(*stages, marks=slow) for stages in LAYOUTS)])
def test_changed_hyper_parameters_are_rejected_or_allowed_by_name_and_then_in_force(
    before: int, after: int, setup: Setup
) -> None:
    """On the same layout, and over whole tensors onto another one; DeepSpeed would bring back the old ones."""
    assert setup.start(setup.config(before)).returncode == 0
    run_dir = setup.root / "run"
    shutil.rmtree(find_checkpoints(run_dir)[-1])
    changed = {"lr": 5e-4, "betas": (0.7, 0.99), "eps": 1e-5, "weight_decay": 0.05}
    config = setup.config(after, clipping=0.5, **changed)
    refused = setup.start(config)
    assert refused.returncode == EXIT_CONFIG, refused.stderr
    names = ["betas.0", "betas.1", "eps", "lr", "weight_decay"]
    keys = ["deepspeed_config.gradient_clipping", *(f"deepspeed_config.optimizer.params.{name}" for name in names)]
    assert all(f"--allow-change {key}" in refused.stderr for key in keys)
    allow = ["--allow-change", "deepspeed_config.optimizer.params", "--allow-change", keys[0]]
    finished = setup.start(config, *allow)
    assert finished.returncode == 0, finished.stderr
    assert "allowed change: deepspeed_config.optimizer.params.lr is 0.001 there and 0.0005 now" in finished.stderr
    assert "deepspeed_config.optimizer.params.lr" in (run_dir / "run.json").read_text()
    assert read_series(run_dir, "Train/LearningRate")[HALF] == pytest.approx(
        0.5 * read_series(run_dir, "Train/LearningRate")[HALF - 1], rel=0.5
    )
    groups = read_manifest(find_checkpoints(run_dir)[-1]).optimizer.groups
    assert groups
    for group in groups:
        found = {name: group[name] for name in changed} | {"lr": group["configured_lr"], "betas": tuple(group["betas"])}
        assert found == changed


@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=slow)])
def test_weights_that_are_not_those_that_were_saved_are_rejected(stage: int, setup: Setup) -> None:
    """Whole files with the right hashes, but of another step: only the loss of the probe can tell."""
    assert setup.start(setup.config(3)).returncode == 0
    older, newest = find_checkpoints(setup.root / "run")
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (older / name).read_bytes()
        (newest / name).write_bytes(content)
        manifest["files"][name] = vars(File(len(content), hashlib.sha256(content).hexdigest()))
    (newest / "manifest.json").write_text(json.dumps(manifest))
    finished = setup.start(setup.config(stage))
    assert finished.returncode == EXIT_CONFIG, finished.stdout + finished.stderr
    assert f"{newest}: the probe's loss is " in finished.stderr
    assert f"was {manifest['health']['probe']['loss']!r} at the save" in finished.stderr
    assert find_checkpoints(setup.root / "run") == [older, newest]


def test_a_rotten_token_is_named_by_the_rank_that_reads_it(setup: Setup, tmp_path: Path) -> None:
    """An id without a row in the embeddings, in a sample of rank 1's second step; the manifest knows nothing of it."""
    data = tmp_path / "data"
    shutil.copytree(setup.data, data)
    config = setup.config(3, micro_batch=4)
    order = resolve_run(Options(str(setup.recipe), config, data, tmp_path / "run"), 2, "cpu", bf16=False).data.order
    located = order.locate(np.array(rank_positions(8, 8, 1, 2))[:1])
    shard = data / order.sources[located.source[0]] / "train" / "shard_00000.bin"
    place = int(located.sample[0]) * SEQUENCE_LENGTH + 5
    tokens = np.fromfile(shard, "<u2")
    tokens[place] = 65_535
    tokens.tofile(shard)
    finished = pretrain(setup.recipe, config, data, tmp_path / "run", 2)
    assert finished.returncode == EXIT_NUMERICS, finished.stderr
    assert f"{shard} at token {place}: token id 65535 is beyond the vocabulary of 512" in finished.stderr
    assert "restarting in" not in finished.stderr
