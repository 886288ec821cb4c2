"""Which of its choices a model finds most likely after a long text, as lm-eval scores multiple choice.

The text is computed once and kept as keys and values; all choices are computed together, each sees the text and itself.
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
    more = _logits_within(model, choices, found.past_key_values)
    scored = [
        _score(torch.cat((found.logits[0], rows)), torch.tensor(ids, device=model.device))
        for ids, rows in zip(choices, more, strict=True)
    ]
    return Answer(question, tuple(value for value, _ in scored), scored[question.answer][1])


def _logits_within(model: Any, choices: list[list[int]], cache: Any) -> tuple[Tensor, ...]:
    """The logits of every id of a choice but the first (n - 1, V), by choice; `cache` holds a text."""
    sizes = [len(ids) - 1 for ids in choices]
    before, device = cache.get_seq_length(), model.device
    owners = torch.repeat_interleave(torch.arange(len(choices)), torch.tensor(sizes))
    if not len(owners):
        return tuple(torch.empty(0, model.config.vocab_size, device=device) for _ in choices)
    sees = torch.cat((torch.ones(len(owners), before), owners[:, None] == owners), dim=1).bool()
    found = model(
        torch.tensor([[token for ids in choices for token in ids[:-1]]], device=device),
        attention_mask=sees.tril(before)[None, None].to(device),
        position_ids=torch.tensor([[before + place for size in sizes for place in range(size)]], device=device),
        past_key_values=cache,
    )
    return found.logits[0].split(sizes)


def _score(logits: Tensor, ids: Tensor) -> tuple[float, bool]:
    """The log-likelihood of ids (n,) by their logits (n, V), and whether each is the most likely one."""
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    chosen = log_probs.gather(1, ids[:, None])
    return float(chosen.sum()), bool((log_probs.argmax(dim=-1) == ids).all())
