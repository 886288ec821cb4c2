"""Logs skipped steps and spikes with their samples; the ledger keeps the skipped ones."""

from contextlib import suppress

from tinyllama_ds.run.ledger import SKIPPED, Entry, record
from tinyllama_ds.train.trainer import Callback, StepResult


class AnomalyLog(Callback):
    """Reports what the guard found in a step."""

    def after_step(self, result: StepResult) -> None:
        decision, samples, progress = result.decision, result.samples, result.progress
        if decision.reason is None or not self.trainer.world.is_rank0:
            return
        guard = self.trainer.guard
        metrics: dict[str, float] = {"Guard/FirstSample": samples[0], "Guard/LastSample": samples[-1]}
        if decision.is_applied:
            metrics["Guard/Spikes"] = guard.spikes
        else:
            metrics["Guard/SkippedSteps"] = guard.skipped
            with suppress(OSError):  # a full disk does not stop training; metrics and console have it too
                entry = Entry(SKIPPED, progress.step, samples[0], samples[-1], decision.reason)
                record(self.trainer.run.run_dir, entry)
        self.trainer.metrics.log(progress.step, progress.tokens, metrics)
        skipped = "" if decision.is_applied else "skipped, "
        self.trainer.console.log_line(
            f"step {progress.step:,}: {skipped}{decision.reason} (samples {samples[0]} to {samples[-1]})"
        )
