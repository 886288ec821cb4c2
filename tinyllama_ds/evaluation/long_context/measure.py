"""The suite `long-context`: what is measured of a model, its documents and questions spread over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyllama_ds.bars import progress
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.data.tokenizers.vocabulary import difference_of
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.harness import Ranks, raising_on_all_ranks
from tinyllama_ds.evaluation.long_context.documents import LongDocument, read_long_documents
from tinyllama_ds.evaluation.long_context.needle import DEPTHS, Haystack, Question
from tinyllama_ds.evaluation.long_context.perplexity import (
    bucket_means,
    by_context,
    by_position,
    reject_other_heads,
    second_half_mean,
    window_losses,
)
from tinyllama_ds.evaluation.long_context.result import Outcome, summarize_answers
from tinyllama_ds.evaluation.long_context.retrieval import answer

_SHORTEST = 256  # of the default lengths


@dataclass(frozen=True)
class LongContext:
    """What is measured: lengths in tokens, how many documents at most and how many tokens of each, questions of each
    length and depth.
    """

    data: Path
    lengths: tuple[int, ...]  # ascending
    documents: int
    document_tokens: int
    questions: int


def default_lengths(positions: int) -> tuple[int, ...]:
    """Powers of two from 256 up to the positions of a model, and at least its positions."""
    powers = tuple(2**power for power in range(positions.bit_length()) if _SHORTEST <= 2**power <= positions)
    return powers or (positions,)


def reject_lengths_beyond(positions: int, lengths: Sequence[int]) -> None:
    """Raises `ConfigError` for a length that the model has no positions for."""
    for length in lengths:
        if length > positions:
            raise ConfigError(
                f"--lengths {length}: is beyond the model's {positions:,} positions (max_position_embeddings);"
                " expected no more"
            )


def reject_other_tokenizer(tokenizer: Any, data: Path) -> None:
    """Raises `ConfigError` unless the tokens of a data directory are those of transformers' tokenizer of the model."""
    held, backend = load_tokenizer(data), getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{tokenizer.name_or_path}: has no fast tokenizer; expected a tokenizer.json")
    differing = difference_of(backend, held)
    backend.encode_special_tokens = False  # as it was
    if differing is not None:
        raise ConfigError(f"{held.path}: is not the tokenizer of the model; expected data prepared with it")


def make_questions(suite: LongContext, documents: Sequence[LongDocument], tokenizer: Any) -> list[Question]:
    """All questions by length, depth and number: the same on every rank."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it warns of texts longer than the model's positions
    texts = [tokenizer.decode(document.ids.tolist(), skip_special_tokens=True) for document in documents]
    haystack = Haystack(texts, lambda text: len(tokenizer.encode(text)))
    return [
        haystack.question(length, depth, number)
        for length in suite.lengths
        for depth in DEPTHS
        for number in range(suite.questions)
    ]


def measure(suite: LongContext, model: Any, tokenizer: Any, ranks: Ranks) -> tuple[dict[str, Any], list[Question]]:
    """The results of transformers' model and tokenizer, and the questions. Collective.

    Raises `ConfigError` on every rank for a length beyond the model's positions, documents that are too short, a model
    other than a Llama, and a length that does not fit the GPU's memory.
    """
    with raising_on_all_ranks(ranks) as together:
        reject_lengths_beyond(model.config.max_position_embeddings, suite.lengths)
        reject_other_heads(model)
        documents = read_long_documents(suite.data, suite.document_tokens, suite.documents, model.config.vocab_size)
        reject_other_tokenizer(tokenizer, suite.data)
        questions = make_questions(suite, documents, tokenizer)
        try:
            positions, contexts = _mean_losses(suite, documents, model, together)
            outcomes = _outcomes(questions, model, tokenizer, together)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"--lengths {max(suite.lengths)}: does not fit the GPU's memory; expected shorter ones, or --dtype"
                " bfloat16"
            ) from error
    sources = [document.source for document in documents]
    return {
        "documents": len(documents),
        "document_tokens": suite.document_tokens,
        "sources": {source: sources.count(source) for source in sorted(set(sources))},
        "positions": by_position(positions, suite.lengths[-1]),
        "contexts": by_context(contexts, suite.lengths, suite.document_tokens),
        "needle": summarize_answers(outcomes),
    }, questions


def _mean_losses(
    suite: LongContext, documents: list[LongDocument], model: Any, ranks: Ranks
) -> tuple[np.ndarray, np.ndarray]:
    """Of each document its mean losses by position (documents, buckets) and by context (documents, lengths)."""
    mine = []
    for document in progress(
        documents[ranks.rank :: ranks.size], desc="perplexity", unit="document", disable=ranks.rank > 0
    ):
        ids = torch.from_numpy(document.ids).to(model.device)
        losses = [window_losses(model, ids, length).cpu().numpy() for length in suite.lengths]
        mine.append([bucket_means(losses[-1], suite.lengths[-1]), list(map(second_half_mean, losses))])
    positions, contexts = zip(*_interleaved(ranks.gather(mine)), strict=True)
    return np.array(positions), np.array(contexts)


def _outcomes(questions: list[Question], model: Any, tokenizer: Any, ranks: Ranks) -> list[Outcome]:
    own = questions[ranks.rank :: ranks.size]
    mine = []
    with progress(
        total=sum(question.length for question in own), desc="needles", unit="token", unit_scale=True,
        disable=ranks.rank > 0,
    ) as bar:  # fmt: skip
        for question in own:
            found = answer(model, tokenizer, question)
            mine.append((question.length, question.depth, found.is_right, found.is_exact))
            bar.update(question.length)
    return [tuple(outcome) for outcome in _interleaved(ranks.gather(mine))]


def _interleaved(shares: list[list]) -> list:
    """The order before element i went to rank i modulo the number of ranks."""
    longest = max(map(len, shares))
    rounds = ([share[number] for share in shares if number < len(share)] for number in range(longest))
    return list(chain.from_iterable(rounds))
