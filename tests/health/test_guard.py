"""Decisions of the guard over a sequence of step statuses."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tinyllama_ds.config.recipe import GuardSettings
from tinyllama_ds.errors import NumericsError
from tinyllama_ds.health.guard import MAX_SKIPS_IN_A_ROW, AnomalyGuard, Rollback, StepStatus

GOOD = StepStatus(stop=False, save=False, busy=False, is_finite=True, digest=0, loss=2.5, grad_norm=1.0)
SPIKE, BAD = replace(GOOD, loss=9.0), replace(GOOD, is_finite=False, loss=0.0)
SAMPLES = range(24, 32)
ENGINE = SimpleNamespace(zero_optimization=lambda: True, was_step_applied=lambda: False)


def guard_with(policy: str, rollbacks: int = 0) -> AnomalyGuard:
    guard = AnomalyGuard(GuardSettings(policy, spike_window=4, max_rollbacks=2), {}, rollbacks)
    for step in range(4):
        assert guard.check(ENGINE, step, SAMPLES, GOOD).reason is None
    return guard


def test_log_applies_and_reports_a_spike() -> None:
    guard = guard_with("log")
    verdict = guard.check(ENGINE, 5, SAMPLES, SPIKE)
    assert verdict.is_applied
    assert "spike of the loss 9, beyond" in verdict.reason
    assert (guard.spikes, guard.skipped) == (1, 0)


def test_a_loss_on_a_new_level_is_accepted_after_half_a_window() -> None:
    guard = guard_with("log")
    reasons = [guard.check(ENGINE, step, SAMPLES, SPIKE).reason for step in range(5)]
    assert reasons[0] is not None
    assert reasons[-1] is None


def test_a_skipped_step_never_enters_the_window() -> None:
    guard = guard_with("skip")
    before = guard.state()["window"]
    assert not guard.check(ENGINE, 5, SAMPLES, SPIKE).is_applied
    assert not guard.check(ENGINE, 6, SAMPLES, BAD).is_applied
    assert guard.state()["window"] == before
    assert guard.check(ENGINE, 7, SAMPLES, GOOD).is_applied
    assert guard.skipped == 2


@pytest.mark.parametrize("bad", [SPIKE, BAD])
def test_consecutive_skips_end_the_run_across_a_restart_too(bad: StepStatus) -> None:
    guard = guard_with("skip")
    for step in range(MAX_SKIPS_IN_A_ROW - 1):
        guard.check(ENGINE, step, SAMPLES, bad)
    restarted = AnomalyGuard(GuardSettings("skip", spike_window=4), guard.state())
    with pytest.raises(NumericsError, match=r"step 9 \(samples 24 to 31\): .* for the 5th step in a row"):
        restarted.check(ENGINE, 9, SAMPLES, bad)


def test_rollback_names_the_samples_until_they_are_used_up() -> None:
    with pytest.raises(Rollback) as raised:
        guard_with("rollback").check(ENGINE, 5, SAMPLES, SPIKE)
    assert (raised.value.step, raised.value.samples) == (5, SAMPLES)
    with pytest.raises(NumericsError, match="and the run has used up its 2 rollbacks"):
        guard_with("rollback", rollbacks=2).check(ENGINE, 5, SAMPLES, SPIKE)


def test_a_bad_step_that_was_applied_ends_the_run() -> None:
    applied = SimpleNamespace(zero_optimization=lambda: True, was_step_applied=lambda: True)
    with pytest.raises(NumericsError, match="DeepSpeed applied it to the weights"):
        guard_with("log").check(applied, 5, SAMPLES, BAD)
