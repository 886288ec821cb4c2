"""The probe with compiled blocks on several ranks, where `StragglerDetector` times the blocks from the first step
on.
"""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from forked import pretrain
from launching import Finished, write_deepspeed_config, write_recipe
from safetensors.torch import load_file, save_file

from tinyllama_ds.checkpoint.format import File, find_checkpoints
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.model.probe import TOLERANCE

STEPS = 6


def test_the_loss_comes_out_again_to_the_last_bit(data_dir: Path, tmp_path: Path) -> None:
    """A weight that is damaged a little moves it less than other circumstances may; under the same nothing may."""
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=STEPS)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4, bf16={"enabled": True})

    def start() -> Finished:
        return pretrain(recipe, config, data_dir, tmp_path / "run", 2, "--compile", "on")

    finished = start()
    assert finished.returncode == 0, finished.stderr
    assert "torch.compile: on" in finished.stdout
    [checkpoint] = find_checkpoints(tmp_path / "run")
    assert json.loads((checkpoint / "manifest.json").read_text())["health"]["probe"]["numerics_environment"]["compiled"]
    finished = start()
    assert finished.returncode == 0, finished.stderr
    damage(checkpoint, 1.01)
    refused = start()
    assert refused.returncode == EXIT_CONFIG, refused.stdout + refused.stderr
    told = re.search(r"the probe's loss is .*, a relative difference of (\S+) where 0 is allowed", refused.stderr)
    assert told, refused.stderr
    assert 0 < float(told[1]) < TOLERANCE["bfloat16"]


def damage(checkpoint: Path, factor: float) -> None:
    """Some of the master weights of one rank, in a file whose hash is right."""
    path = checkpoint / "rank_00001.master.safetensors"
    tensors = load_file(path)
    for weights in tensors.values():
        weights[: len(weights) // 10] *= factor
    save_file(tensors, path)
    content = path.read_bytes()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][path.name] = asdict(File(len(content), hashlib.sha256(content).hexdigest()))
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
