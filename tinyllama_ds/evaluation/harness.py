"""Scores a model by lm-eval's own model class and evaluator, with its requests spread over all ranks."""

import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tinyllama_ds.errors import ConfigError

_SEED = 1234  # lm-eval's own default
_RESAMPLES = 100_000  # resamples behind a standard error; lm-eval's own default
_NO_FORKS = "DISABLE_MULTIPROC"  # read by lm-eval before it resamples


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of an evaluation."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # all-gather of a JSON value


class EvaluationFailed(Exception):
    """The rank and the reason; raised on every rank."""


class _KnownFailure(Exception):
    """A failure that every rank knows of already; its argument is the exception to raise."""


@contextmanager
def raising_on_all_ranks(ranks: Ranks) -> Iterator[Ranks]:
    """Ranks whose every gather also tells whether a rank has failed, so that none waits for it forever.

    Raises the first failure on every rank, as `ConfigError` or `EvaluationFailed`. A failure of the gather itself is
    raised unchanged.
    """

    def exchange(value: Any, failure: Exception | None = None) -> list[Any]:
        report = None if failure is None else [isinstance(failure, ConfigError), _message(failure)]
        try:
            reports = ranks.gather([report, value])
        except Exception as error:
            raise _KnownFailure(error) from None
        for rank, (report, _) in enumerate(reports):
            if report is not None:
                is_config_error, message = report
                known = ConfigError(message) if is_config_error else EvaluationFailed(f"rank {rank}: {message}")
                raise _KnownFailure(known) from failure
        return [value for _, value in reports]

    try:
        try:
            yield replace(ranks, gather=exchange)
            exchange(None)  # a finished rank leaves when none can fail any more
        except _KnownFailure:
            raise
        except Exception as error:
            exchange(None, error)
    except _KnownFailure as known:
        raise known.args[0] from known.__cause__


def _message(failure: Exception) -> str:
    return str(failure) if isinstance(failure, ConfigError) else f"{type(failure).__name__}: {failure}"


class ShardedLM:
    """lm-eval's model on every rank: each answers its share of the requests, then all gather all answers.

    lm-eval sees a single rank. Its own distribution shards documents, fails where a rank gets none, and loads objects
    that other ranks send. The requests of a document stay together, because they share their context.
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
    """lm-eval's own class for Hugging Face models, around a loaded one on its device."""
    _silence_logs()
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def evaluate(
    build: Callable[[], Any], tasks: dict[str, Any], ranks: Ranks, limit: int | None = None, may_fork: bool = True
) -> dict[str, Any]:
    """lm-eval's results: metrics and standard errors by task and group, versions, shots, numbers of documents.

    Collective. `build` makes lm-eval's model (`language_model`). `limit` keeps only the first documents of each task.
    Without forks, standard errors without a formula come from 1,000 resamples instead of 100,000.

    Raises on every rank `ConfigError` for a task that generates more tokens than the model has positions and for a
    batch that does not fit the GPU, `EvaluationFailed` for any other failure on any rank.
    """
    import torch
    from lm_eval.evaluator import evaluate as lm_evaluate

    _silence_logs()
    if not may_fork:
        os.environ[_NO_FORKS] = "1"
    with raising_on_all_ranks(ranks) as together:
        lm = build()
        reject_long_generations(tasks["tasks"], lm.max_length, lm.max_gen_toks)
        _seed(tasks["tasks"])
        draws = _RESAMPLES if may_fork else _RESAMPLES // 100
        try:
            return dict(
                lm_evaluate(ShardedLM(lm, together), tasks, limit=limit, log_samples=False, bootstrap_iters=draws)
            )
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"--batch-size {lm.batch_size}: does not fit the GPU's memory; expected a smaller batch"
            ) from error


def _seed(tasks: dict[str, Any]) -> None:
    """As lm-eval's `simple_evaluate` does by default; without it examples depend on what was drawn before."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    for task in tasks.values():
        task.set_fewshot_seed(seed=_SEED)


def _silence_logs() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def reject_long_generations(tasks: dict[str, Any], positions: int, default: int = 256) -> None:
    """Raises `ConfigError` where a task generates more than a model has positions; `default` is lm-eval's own."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            tokens = (task.config.generation_kwargs or {}).get("max_gen_toks", default)
            if tokens >= positions:
                raise ConfigError(
                    f"task {name} generates up to {tokens} tokens; expected fewer than the {positions} positions"
                )
