"""A run goes on with another number of ranks, ZeRO stage and micro batch: same samples, same loss."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked import pretrain
from launching import read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest


@dataclass(frozen=True)
class Layout:
    stage: int
    ranks: int
    micro_batch: int


# Each goes on where the one before it stopped.
ROUNDS = {
    "both at once": [Layout(3, 2, 4), Layout(1, 1, 4), Layout(0, 2, 2)],
    "stages": [Layout(3, 2, 4), Layout(2, 2, 2), Layout(1, 2, 4), Layout(0, 2, 4), Layout(3, 2, 1)],
    "ranks": [Layout(3, 2, 4), Layout(3, 1, 4), Layout(3, 4, 2), Layout(3, 2, 4)],
    "stages up": [Layout(0, 1, 8), Layout(2, 2, 2), Layout(3, 1, 4), Layout(0, 2, 2), Layout(1, 1, 2)],
}
STEPS = 3  # with each layout
FUSED = {
    "type": "AdamW",
    "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True, "fused": True},
    "param_groups": [{"params": ["*norm*", "*embed*"], "weight_decay": 0}, {"params": ["*mlp*"], "lr_multiplier": 0.5}],
}


@pytest.mark.parametrize(
    "name", ["both at once", *(pytest.param(n, marks=pytest.mark.all_faults) for n in list(ROUNDS)[1:])]
)
def test_curve_and_samples_do_not_depend_on_the_layouts(name: str, data_dir: Path, tmp_path: Path) -> None:
    """With fused AdamW, as shipped, and with parameter groups. The reference is a run that kept the first layout; the
    others start from what it saved at the first change.
    """
    first, *others = ROUNDS[name]
    recipe = write_recipe(tmp_path / "small.toml", STEPS * len(ROUNDS[name]), save_every=STEPS)
    recipe.write_text(recipe.read_text() + "keep_last = 10\n")
    config = write_deepspeed_config(tmp_path / "ds.json", first.stage, first.micro_batch, optimizer=FUSED)
    finished = pretrain(recipe, config, data_dir, tmp_path / "whole", first.ranks)
    assert finished.returncode == 0, finished.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for number, layout in enumerate(others, start=1):
        write_deepspeed_config(config, layout.stage, layout.micro_batch, optimizer=FUSED)
        stop_after(tmp_path / "run", STEPS * number)
        finished = pretrain(recipe, config, data_dir, tmp_path / "run", layout.ranks)
        assert finished.returncode == 0, finished.stderr
        assert f"resumed at step {STEPS * number}" in finished.stdout
    expected, found = (read_manifest(find_checkpoints(tmp_path / run)[-1]) for run in ("whole", "run"))
    assert found.progress == expected.progress, "the same samples in every step"
    assert (found.world_size, found.zero_stage) == (others[-1].ranks, others[-1].stage)
    for figure, tolerance in (("Train/Loss", 1e-5), ("Train/GradNorm", 1e-4)):
        assert read_series(tmp_path / "run", figure) == pytest.approx(
            read_series(tmp_path / "whole", figure), rel=tolerance
        )


@pytest.mark.all_faults
def test_bf16_at_stage_0_is_left_and_entered(data_dir: Path, tmp_path: Path) -> None:
    """Its master weights are where no other stage has them."""
    layouts = [Layout(0, 2, 4), Layout(2, 1, 4), Layout(0, 2, 2)]
    recipe = write_recipe(tmp_path / "small.toml", STEPS * len(layouts), save_every=STEPS)
    recipe.write_text(recipe.read_text() + "keep_last = 10\n")
    for number, layout in enumerate(layouts):
        bf16 = {"bf16": {"enabled": True}}
        config = write_deepspeed_config(tmp_path / "ds.json", layout.stage, layout.micro_batch, **bf16)
        stop_after(tmp_path / "run", STEPS * number)
        finished = pretrain(recipe, config, data_dir, tmp_path / "run", layout.ranks)
        assert finished.returncode == 0, finished.stderr
        if number == 0:
            shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for figure, tolerance in (("Train/Loss", 3e-3), ("Train/GradNorm", 3e-2)):
        assert read_series(tmp_path / "run", figure) == pytest.approx(
            read_series(tmp_path / "whole", figure), rel=tolerance
        )


STATES = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.all_faults) for stage in (1, 2, 3))])
def test_states_in_bf16_are_left_and_entered(stage: int, data_dir: Path, tmp_path: Path) -> None:
    """Two ranks with them, one rank at another stage without, and back."""
    recipe = write_recipe(tmp_path / "small.toml", 3 * STEPS, save_every=STEPS)
    recipe.write_text(recipe.read_text() + "keep_last = 10\n")
    layouts = [(Layout(2, 2, 4), STATES), (Layout(stage, 1, 4), {"enabled": True}), (Layout(2, 2, 4), STATES)]
    for number, (layout, bf16) in enumerate(layouts):
        config = write_deepspeed_config(
            tmp_path / "ds.json", layout.stage, layout.micro_batch, optimizer=FUSED, bf16=bf16
        )
        stop_after(tmp_path / "run", STEPS * number)
        allow = ("--allow-change", "deepspeed_config.bf16")
        finished = pretrain(recipe, config, data_dir, tmp_path / "run", layout.ranks, *allow)
        assert finished.returncode == 0, finished.stderr
        if number == 0:
            shutil.copytree(tmp_path / "run", tmp_path / "whole")
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(
        read_series(tmp_path / "whole", "Train/Loss"), rel=1e-2
    )


def stop_after(run_dir: Path, step: int) -> None:
    """As if the run had been stopped at that step: later checkpoints are gone."""
    for checkpoint in find_checkpoints(run_dir):
        if read_manifest(checkpoint).progress.step > step:
            shutil.rmtree(checkpoint)
