"""Validation loss and perplexity of every source: before the first step, by tokens, and at the end."""

from tinyllama_ds.checkpoint.format import Progress
from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.evaluation.validation import perplexity, validation_losses
from tinyllama_ds.train.trainer import Callback, StepResult


class Validation(Callback):
    """Runs where the data have a validation split."""

    def at_start(self) -> None:
        run, start = self.trainer.run, self.trainer.start
        if run.evaluation.validation and start.step == run.first_step:
            self._validate(start)  # where the curves begin: at step 0 about ln(vocabulary)

    def after_step(self, result: StepResult) -> None:
        run = self.trainer.run
        if run.evaluation.validation and (result.is_final or result.step.crosses(run.recipe.intervals.evaluate_tokens)):
            self.trainer.heartbeat.beat(result.progress.step, "validating")
            self._validate(result.progress)

    def _validate(self, progress: Progress) -> None:
        trainer, run = self.trainer, self.trainer.run
        losses = validation_losses(
            run.evaluation.validation, trainer.engine, sum_over_ranks, trainer.world, run.micro_batch
        )
        metrics = {f"Validation/Loss/{source}": loss for source, loss in losses.items()}
        metrics |= {f"Validation/Perplexity/{source}": perplexity(loss) for source, loss in losses.items()}
        trainer.metrics.log(progress.step, progress.tokens, metrics)
        text = ", ".join(f"{source} {loss:.3f}" for source, loss in losses.items())
        trainer.console.log_line(f"step {progress.step:,} ({progress.tokens:,} tokens): validation loss {text}")
