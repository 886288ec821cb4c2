"""Putting a run together, and telling one run from another."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from launching import BATCH, SEQUENCE_LENGTH, write_deepspeed_config, write_recipe

from tinyllama_ds.errors import Refusal
from tinyllama_ds.training.run import Options, Run, check_run_directory, open_run_directory, resolve_run


@pytest.fixture
def options(data_dir: Path, tmp_path: Path) -> Options:
    recipe = write_recipe(tmp_path / "small.toml", 10, save_every=5)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    return Options(str(recipe), config, data_dir, tmp_path / "run")


def resolve(options: Options, world_size: int = 2) -> Run:
    return resolve_run(options, world_size, "cpu", bf16=False)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batch_order_and_schedule_do_not_depend_on_ranks(options: Options, world_size: int) -> None:
    run, alone = resolve(options, world_size), resolve(options, 1)
    assert run.engine_config["train_batch_size"] == BATCH
    assert run.engine_config["gradient_accumulation_steps"] == BATCH // 2 // world_size
    assert run.schedule == alone.schedule
    assert list(run.plan.steps(0)) == list(alone.plan.steps(0))
    assert run.order.counts(37) == alone.order.counts(37)


def test_schedule_counts_tokens(options: Options) -> None:
    run = resolve(options)
    assert run.schedule.warmup_tokens == 5 * BATCH * SEQUENCE_LENGTH
    assert run.schedule.total_tokens == 10 * BATCH * SEQUENCE_LENGTH


def test_a_warmup_as_long_as_the_run_is_refused(options: Options, tmp_path: Path) -> None:
    short = write_recipe(tmp_path / "short.toml", 5, save_every=5)
    with pytest.raises(Refusal, match="warmup_num_steps 5 leaves nothing of the run's 5 steps"):
        resolve(replace(options, recipe=str(short)))


def test_a_fresh_directory_is_a_fresh_start(options: Options) -> None:
    run = resolve(options)
    assert check_run_directory(run) is None
    open_run_directory(run)
    assert check_run_directory(resolve(options)) is None
    assert run.run_dir.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 2}, "recipe.seed is 1 there and 2 now"),
        ({"sequence_length": 16}, "recipe.sequence_length is 32 there and 16 now"),
    ],
)
def test_another_recipe_is_another_run(options: Options, tmp_path: Path, change: dict, difference: str) -> None:
    open_run_directory(resolve(options))
    write_recipe(tmp_path / "small.toml", 10, save_every=5, **change)
    with pytest.raises(Refusal, match="holds another run: ") as refusal:
        check_run_directory(resolve(options))
    assert difference in str(refusal.value) or "deepspeed_config" in str(refusal.value)


def test_another_learning_rate_is_another_run(options: Options) -> None:
    open_run_directory(resolve(options))
    config = json.loads(options.deepspeed_config.read_text())
    config["optimizer"]["params"]["lr"] = 1.0
    options.deepspeed_config.write_text(json.dumps(config))
    with pytest.raises(Refusal, match=r"deepspeed_config.optimizer.params.lr is 0.003 there and 1.0 now"):
        check_run_directory(resolve(options))


def test_the_layout_may_change(options: Options) -> None:
    """Number of ranks, ZeRO stage and micro batch say nothing about what is trained."""
    open_run_directory(resolve(options, 2))
    write_deepspeed_config(options.deepspeed_config, 1, micro_batch=4)
    assert check_run_directory(resolve(options, 1)) is None


def test_intervals_may_change(options: Options, tmp_path: Path) -> None:
    open_run_directory(resolve(options))
    write_recipe(tmp_path / "small.toml", 10, save_every=2, evaluate_every=3, validation_samples=2)
    assert check_run_directory(resolve(options)) is None


def test_a_directory_of_somebody_else_is_refused(options: Options) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    open_run_directory(resolve(options))
    os.chown(options.run_dir, 12345, -1)
    with pytest.raises(Refusal, match="belongs to user 12345; expected a directory of your own"):
        check_run_directory(resolve(options))


def test_a_directory_that_cannot_be_written_is_refused(options: Options, small_disk: Callable[..., Path]) -> None:
    """A file system that was mounted read-only; whether the run directory is there already or not."""
    disk = small_disk(size=64 * 2**20)
    here, new = (resolve(replace(options, run_dir=disk / name)) for name in ("here", "new"))
    open_run_directory(here)
    check_run_directory(new)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for run, place in ((here, disk / "here"), (new, disk)):
        with pytest.raises(Refusal, match=f"^{place}: cannot be written; expected a directory that this user may"):
            check_run_directory(run)


def test_never_resume_refuses_a_run_that_exists(options: Options) -> None:
    open_run_directory(resolve(options))
    with pytest.raises(Refusal, match="already holds this run, and --resume never was given"):
        check_run_directory(resolve(replace(options, resume="never")))
