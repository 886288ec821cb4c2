"""Training on a GPU of this machine, against plain PyTorch on its CPU: `pytest --gpu`. The kernels: `tests/model`."""

import json
from pathlib import Path

import pytest
import torch
from forked import plain_curves
from launching import BATCH, pretrain, read_series, tinyllama_ds, write_deepspeed_config, write_recipe
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.model.attention import ATTENTION_BACKENDS

pytestmark = pytest.mark.gpu

STEPS = 20
FP32 = 1e-4  # relative: sums in another order, over 20 steps, with attention written out
BF16 = 2e-2  # relative to fp32
CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "small.toml", STEPS, save_every=STEPS // 2)


@pytest.fixture(scope="module")
def reference(recipe: Path, data_dir: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of every step in a plain PyTorch loop, in fp32 on the CPU."""
    return plain_curves("plain_loop.py", recipe, data_dir, STEPS)


@pytest.mark.parametrize("switches", [("off", "0"), ("on", "0"), ("on", "1")], ids=["eager", "compiled", "recomputed"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_curve_equals_plain_pytorch_on_the_cpu(
    stage: int, switches: tuple[str, str], recipe: Path, reference: dict, data_dir: Path, tmp_path: Path
) -> None:
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=BATCH // 4)
    more = ["--attention", "eager", "--compile", switches[0], "--activation-checkpointing", switches[1]]
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 1, *more)
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(reference["loss"], rel=FP32)
    assert read_series(tmp_path / "run", "Train/GradNorm") == pytest.approx(reference["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("attention", [name for name in ATTENTION_BACKENDS if name not in ("blocked", "eager")])
def test_every_kernel_trains_in_bf16(attention: str, document_mask: bool, data_dir: Path, tmp_path: Path) -> None:
    """The first and the last losses are those of the attention that is written out, within the rounding of bf16."""
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=STEPS, document_mask=document_mask)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2, bf16={"enabled": True})
    curves = []
    for name in ("eager", attention):
        finished = pretrain(recipe, config, data_dir, tmp_path / name, 1, "--attention", name)
        if finished.returncode == EXIT_CONFIG:
            pytest.skip(finished.stderr.strip().splitlines()[-1])
        assert finished.returncode == 0, finished.stderr
        curves.append(read_series(tmp_path / name, "Train/Loss"))
    assert curves[1] == pytest.approx(curves[0], rel=BF16)


def test_a_package_that_does_not_import_is_passed_over_with_a_line(
    recipe: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packages" / "flash_attn").mkdir(parents=True)
    (tmp_path / "packages" / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=":")
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2, bf16={"enabled": True})
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 1)
    assert finished.returncode == 0, finished.stderr
    said = "(flash_attention_2: flash_attn does not import (ImportError: undefined symbol: _ZN3c10))"
    assert (finished.stdout + finished.stderr).count(said) == 1
    refused = pretrain(recipe, config, data_dir, tmp_path / "by_name", 1, "--attention", "flash_attention_2")
    assert refused.returncode == EXIT_CONFIG
    assert refused.stderr.count("flash_attn does not import") == 1
    assert not (tmp_path / "by_name").exists()


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_deterministic_run_is_the_same_to_the_last_bit(document_mask: bool, data_dir: Path, tmp_path: Path) -> None:
    """Twice from the beginning, compiled, in bf16 with the attention that this GPU gets by itself."""
    recipe = write_recipe(
        tmp_path / "small.toml", STEPS, save_every=STEPS, evaluate_every=STEPS // 2, document_mask=document_mask
    )
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2, bf16={"enabled": True})
    for name in ("first", "second"):
        finished = pretrain(recipe, config, data_dir, tmp_path / name, 1, "--deterministic")
        assert finished.returncode == 0, finished.stderr
    first, second = (tensors_of(find_checkpoints(tmp_path / name)[-1]) for name in ("first", "second"))
    assert first.keys() == second.keys()
    for place, tensor in first.items():
        assert torch.equal(tensor, second[place]), place


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_keep"])
def test_shipped_configs_train_in_bf16(
    name: str, recipe: Path, reference: dict, data_dir: Path, tmp_path: Path
) -> None:
    shipped = json.loads((CONFIGS / f"{name}.json").read_text())
    ours = json.loads(write_deepspeed_config(tmp_path / "ds.json", 1, micro_batch=2).read_text())
    same_run = {key: ours[key] for key in ("train_micro_batch_size_per_gpu", "optimizer", "scheduler", "tensorboard")}
    (tmp_path / "ds.json").write_text(json.dumps(shipped | same_run))
    finished = pretrain(recipe, tmp_path / "ds.json", data_dir, tmp_path / "run", 1)
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(reference["loss"], rel=BF16)


def test_a_run_goes_on_where_it_was(recipe: Path, reference: dict, data_dir: Path, tmp_path: Path) -> None:
    """The second half is trained again from the checkpoint in the middle, and is the same curve."""
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    more = ["--attention", "eager"]
    assert pretrain(recipe, config, data_dir, tmp_path / "run", 1, *more).returncode == 0
    (tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}").rename(tmp_path / "last")
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 1, *more, "--resume", "must")
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss")[-STEPS // 2 :] == pytest.approx(
        reference["loss"][-STEPS // 2 :], rel=FP32
    )


def test_bench_measures_time_and_memory(tmp_path: Path) -> None:
    configs = [CONFIGS / "zero1.json", CONFIGS / "zero3_keep.json"]
    finished = tinyllama_ds(
        "bench", "--model", "test", "--sequence-length", 64, "--deepspeed-config", *configs, "--micro-batch", 2,
        "--num-gpus", 1, "--steps", 2, "--output", tmp_path / "out", "--json",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    rows = json.loads(finished.stdout)["rows"]
    assert len(rows) == 4
    for row in rows:
        assert "error" not in row
        assert 0 < row["measured_mfu"] < 1
        assert row["peak_gib"] > 0
