"""The speed of generation with a draft against the target alone, as `generate` and `chat` report it."""

from dataclasses import replace
from itertools import takewhile

from transformers.generation.streamers import BaseStreamer

from tinyllama_ds.errors import log
from tinyllama_ds.hf.generate import LoadedModel, Sampling
from tinyllama_ds.speculative.acceptance import accepted_per_round
from tinyllama_ds.speculative.decode import Generation, alone, speculate
from tinyllama_ds.speculative.pair import Pair

_WARM_UP_TOKENS = 4
_COMPARED_TOKENS = 64  # of the last answer of a conversation


def warm_up(pair: Pair, ids: list[int], sampling: Sampling, draft_length: int) -> None:
    """The first forwards of both models, which take longer than later ones."""
    speculate(pair, ids, replace(sampling, max_new_tokens=min(_WARM_UP_TOKENS, sampling.max_new_tokens)), draft_length)


def speed_of(found: Generation, expected: Generation) -> dict[str, float]:
    """The figures of a generation with a draft and of one without, as `--json` prints them."""
    return {
        "tokens": len(found.ids),
        "accepted_per_round": accepted_per_round(found.rounds),
        "tokens_per_second": found.tokens_per_second,
        "tokens_per_second_alone": expected.tokens_per_second,
        "speedup": found.tokens_per_second / expected.tokens_per_second,
    }


def speed_line(found: Generation, draft_length: int) -> str:
    """The speed of a generation with a draft in words."""
    return (
        f"{accepted_per_round(found.rounds):.2f} of {draft_length} drafted tokens accepted per round,"
        f" {found.tokens_per_second:.1f} tokens/s"
    )


def comparison_line(found: Generation, expected: Generation, draft_length: int) -> str:
    """The same, with the speed of the target alone."""
    speedup = found.tokens_per_second / expected.tokens_per_second
    return (
        f"{speed_line(found, draft_length)}; the target alone: {expected.tokens_per_second:.1f} tokens/s"
        f" ({speedup:.2f} x)"
    )


def difference_line(found: Generation, expected: Generation) -> str | None:
    """Where greedy texts differ, which only rounding explains."""
    if found.ids == expected.ids:
        return None
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found.ids, expected.ids, strict=False)))
    return (
        f"the target alone generates a different token {same + 1}: it rounds differently for several tokens at once"
        " (docs/speculative.md)"
    )


class SpeculativeAnswers:
    """Continues the prompts of a conversation with a draft, in place of `continue_ids`, and reports the speed."""

    def __init__(self, pair: Pair, draft_length: int) -> None:
        self._pair = pair
        self._draft_length = draft_length
        self._last: tuple[list[int], Sampling, Generation] | None = None  # None after an interrupted answer

    def __call__(
        self, loaded: LoadedModel, ids: list[int], sampling: Sampling, streamer: BaseStreamer | None
    ) -> list[int]:
        self._last = None
        found = speculate(self._pair, ids, sampling, self._draft_length, streamer)
        self._last = ids, sampling, found
        return found.ids

    def report_answer(self) -> None:
        """The speed of the last answer, on the console."""
        if self._last is not None:
            log(speed_line(self._last[2], self._draft_length))

    def report_end(self) -> None:
        """The last question again, by both for at most some tokens."""
        if self._last is None:
            return
        ids, sampling, _ = self._last
        short = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, _COMPARED_TOKENS))
        found = speculate(self._pair, ids, short, self._draft_length)
        line = comparison_line(found, alone(self._pair.target.loaded, ids, short), self._draft_length)
        log(f"the last question, {short.max_new_tokens} tokens at most: {line}")
