"""Spikes of the loss, made on purpose: logged, skipped on every rank, or rolled back and left out for good."""

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import on_ranks, pretrain
from launching import Finished, read_series, write_deepspeed_config, write_recipe
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.config.run_plan import accumulation_steps
from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_NUMERICS, EXIT_ROLLBACK
from tinyllama_ds.fault_injection import FAULT_VARIABLE, RESTART_VARIABLE
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.run.ledger import LEDGER_FILE
from tinyllama_ds.run.resolve import Options, resolve_run
from tinyllama_ds.train.batches import count_targets, micro_batches
from tinyllama_ds.train.engine import hard_exit, start_process_group, wrap
from tinyllama_ds.train.gradients import drop_gradients, gradient_norm
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import accumulate_gradients, apply_gradients

DROPPED = 2  # the step whose gradient is thrown away
STEPS, SAVE_EVERY, WINDOW, SPIKED = 12, 4, 4, 9
SPIKE = f"step.forward:1:{SPIKED}:spike"  # step 10 for people; one micro batch of rank 1 scaled by 50
slow = pytest.mark.all_faults


@dataclass(frozen=True)
class Setup:
    """How to start small runs that differ in their policy only."""

    root: Path
    data: Path

    def start(
        self, name: str, policy: str, stage: int = 3, ranks: int = 2, config: dict | None = None, how: Any = pretrain
    ) -> Finished:
        recipe = write_recipe(self.root / f"{policy}.toml", STEPS, save_every=SAVE_EVERY)
        settings = (
            f'[guard]\nspike_policy = "{policy}"\nspike_window = {WINDOW}\nspike_sigmas = 100\nmax_rollbacks = 2\n'
        )
        recipe.write_text(recipe.read_text() + "keep_last = 10\n" + settings)
        config = write_deepspeed_config(self.root / f"{name}.json", stage, micro_batch=2, **(config or {}))
        return how(recipe, config, self.data, self.root / name, ranks)

    def assert_same_end(self, name: str, other: str, rounding: float = 0.0) -> None:
        ends = [find_checkpoints(self.root / run)[-1] for run in (name, other)]
        first, second = (read_manifest(end) for end in ends)
        assert first.progress == second.progress, "the same samples in every step"
        assert first.health.left_out == second.health.left_out
        for figure, values in first.health.guard["window"].items():
            assert values == pytest.approx(second.health.guard["window"][figure], rel=rounding, abs=0.0)
        tensors, others = map(tensors_of, ends)
        assert len(tensors) > 10
        assert [place for place in tensors if not torch.equal(tensors[place], others[place])] == []

    def ledger(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.root / name / LEDGER_FILE).read_text().splitlines()]


@pytest.fixture
def setup(data_dir: Path, tmp_path: Path) -> Setup:
    return Setup(tmp_path, data_dir)


@slow
def test_log_says_which_samples_and_goes_on(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, SPIKE)
    finished = setup.start("run", "log")
    assert finished.returncode == 0, finished.stderr
    assert "step 10: spike of the loss " in finished.stdout
    assert "(samples 72 to 79)" in finished.stdout
    assert read_series(setup.root / "run", "Guard/Spikes") == [1]
    assert not (setup.root / "run" / LEDGER_FILE).exists()


BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
LAYOUTS = [(0, {}), (0, BF16), (1, {}), (1, BF16), (1, FP32_SUMS), (2, {}), (2, FP32_SUMS), (3, {})]


def rounding_of_norm(stage: int, config: dict) -> float:
    """How far DeepSpeed's norm in a step is from the one before it: at stage 0 in bf16 it adds up in bf16."""
    return 1e-2 if (stage, config) == (0, BF16) else 0.0


@pytest.mark.parametrize(("stage", "config"), [(3, BF16), *(pytest.param(*layout, marks=slow) for layout in LAYOUTS)])
def test_a_skipped_spike_is_as_if_its_gradient_had_been_thrown_away(
    stage: int, config: dict, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is a run whose gradient at that step is not finite, which DeepSpeed's own check throws away."""
    monkeypatch.setenv(FAULT_VARIABLE, SPIKE)
    skipped = setup.start("skipped", "skip", stage, config=config)
    assert skipped.returncode == 0, skipped.stderr
    assert "step 10: skipped, spike of the loss " in skipped.stdout
    assert read_series(setup.root / "skipped", "Guard/SkippedSteps") == [1]
    (entry,) = setup.ledger("skipped")
    assert (entry["event"], entry["step"], entry["first_sample"], entry["last_sample"]) == ("skipped", 10, 72, 79)
    monkeypatch.setenv(FAULT_VARIABLE, SPIKE.replace("forward", "backward").replace("spike", "poison"))
    poisoned = setup.start("poisoned", "log", stage, config=config)
    assert poisoned.returncode == 0, poisoned.stderr
    setup.assert_same_end("skipped", "poisoned", rounding_of_norm(stage, config))


def print_norms(recipe: Path, config: Path, data: Path, run_dir: Path) -> None:
    """Of each step: what `gradient_norm` gives before it, and what DeepSpeed's step gives. One step is dropped."""
    world = read_world()
    run = resolve_run(Options(str(recipe), config, data, run_dir), 1, "cpu", bf16=True)
    start_process_group(world)
    engine = wrap(build_model(run.model, "sdpa", run.recipe.seed), run.engine_config, run.schedule.ratio(0))
    batches, clock = micro_batches(run, world, 0), PhaseClock(world.device)
    norms = []
    for step in run.plan.steps(0):
        accumulation = accumulation_steps(step.batch, world.size, run.micro_batch)
        accumulate_gradients(engine, batches, accumulation, count_targets(run, step), world, clock)
        before = float(gradient_norm(engine))
        if step.number == DROPPED:
            drop_gradients(engine)
        else:
            norms.append([before, float(apply_gradients(engine))])
    print(json.dumps(norms))
    hard_exit(0)


@pytest.mark.parametrize(("stage", "config"), [(3, BF16), *(pytest.param(*layout, marks=slow) for layout in LAYOUTS)])
def test_the_norm_before_a_step_is_deepspeeds_own(stage: int, config: dict, data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", 6, save_every=6)
    path = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=2, **config)
    finished = on_ranks(print_norms, recipe, path, data_dir, tmp_path / "run", ranks=1)
    assert finished.returncode == 0, finished.stderr
    norms = json.loads(finished.stdout.splitlines()[-1])
    assert len(norms) == 5
    rounding = rounding_of_norm(stage, config)
    assert [before for before, _ in norms] == pytest.approx([after for _, after in norms], rel=rounding, abs=0.0)


def test_a_rollback_leaves_out_exactly_the_samples_of_the_spike(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """And equals a run, on other machines too, that never stopped and had the same ledger from the start."""
    monkeypatch.setenv(FAULT_VARIABLE, SPIKE)
    finished = setup.start("run", "rollback", how=start_until_it_stays)
    assert finished.returncode == 0, finished.stderr
    assert "resumed at step 8" in finished.stdout
    assert "samples 72 to 79 are excluded" in finished.stdout
    (entry,) = setup.ledger("run")
    assert (entry["event"], entry["step"], entry["first_sample"], entry["last_sample"]) == ("rolled back", 10, 72, 79)
    starts = [json.loads(line) for line in (setup.root / "run" / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["reached"], start["restart"], start["left_out"]) for start in starts] == [
        (0, 0, 0, 0), (8, 9, 1, 8),
    ]  # fmt: skip
    assert [sum(start["hosts"].values()) for start in starts] == [2, 2]
    monkeypatch.delenv(FAULT_VARIABLE)
    (setup.root / "whole").mkdir()
    (setup.root / "whole" / LEDGER_FILE).write_bytes((setup.root / "run" / LEDGER_FILE).read_bytes())
    whole = setup.start("whole", "rollback")
    assert whole.returncode == 0, whole.stderr
    setup.assert_same_end("run", "whole")


def start_until_it_stays(*arguments: Any) -> Finished:
    """As the supervisor does after a rollback."""
    starts = (pretrain(*arguments, **{RESTART_VARIABLE: str(number)}) for number in itertools.count())
    return next(finished for finished in starts if finished.returncode != EXIT_ROLLBACK)


@slow
def test_two_rollbacks_and_then_a_resume_from_before_them(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples that take the place of the first ones spike too. On one rank afterwards: the same samples."""
    monkeypatch.setenv(FAULT_VARIABLE, f"{SPIKE}:1")
    finished = setup.start("run", "rollback", how=start_until_it_stays)
    assert finished.returncode == 0, finished.stderr
    assert [(entry["first_sample"], entry["last_sample"]) for entry in setup.ledger("run")] == [(72, 79), (80, 87)]
    assert "samples 72 to 87 are excluded" in finished.stdout
    monkeypatch.delenv(FAULT_VARIABLE)
    shutil.copytree(setup.root / "run", setup.root / "again")
    for checkpoint in find_checkpoints(setup.root / "again")[1:]:
        shutil.rmtree(checkpoint)
    shutil.copytree(setup.root / "again", setup.root / "elastic")
    assert setup.start("again", "rollback").returncode == 0
    setup.assert_same_end("run", "again")
    assert setup.start("elastic", "rollback", ranks=1).returncode == 0
    ends = [read_manifest(find_checkpoints(setup.root / name)[-1]).progress for name in ("run", "elastic")]
    assert ends[0] == ends[1]


@slow
def test_rollbacks_are_counted_over_the_whole_run(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, f"{SPIKE}:always")
    finished = setup.start("run", "rollback", how=start_until_it_stays)
    assert finished.returncode == EXIT_NUMERICS, finished.stderr
    assert "and the run has used up its 2 rollbacks" in finished.stderr
    assert len(setup.ledger("run")) == 2


@slow
def test_a_checkpoint_without_its_ledger_is_rejected(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, SPIKE)
    assert setup.start("run", "rollback", how=start_until_it_stays).returncode == 0
    (setup.root / "run" / LEDGER_FILE).unlink()
    finished = setup.start("run", "rollback")
    assert finished.returncode == EXIT_CONFIG
    assert "excludes the samples [] of the first 96, but the checkpoint of step 12" in finished.stderr
