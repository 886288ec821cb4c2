"""The process of a rank: its garbage collection and its heartbeat."""

import gc

from tinyllama_ds.train.trainer import Callback, StepResult

_EVERY_STEPS = 100


class GarbageCollection(Callback):
    """Collects on all ranks at the same steps: a rank that stops to collect would stall all the others."""

    def at_start(self) -> None:
        gc.collect()
        gc.freeze()  # what is alive now is kept until the end
        gc.disable()

    def after_step(self, result: StepResult) -> None:
        if result.progress.step % _EVERY_STEPS == 0:
            gc.collect()


class Liveness(Callback):
    """Reports to the supervisor after every step; longer work in other callbacks has heartbeats of its own."""

    def after_step(self, result: StepResult) -> None:
        self.trainer.heartbeat.beat(result.progress.step, "training")
