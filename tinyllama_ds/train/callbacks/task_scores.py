"""Scores on the recipe's tasks of lm-eval, by tokens and at the end. A failure is logged, and the run continues."""

from functools import partial
from time import perf_counter

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.harness import EvaluationFailed
from tinyllama_ds.train.scoring import score_on_tasks
from tinyllama_ds.train.trainer import Callback, StepResult


class TaskScores(Callback):
    """Runs where the recipe has tasks, unless a stop was requested."""

    def after_step(self, result: StepResult) -> None:
        run = self.trainer.run
        if not run.tasks or result.status.stop:
            return
        if result.is_final or result.step.crosses(run.recipe.evaluation.every_tokens):
            self.trainer.saver.finish()  # scoring may take long
            self._score(result)

    def _score(self, result: StepResult) -> None:
        trainer, progress, started = self.trainer, result.progress, perf_counter()
        place = f"step {progress.step:,} ({progress.tokens:,} tokens)"
        beat = partial(trainer.heartbeat.beat, progress.step, "scoring on tasks")
        beat()
        try:
            scores = score_on_tasks(trainer.engine, trainer.run, trainer.world, trainer.stop.is_requested, beat)
        except (ConfigError, EvaluationFailed) as failure:
            trainer.console.log_line(f"{place}: scoring on tasks failed, continuing: {failure}")
            return
        trainer.metrics.log_scores(progress.step, progress.tokens, scores)
        text = ", ".join(f"{score.task} {score.metric} {score.value:.4f}" for score in scores)
        trainer.console.log_line(f"{place}: scored in {perf_counter() - started:.1f} s: {text}")
