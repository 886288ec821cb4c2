"""Generation by a target alone and with its draft, timed, with the drafted and accepted tokens of every round."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tinyllama_ds.hf.generate import LoadedModel, Sampling, continue_ids
from tinyllama_ds.speculative.pair import Pair


class Round(NamedTuple):
    """One forward of the target: so many drafted tokens to verify, so many of them accepted."""

    drafted: int
    accepted: int


@dataclass(frozen=True)
class Generation:
    """What was generated after a prompt, in which time, prompt included."""

    ids: list[int]
    seconds: float
    rounds: Sequence[Round] = ()

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds


def alone(loaded: LoadedModel, ids: list[int], sampling: Sampling, *, to_the_end: bool = False) -> Generation:
    """Generation without a draft; `to_the_end`: EOS is not generated before `max_new_tokens`."""
    options = {"min_new_tokens": min(sampling.max_new_tokens, loaded.positions - len(ids))} if to_the_end else {}
    started = time.perf_counter()
    found = continue_ids(loaded, ids, sampling, assistance=options)
    return Generation(found, time.perf_counter() - started)


def speculate(
    pair: Pair, ids: list[int], sampling: Sampling, draft_length: int, streamer: BaseStreamer | None = None
) -> Generation:
    """Generation by the target with its draft; beyond the positions of the draft by the target alone."""
    target, draft = pair.target.loaded, pair.draft.loaded
    rounds = _RoundStreamer(streamer)
    found: list[int] = []
    within = min(sampling.max_new_tokens, draft.positions - len(ids))
    watching = target.model.register_forward_pre_hook(rounds.watch, with_kwargs=True)
    started = time.perf_counter()
    try:
        if within > 0:
            assisted = replace(sampling, max_new_tokens=within)
            found = continue_ids(target, ids, assisted, rounds, pair.assistance(draft_length))
        is_ended = bool(found) and (found[-1] in _end_ids(target.model) or len(ids) + len(found) == target.positions)
        if within < sampling.max_new_tokens and not is_ended:
            left = replace(sampling, max_new_tokens=sampling.max_new_tokens - len(found))
            found += continue_ids(target, [*ids, *found], left, rounds.again())
    finally:
        watching.remove()
    return Generation(found, time.perf_counter() - started, rounds.rounds)


def _end_ids(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


class _RoundStreamer(BaseStreamer):
    """Compares what the target was given to verify with what `generate` then passes on, round by round.

    The input of the target is what is not in its key/value cache yet, and the drafted tokens. After a rejection the
    next token is never the rejected one, so that the accepted ones are those that both have.
    """

    def __init__(self, inner: BaseStreamer | None) -> None:
        self._inner = inner
        self._given = torch.empty(1, 0)
        self._known: int | None = None  # tokens at the beginning of the input that were not drafted
        self.rounds: list[Round] = []

    def again(self) -> "_RoundStreamer":
        """The same before another call of `generate`, which passes on its prompt first."""
        self._known = None
        return self

    def watch(self, model: Any, positional: tuple, named: dict) -> None:
        """The hook before a forward of the target."""
        self._given = named["input_ids"]

    def put(self, value: Tensor) -> None:
        if self._known is None:
            self._known = value.numel()
            if not self.rounds and self._inner is not None:
                self._inner.put(value)
            return
        drafted = self._given[0, self._known :].tolist()
        pairs = zip(drafted, value.flatten().tolist(), strict=False)
        accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.rounds.append(Round(len(drafted), accepted))
        self._known = 1
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        if self._inner is not None:
            self._inner.end()
