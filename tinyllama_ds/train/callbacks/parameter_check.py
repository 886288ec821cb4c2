"""Checks that weights are finite and equal on all ranks: every few steps, and before every save."""

from tinyllama_ds.health.guard import check_parameters
from tinyllama_ds.train.trainer import Callback, StepResult


class ParameterCheck(Callback):
    """Raises `NumericsError` on all ranks."""

    def after_step(self, result: StepResult) -> None:
        if result.is_save_due or result.progress.step % self.trainer.run.recipe.intervals.check_steps == 0:
            check_parameters(self.trainer.engine)
