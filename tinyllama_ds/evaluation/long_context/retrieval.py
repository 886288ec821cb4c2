"""Which of its choices a model finds most likely after a long text, as lm-eval scores multiple choice.

The text is computed once and kept as keys and values; each choice costs its own tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinyllama_ds.evaluation.long_context.needle import Question


@dataclass(frozen=True)
class Answer:
    """What the model chose."""

    question: Question
    log_likelihoods: tuple[float, ...]  # of the choices, in nats
    is_exact: bool  # whether greedy generation writes the right answer

    @property
    def is_right(self) -> bool:
        return self.log_likelihoods.index(max(self.log_likelihoods)) == self.question.answer


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: Question) -> Answer:
    """The answer of transformers' model and tokenizer to a question."""
    text = torch.tensor([tokenizer.encode(question.question)], device=model.device)
    # The ids of a choice are those that follow when both are encoded together, as in lm-eval. They depend on the last
    # line alone, and encoding all of a long text takes as long as a GPU takes to read it.
    line = question.question.rsplit("\n", 1)[-1]
    known = len(tokenizer.encode(line))
    choices = [tokenizer.encode(f"{line} {choice}")[known:] for choice in question.choices]
    found = model(text, use_cache=True, logits_to_keep=1)
    first, cache = found.logits[0], found.past_key_values
    scored = [_score(model, torch.tensor(ids, device=model.device), first, cache) for ids in choices]
    return Answer(question, tuple(value for value, _ in scored), scored[question.answer][1])


def _score(model: Any, ids: Tensor, first: Tensor, cache: Any) -> tuple[float, bool]:
    """The log-likelihood of some ids (n,) after a text, and whether each is the most likely one.

    `first` is the logits of the first one (1, V), `cache` the text's keys and values.
    """
    logits = first
    if len(ids) > 1:
        more = model(ids[None, :-1], past_key_values=cache, use_cache=True).logits[0]  # (n - 1, V)
        cache.crop(1 - len(ids))
        logits = torch.cat((first, more))
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = log_probs.gather(1, ids[:, None])
    return float(chosen.sum()), bool((log_probs.argmax(dim=-1) == ids).all())
