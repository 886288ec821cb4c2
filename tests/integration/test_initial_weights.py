"""A run that starts from imported weights: the same bits in the masters, the same loss, a resume that knows them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from forked import pretrain
from launching import BATCH, SEQUENCE_LENGTH, read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import find_checkpoints
from tinyllama_ds.checkpoint.reader import CheckpointReader, stream_weights
from tinyllama_ds.data.loader import open_streams
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.evaluation.validation import ValidationSet
from tinyllama_ds.hf.convert import export
from tinyllama_ds.hf.import_model import import_hf_folder
from tinyllama_ds.hf.model_folder import ModelFolder, open_model_folder
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import build_model, empty_model

CONFIG = MODEL_SIZES["test"]
STEP_TOKENS = SEQUENCE_LENGTH * BATCH
slow = pytest.mark.all_faults


def make_folder(root: Path, seed: int, tokenizer: Tokenizer) -> Path:
    """A model folder by way of a Hugging Face one, in fp32 with values that bf16 has not."""
    weights = build_model(CONFIG, "eager", seed).state_dict()
    export(weights.items(), CONFIG, tokenizer, root / f"hf_{seed}")
    import_hf_folder(root / f"hf_{seed}", root / f"model_{seed}")
    return root / f"model_{seed}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_folder(tmp_path_factory.mktemp("imported"), 7, tokenizer)


WARM = {
    "type": "WarmupCosineLR",
    "params": {"total_num_steps": "auto", "warmup_num_steps": 0, "warmup_type": "linear", "cos_min_ratio": 0.1},
}


def standing_still(path: Path, stage: int, **changes: object) -> Path:
    """bf16 with a learning rate of 0: after a step every master has the bits that it started with."""
    optimizer = {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.1, "torch_adam": True}}
    bf16 = {"bf16": {"enabled": True}, "scheduler": WARM}
    return write_deepspeed_config(path, stage, micro_batch=2, optimizer=optimizer, **bf16, **changes)


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (3, FP32_SUMS),
        (1, {}),
        *(pytest.param(*case, marks=slow) for case in [(0, {}), (1, FP32_SUMS), (2, {}), (2, FP32_SUMS), (3, {})]),
    ],
)
def test_the_masters_have_the_imported_bits(
    stage: int, changes: dict, folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "small.toml", 1, save_every=1)
    config = standing_still(tmp_path / "ds.json", stage, **changes)
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 2, "--init-from", str(folder))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    checkpoint = find_checkpoints(tmp_path / "run")[-1]
    masters = dict(CheckpointReader(checkpoint).weights())
    imported = dict(open_model_folder(folder).tensors())
    assert masters.keys() == imported.keys()
    for name, tensor in imported.items():
        assert torch.equal(masters[name], tensor), name
        assert tensor.dim() == 1 or not torch.equal(tensor, tensor.bfloat16().float()), "bf16 would do"
    for name, tensor in stream_weights(checkpoint)[1]:  # what export reads, one by one
        assert torch.equal(tensor, imported[name].bfloat16()), name


@slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_runs_masters_are_taken_over(stage: int, data_dir: Path, tmp_path: Path) -> None:
    """Not what its forward pass used, which is rounded."""
    recipe = write_recipe(tmp_path / "small.toml", 8, save_every=8)
    bf16 = {"bf16": {"enabled": True}}
    learning = write_deepspeed_config(tmp_path / "learning.json", stage, micro_batch=2, **bf16)
    assert pretrain(recipe, learning, data_dir, tmp_path / "first", 1).returncode == 0
    config = standing_still(tmp_path / "ds.json", 3)
    finished = pretrain(recipe, config, data_dir, tmp_path / "second", 2, "--init-from", str(tmp_path / "first"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    before, after = (find_checkpoints(tmp_path / name)[-1] for name in ("first", "second"))
    assert json.loads((tmp_path / "second" / "run.json").read_text())["init_from"]["path"] == str(before)
    found = dict(CheckpointReader(after).weights())
    for name, tensor in CheckpointReader(before).weights():
        assert torch.equal(found[name], tensor), name
        assert tensor.dim() == 1 or not torch.equal(tensor, tensor.bfloat16().float()), "bf16 would do"


def validation_loss(folder: ModelFolder, data: Path, source: str) -> float:
    """On all samples of the recipe, by our decoder outside of any engine."""
    model = empty_model(folder.model, "eager")
    model.load_state_dict(dict(folder.tensors()))
    held_out = ValidationSet(source, open_streams(data, [source], "validation", 512)[source], SEQUENCE_LENGTH, 5, False)
    _, inputs, labels = next(held_out.batches(0, 1, batch=5))
    with torch.no_grad():
        return model(inputs, labels).item()


def write_continual_recipe(path: Path) -> Path:
    """Two steps of what the model knows, then its share goes down while that of code goes up."""
    write_recipe(path, 2, save_every=5)
    text = path.read_text().replace("slimpajama = 0.7, starcoderdata = 0.3", "slimpajama = 1.0")
    stage = f"""[[stages]]
name = "domain"
tokens = {6 * STEP_TOKENS}
global_batch_tokens = {STEP_TOKENS}
weights = {{ slimpajama = 0.2, starcoderdata = 0.8 }}
ramp_tokens = {4 * STEP_TOKENS}
"""
    path.write_text(text.replace("[intervals]", f"{stage}[intervals]"))
    return path


def test_continual_pretraining_starts_at_the_imported_loss(folder: Path, data_dir: Path, tmp_path: Path) -> None:
    """With a warm-up of its own and a mixture that ramps; then resumed, with the same weights and with others."""
    recipe = write_continual_recipe(tmp_path / "continual.toml")
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    arguments = (recipe, config, data_dir, tmp_path / "run", 2)
    moved = shutil.copytree(folder, tmp_path / "moved")
    finished = pretrain(*arguments, "--init-from", str(moved))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    opened = open_model_folder(folder)
    for source in ("slimpajama", "starcoderdata"):
        losses = read_series(tmp_path / "run", f"Validation/Loss/{source}")
        assert losses[0] == pytest.approx(validation_loss(opened, data_dir, source), rel=1e-5)
        assert losses[-1] < losses[0]
    rates = read_series(tmp_path / "run", "Train/LearningRate")
    assert rates[:5] == pytest.approx([3e-3 * (n + 1) / 5 for n in range(5)])
    code = [0, *read_series(tmp_path / "run", "Tokens/starcoderdata")]
    shares = [(after - before) / STEP_TOKENS for before, after in zip(code, code[1:], strict=False)]
    assert shares[:2] == [0, 0]
    assert shares[2] < shares[5] == pytest.approx(0.8, abs=0.15)

    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["init_from"] == {"path": str(moved), "sha256": opened.weights_sha256}
    losses = read_series(tmp_path / "run", "Train/Loss")
    shutil.rmtree(find_checkpoints(tmp_path / "run")[-1])
    forgotten = pretrain(*arguments)
    assert forgotten.returncode == EXIT_CONFIG
    assert "run.json: holds a different run: init_from is " in forgotten.stderr
    resumed = pretrain(*arguments, "--init-from", str(folder), "--resume", "must")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == losses


@slow
def test_damaged_weights_are_rejected_by_the_first_rank(folder: Path, data_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    recipe = write_recipe(tmp_path / "small.toml", 8, save_every=8)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 2, "--init-from", str(model))
    assert finished.returncode == EXIT_CONFIG, finished.stdout + finished.stderr
    assert finished.stderr.count("tinyllama-ds: ") == 1
    assert f"{model}/model.safetensors: is missing or damaged; its size or SHA-256 is not the one in" in finished.stderr
    assert not (tmp_path / "run" / "run.json").exists()
