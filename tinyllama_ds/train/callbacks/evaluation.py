"""Evaluation while a run trains, by tokens and at the end: validation loss, continuations of prompts, task scores."""

from functools import partial
from time import perf_counter

import torch

from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.harness import EvaluationFailed
from tinyllama_ds.evaluation.samples import continue_greedily
from tinyllama_ds.evaluation.validation import mean_losses, sample_losses, validation_metrics
from tinyllama_ds.train.scoring import score_on_tasks
from tinyllama_ds.train.trainer import Callback, StepResult, Trainer


class Validation(Callback):
    """Loss, perplexity and bits per byte of every source with a validation split, also before the first step.

    And after every stage, where a decay may end.
    """

    def at_start(self) -> None:
        run, start = self.trainer.run, self.trainer.start
        if run.evaluation.validation and start.step == run.first_step:
            self._validate(start)  # where the curves begin: at step 0 about ln(vocabulary)

    def after_step(self, result: StepResult) -> None:
        run = self.trainer.run
        is_stage_end = result.progress.step in run.plan.stage_ends
        if run.evaluation.validation and (is_stage_end or result.is_due(run.recipe.intervals.evaluate_tokens)):
            self.trainer.heartbeat.beat(result.progress.step, "validating")
            self._validate(result.progress)

    def _validate(self, progress: Progress) -> None:
        trainer, run = self.trainer, self.trainer.run
        samples = sample_losses(
            run.evaluation.validation, trainer.engine, sum_over_ranks, trainer.world, run.micro_batch
        )
        losses = mean_losses(samples)
        metrics = validation_metrics(losses, run.evaluation.validation)
        trainer.metrics.log(progress.step, progress.tokens, metrics)
        trainer.metrics.log_sample_losses(progress.step, progress.tokens, samples)
        text = ", ".join(f"{source} {loss:.3f}" for source, loss in losses.items())
        trainer.console.log_line(f"step {progress.step:,} ({progress.tokens:,} tokens): validation loss {text}")


class Samples(Callback):
    """Continuations of the recipe's prompts, if it has any. Draws no random numbers, and compiles nothing."""

    def after_step(self, result: StepResult) -> None:
        run, samples, progress = self.trainer.run, self.trainer.run.recipe.samples, result.progress
        if not run.evaluation.prompts or not result.is_due(samples.every_tokens):
            return
        self.trainer.heartbeat.beat(progress.step, "sampling")
        continuations = continue_prompts(self.trainer, samples.new_tokens)
        texts = [run.data.tokenizer.decode(ids) for ids in continuations]
        pairs = list(zip(samples.prompts, texts, strict=True))
        self.trainer.metrics.log_samples(progress.step, progress.tokens, pairs)


def continue_prompts(trainer: Trainer, new_tokens: int) -> list[list[int]]:
    """Greedy continuations of the recipe's prompts, as ids. Collective."""
    # A new shape would be compiled, and that would change the kernels of the training steps.
    with torch.compiler.set_stance("force_eager"):
        eos_id = trainer.run.data.tokenizer.eos_id
        return continue_greedily(
            trainer.engine, trainer.run.evaluation.prompts, new_tokens, eos_id, trainer.world.device
        )


class TaskScores(Callback):
    """Scores on the recipe's tasks of lm-eval, unless a stop was requested. After a failure the run continues."""

    def after_step(self, result: StepResult) -> None:
        run = self.trainer.run
        if not run.evaluation.tasks or result.status.stop:
            return
        if result.is_due(run.recipe.evaluation.every_tokens):
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
