"""Collects Python's garbage on all ranks at the same steps: a rank that stops to collect would stall all the others."""

import gc

from tinyllama_ds.train.trainer import Callback, StepResult

_EVERY_STEPS = 100


class GarbageCollection(Callback):
    """Replaces the automatic collection."""

    def at_start(self) -> None:
        gc.collect()
        gc.freeze()  # what is alive now is kept until the end
        gc.disable()

    def after_step(self, result: StepResult) -> None:
        if result.progress.step % _EVERY_STEPS == 0:
            gc.collect()
