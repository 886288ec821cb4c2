"""A model scored on tasks by lm-eval's own model class and evaluator, the requests dealt over all ranks."""

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tinyllama_ds.errors import ConfigError

_SEED = 1234  # lm-eval's own default
_DRAWS = 100_000  # resamples behind a standard error; lm-eval's own default
_NO_FORKS = "DISABLE_MULTIPROC"  # what lm-eval reads before it resamples


@dataclass(frozen=True)
class Ranks:
    """This process among those that share an evaluation."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # a JSON value of every rank, on every rank


class EvaluationFailed(Exception):
    """On which rank, and why; raised on all ranks alike."""


class _Agreed(Exception):
    """All ranks know that one has failed; holds what all of them are to raise."""

    def __init__(self, failure: Exception) -> None:
        super().__init__(str(failure))
        self.failure = failure


@contextmanager
def _failing_together(ranks: Ranks) -> Iterator[Ranks]:
    """Ranks none of which waits for one that has failed: with every exchange each says whether it has.

    Raises on all ranks alike, after the first that failed, `ConfigError` or `EvaluationFailed`. What breaks the
    exchange itself is raised as it comes.
    """
    is_exchanging = False

    def exchange(value: Any, failure: Exception | None = None) -> list[Any]:
        nonlocal is_exchanging
        is_exchanging = True
        told = None if failure is None else [isinstance(failure, ConfigError), _sentence(failure)]
        reports = ranks.gather([told, value])
        is_exchanging = False
        for rank, (told, _) in enumerate(reports):
            if told is not None:
                is_refusal, sentence = told
                raise _Agreed(ConfigError(sentence) if is_refusal else EvaluationFailed(f"rank {rank}: {sentence}"))
        return [value for _, value in reports]

    try:
        try:
            yield replace(ranks, gather=exchange)
            exchange(None)  # a rank that is done leaves when none can fail any more
        except _Agreed:
            raise
        except Exception as error:
            if is_exchanging:
                raise
            exchange(None, error)
    except _Agreed as agreed:
        raise agreed.failure from agreed.__context__


def _sentence(failure: Exception) -> str:
    return str(failure) if isinstance(failure, ConfigError) else f"{type(failure).__name__}: {failure}"


class Shared:
    """lm-eval's model on every rank, each answering its share of the requests; then all have all answers.

    To lm-eval every rank is the only one. Its own way deals documents, breaks off where a rank gets none, and
    runs code that others send. A document's requests stay together, because they share their context.
    """

    rank, world_size = 0, 1

    def __init__(self, lm: Any, ranks: Ranks) -> None:
        self.lm, self.ranks = lm, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        return [tuple(answer) for answer in self._answers(self.lm.loglikelihood, requests)]

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        return self._answers(self.lm.loglikelihood_rolling, requests)

    def generate_until(self, requests: list) -> list[str]:
        return self._answers(self.lm.generate_until, requests)

    def _answers(self, method: Callable[..., list], requests: list) -> list:
        documents: dict[tuple, int] = {}
        owners = [
            documents.setdefault((request.task_name, request.doc_id), len(documents)) % self.ranks.size
            for request in requests
        ]
        mine = [request for request, owner in zip(requests, owners, strict=True) if owner == self.ranks.rank]
        answers = method(mine, disable_tqdm=self.ranks.rank > 0) if mine else []
        shares = [iter(share) for share in self.ranks.gather(answers)]
        return [next(shares[owner]) for owner in owners]


def language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's own class for Hugging Face models, around one that is loaded and on its device."""
    _quieten()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def evaluate(
    build: Callable[[], Any], tasks: dict[str, Any], ranks: Ranks, limit: int | None = None, may_fork: bool = True
) -> dict[str, Any]:
    """lm-eval's results: metrics and standard errors by task and group, versions, shots, numbers of documents.

    Collective. `build` makes the model, lm-eval's (`language_model`). `limit` takes the first documents of each task
    only. Where it may not fork, standard errors without a formula come from 1,000 resamples instead of 100,000.

    Raises on all ranks alike `ConfigError` for a task that asks for more tokens than the model has positions and for a
    batch that does not fit the GPU, `EvaluationFailed` for whatever else went wrong on any of them.
    """
    import torch
    from lm_eval.evaluator import evaluate as lm_evaluate

    _quieten()
    with _failing_together(ranks) as together, _forking(may_fork):
        lm = build()
        reject_long_generations(tasks["tasks"], lm.max_length, lm.max_gen_toks)
        _seed(tasks["tasks"])
        draws = _DRAWS if may_fork else _DRAWS // 100
        try:
            return dict(lm_evaluate(Shared(lm, together), tasks, limit=limit, log_samples=False, bootstrap_iters=draws))
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"--batch-size {lm.batch_size}: does not fit the GPU's memory; expected a smaller one"
            ) from error


def _seed(tasks: dict[str, Any]) -> None:
    """As lm-eval's `simple_evaluate` does by default; tasks draw their examples from where they stopped otherwise."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    for task in tasks.values():
        task.set_fewshot_seed(seed=_SEED)


@contextmanager
def _forking(may_fork: bool) -> Iterator[None]:
    """While it may not, lm-eval resamples in this process."""
    if may_fork or _NO_FORKS in os.environ:
        yield
        return
    os.environ[_NO_FORKS] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_FORKS]


def _quieten() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def reject_long_generations(tasks: dict[str, Any], positions: int, default: int = 256) -> None:
    """Raises `ConfigError` where a task generates more than a model has positions; `default` is lm-eval's own."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", default)
            if wanted >= positions:
                raise ConfigError(
                    f"task {name} generates up to {wanted} tokens, and the model has {positions} positions"
                )
