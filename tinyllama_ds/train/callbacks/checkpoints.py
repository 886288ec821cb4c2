"""Saves checkpoints: polls a pending save after every step, begins one where it is due, and waits for the last."""

from tinyllama_ds.checkpoint.format import Health
from tinyllama_ds.checkpoint.save import Save
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.health.guard import check_parameters
from tinyllama_ds.health.probe import take_probe
from tinyllama_ds.train.trainer import Callback, StepResult


class ParameterCheck(Callback):
    """Checks that weights are finite and equal on all ranks: every few steps, and before every save.

    Raises `NumericsError` on all ranks.
    """

    def after_step(self, result: StepResult) -> None:
        if result.is_save_due or result.progress.step % self.trainer.run.recipe.intervals.check_steps == 0:
            check_parameters(self.trainer.engine)


class Checkpoints(Callback):
    """Training stalls for the copy into host memory; files are written behind it."""

    def after_step(self, result: StepResult) -> None:
        trainer = self.trainer
        trainer.saver.advance(result.status.busy)
        if result.is_save_due:
            trainer.heartbeat.beat(result.progress.step, "saving")
            trainer.saver.save(trainer.engine, result.progress, self._health)
        if result.is_last:
            trainer.saver.finish_or_raise()

    def _health(self) -> Health:
        """What a checkpoint keeps of the guard and the numerics. Collective. Raises `NumericsError` on all ranks."""
        trainer = self.trainer
        left_out = [[gap[0], gap[-1]] for gap in trainer.run.data.order.excluded_samples]
        return Health(trainer.guard.state(), left_out, take_probe(trainer.engine, trainer.run, trainer.world))

    def after_save(self, save: Save) -> None:
        progress, size = save.progress, save.size / GIB
        metrics = {
            "Checkpoint/StallSeconds": save.stall,
            "Checkpoint/Seconds": save.seconds,
            "Checkpoint/GiB": size,
            "Checkpoint/Failures": save.failures_so_far,
        }
        self.trainer.metrics.log(progress.step, progress.tokens, metrics)
        if save.failures:
            again = f" ({save.failures_in_a_row} in a row)" if save.failures_in_a_row > 1 else ""
            outcome = f"checkpoint save failed{again}, continuing: {'; '.join(save.failures)}"
        else:
            outcome = f"checkpoint saved: {size:.2f} GiB in {save.seconds:.1f} s (stall {save.stall:.2f} s)"
        self.trainer.console.log_line(f"step {progress.step:,}: {outcome}")
