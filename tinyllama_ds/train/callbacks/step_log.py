"""Writes the metrics of a logged step."""

from tinyllama_ds.train.trainer import Callback, StepResult


class StepLog(Callback):
    """To the sinks, and in short to the console."""

    def after_step(self, result: StepResult) -> None:
        if not result.is_logged or not self.trainer.world.is_rank0:
            return
        metrics, progress = result.metrics, result.progress
        self.trainer.metrics.log(progress.step, progress.tokens, metrics)
        mfu = f"{metrics['Speed/MFU']:.0%}" if "Speed/MFU" in metrics else "above the measured peak"
        self.trainer.console.advance(
            progress.step,
            f"loss {metrics['Train/Loss']:.3f}, lr {metrics['Train/LearningRate']:.2e},"
            f" {metrics['Speed/TokensPerSecond']:,.0f} tok/s, MFU {mfu}",
        )
