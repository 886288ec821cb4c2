"""Continuations of the recipe's prompts, by tokens and at the end. Draws no random numbers, and compiles nothing."""

import torch

from tinyllama_ds.evaluation.samples import continue_greedily
from tinyllama_ds.train.trainer import Callback, StepResult, Trainer


class Samples(Callback):
    """Runs where the recipe has prompts."""

    def after_step(self, result: StepResult) -> None:
        run, samples, progress = self.trainer.run, self.trainer.run.recipe.samples, result.progress
        if not run.prompts or not (result.is_final or result.step.crosses(samples.every_tokens)):
            return
        self.trainer.heartbeat.beat(progress.step, "sampling")
        continuations = continue_prompts(self.trainer, samples.new_tokens)
        texts = [run.tokenizer.decode(ids) for ids in continuations]
        pairs = list(zip(samples.prompts, texts, strict=True))
        self.trainer.metrics.log_samples(progress.step, progress.tokens, pairs)


def continue_prompts(trainer: Trainer, new_tokens: int) -> list[list[int]]:
    """Greedy continuations of the recipe's prompts, as ids. Collective."""
    # A new shape would be compiled, and that would change the kernels of the training steps.
    with torch.compiler.set_stance("force_eager"):
        return continue_greedily(trainer.engine, trainer.run.prompts, new_tokens, trainer.world.device)
