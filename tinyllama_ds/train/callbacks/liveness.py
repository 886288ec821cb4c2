"""Tells the supervisor after every step that this rank is alive."""

from tinyllama_ds.train.trainer import Callback, StepResult


class Liveness(Callback):
    """The heartbeat of a rank that trains; longer work in other callbacks has heartbeats of its own."""

    def after_step(self, result: StepResult) -> None:
        self.trainer.heartbeat.beat(result.progress.step, "training")
