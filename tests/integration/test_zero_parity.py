"""ZeRO stage, ranks and accumulation change speed and memory only: one loss curve, and it is plain PyTorch's."""

from pathlib import Path

import pytest
from forked import plain_curves, pretrain
from launching import BATCH, read_series, write_deepspeed_config, write_recipe

STEPS = 12
TOLERANCE = 1e-5  # relative, fp32


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "small.toml", STEPS, save_every=STEPS)


@pytest.fixture(scope="module")
def reference(recipe: Path, data_dir: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of every step in a plain PyTorch loop in a process of its own."""
    return plain_curves("plain_loop.py", recipe, data_dir, STEPS)


@pytest.mark.parametrize(  # every pair of two of them
    ("stage", "ranks", "accumulation"),
    [(0, 1, 4), (0, 2, 1), (1, 1, 1), (1, 2, 4), (2, 1, 4), (2, 2, 1), (3, 1, 1), (3, 2, 4)],
)
def test_curve_equals_plain_pytorch(
    stage: int, ranks: int, accumulation: int, recipe: Path, reference: dict, data_dir: Path, tmp_path: Path
) -> None:
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=BATCH // ranks // accumulation)
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", ranks)
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(reference["loss"], rel=TOLERANCE)
    assert read_series(tmp_path / "run", "Train/GradNorm") == pytest.approx(reference["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("switch", ["--compile=on", "--activation-checkpointing=1", "--attention=eager"])
def test_switches_for_speed_and_memory_keep_the_curve(
    switch: str, recipe: Path, reference: dict, data_dir: Path, tmp_path: Path
) -> None:
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 2, switch)
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(reference["loss"], rel=TOLERANCE)


def test_document_mask_trains_and_changes_the_loss(reference: dict, data_dir: Path, tmp_path: Path) -> None:
    """The same curve whatever the backend and the ranks, and another than without the mask."""
    recipe = write_recipe(tmp_path / "masked.toml", STEPS, save_every=STEPS, document_mask=True)
    curves = []
    for ranks, attention in ((1, "eager"), (2, "auto")):
        config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
        finished = pretrain(recipe, config, data_dir, tmp_path / attention, ranks, "--attention", attention)
        assert finished.returncode == 0, finished.stderr
        curves.append(read_series(tmp_path / attention, "Train/Loss"))
    assert curves[0] == pytest.approx(curves[1], rel=TOLERANCE)
    assert curves[0] != pytest.approx(reference["loss"], rel=1e-4)
