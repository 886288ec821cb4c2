"""Compares the speed of the ranks at logged steps, and names stragglers."""

from tinyllama_ds.health.stragglers import StragglerDetector
from tinyllama_ds.train.trainer import Callback, StepResult, Trainer


class Stragglers(Callback):
    """Measures this rank's decoder blocks from the first step on."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._detector = StragglerDetector(trainer.engine.module.model.layers, trainer.world)

    def after_step(self, result: StepResult) -> None:
        if not result.is_logged:
            return
        metrics, sentences = self._detector.compare(result.metrics.get("Seconds/data", 0.0))
        result.metrics.update(metrics)
        for sentence in sentences:
            self.trainer.console.log_line(sentence)
