"""A model scored on tasks by lm-eval's own model class and evaluator, the requests dealt over all ranks."""

import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyllama_ds.errors import Refusal


@dataclass(frozen=True)
class Ranks:
    """This process among those that share an evaluation."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # a JSON value of every rank, on every rank


class Shared:
    """lm-eval's model on every rank, each answering its share of the requests; then all have all answers.

    To lm-eval every rank is the only one. Its own way deals documents, breaks off where a rank gets none, and
    unpickles what the others send. A document's requests stay together, because they share their context.
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


def evaluate(lm: Any, tasks: dict[str, Any], ranks: Ranks, limit: int | None = None) -> dict[str, Any]:
    """lm-eval's results: metrics and standard errors by task and group, versions, shots, numbers of documents.

    Collective. `limit` takes the first documents of each task only. Raises `Refusal` for a task that asks for more
    tokens than the model has positions, and for a batch that does not fit the GPU.
    """
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate as lm_evaluate

    _quieten()
    _refuse_long_generations(tasks["tasks"], lm)
    random.seed(0)  # these three are lm-eval's own defaults
    np.random.seed(1234)
    torch.manual_seed(1234)
    try:
        return dict(lm_evaluate(Shared(lm, ranks), tasks, limit=limit, log_samples=False))
    except torch.OutOfMemoryError as error:
        raise Refusal(f"--batch-size {lm.batch_size}: does not fit the GPU's memory; expected a smaller one") from error


def _quieten() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _refuse_long_generations(tasks: dict[str, Any], lm: Any) -> None:
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", lm.max_gen_toks)
            if wanted >= lm.max_length:
                raise Refusal(
                    f"task {name} generates up to {wanted} tokens, and the model has {lm.max_length} positions"
                )
