"""A non-finite gradient on one rank never reaches the weights of any, whatever the stage and the precision."""

from pathlib import Path

import pytest
import torch
from forked import on_ranks, pretrain
from launching import read_series, write_deepspeed_config, write_recipe
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints
from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.errors import EXIT_NUMERICS, NumericsError
from tinyllama_ds.fault_injection import FAULT_VARIABLE
from tinyllama_ds.health.guard import check_parameters
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.run.resolve import Options, resolve_run
from tinyllama_ds.train.engine import hard_exit, start_process_group, wrap

POISONED = 3
BF16 = {"bf16": {"enabled": True}}
slow = pytest.mark.all_faults


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, {}), (3, BF16), *(pytest.param(stage, precision, marks=pytest.mark.all_faults)
     for stage, precision in [(0, BF16), (1, {}), (1, BF16), (2, {}), (2, BF16), (3, {})])],
)  # fmt: skip
def test_a_bad_gradient_on_one_rank_is_skipped_by_all(
    stage: int, precision: dict, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss stays finite: what is poisoned is the gradient of one micro batch of rank 1."""
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=2, **precision)
    monkeypatch.setenv(FAULT_VARIABLE, f"step.backward:1:{POISONED}:poison")
    finished = pretrain(write_poisoned_recipe(tmp_path), config, data_dir, tmp_path / "run", 2)
    assert finished.returncode == 0, finished.stderr
    assert "step 4: skipped, loss or gradient is not finite (samples 24 to 31)" in finished.stdout
    assert read_series(tmp_path / "run", "Guard/SkippedSteps") == [1]
    assert (read_series(tmp_path / "run", "Guard/FirstSample"), read_series(tmp_path / "run", "Guard/LastSample")) == (
        [24], [31],
    )  # fmt: skip
    assert_the_poisoned_step_changed_nothing(tmp_path / "run")


def write_poisoned_recipe(folder: Path) -> Path:
    """Two steps more than the poisoned one, and a checkpoint of each."""
    recipe = write_recipe(folder / "small.toml", POISONED + 3, save_every=1, name="poisoned")
    recipe.write_text(recipe.read_text() + "keep_last = 10\n")
    return recipe


def assert_the_poisoned_step_changed_nothing(run_dir: Path) -> None:
    tensors = [tensors_of(path) for path in find_checkpoints(run_dir)]
    before, after, later = (tensors[POISONED + offset - 1] for offset in (0, 1, 2))
    assert len(before) > 10
    assert [place for place in before if not torch.equal(before[place], after[place])] == []
    assert [place for place in before if not torch.equal(before[place], later[place])] != []


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("fault", ["forward:1:3:poison", "forward:0:3:overflow", "backward:1:3:overflow"])
@slow
def test_a_bad_loss_and_an_infinite_gradient_are_skipped_like_it(
    fault: str, stage: int, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=2)
    monkeypatch.setenv(FAULT_VARIABLE, f"step.{fault}")
    finished = pretrain(write_poisoned_recipe(tmp_path), config, data_dir, tmp_path / "run", 2)
    assert finished.returncode == 0, finished.stderr
    assert "step 4: skipped, loss or gradient is not finite (samples 24 to 31)" in finished.stdout
    assert_the_poisoned_step_changed_nothing(tmp_path / "run")


@pytest.mark.parametrize("poison", ["own check off", "every step"])
def test_bad_numbers_that_stay_or_get_through_stop_the_run(
    poison: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 79, no restart, nothing committed from the state that went bad."""
    recipe = write_recipe(tmp_path / "small.toml", 20, save_every=1)
    changes = {"bf16": {"enabled": True, "check_grad_overflow": False}} if poison == "own check off" else {}
    config = write_deepspeed_config(tmp_path / "ds.json", 2, micro_batch=4, **changes)
    step = POISONED if poison == "own check off" else "3+"
    monkeypatch.setenv(FAULT_VARIABLE, f"step.backward:1:{step}:poison")
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 2)
    assert finished.returncode == EXIT_NUMERICS, finished.stderr
    reason = "DeepSpeed applied it to the weights" if poison == "own check off" else "for the 5th step in a row"
    assert reason in finished.stderr
    assert "restarting in" not in finished.stderr
    last = find_checkpoints(tmp_path / "run")[-1]
    assert last.name == ("step_00000003" if poison == "own check off" else "step_00000007")
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(last).values())


def drift_apart(recipe: Path, config: Path, data: Path, run_dir: Path) -> None:
    """With equal weights, of which one rank then changes a copy. Collective."""
    world = read_world()
    run = resolve_run(Options(str(recipe), config, data, run_dir), world.size, "cpu", bf16=True)
    start_process_group(world)
    engine = wrap(build_model(run.model, "sdpa", run.recipe.seed), run.engine_config, run.schedule.ratio(0))
    check_parameters(engine)
    if world.rank == 1:
        weight = engine.module.model.norm.weight.data
        weight[0] = torch.nextafter(weight[0], torch.zeros_like(weight[0]))  # the least drift there is
    try:
        check_parameters(engine)
    except NumericsError as bad:
        print(f"equal, then: {bad}")
    hard_exit(0)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, {}), (2, BF16), *(pytest.param(*c, marks=slow) for c in [(1, {}), (1, BF16), (2, {})])]
)
def test_copies_that_drift_apart_are_found(stage: int, precision: dict, data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", 8, save_every=8)
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=4, **precision)
    finished = on_ranks(drift_apart, recipe, config, data_dir, tmp_path / "run", ranks=2)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    sentence = "parameter 'model.norm.weight' differs between rank 0 and rank 1"
    assert finished.stdout.count(f"equal, then: {sentence}") == 2, "on both ranks"
