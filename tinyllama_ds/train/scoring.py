"""Scores on tasks of lm-eval while a run trains: every rank holds the whole model meanwhile, and scores its share.

Training is the same bit for bit with and without: the weights are read only, no compiled code is involved, and every
source of random numbers is restored.
"""

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tinyllama_ds.distributed.collectives import barrier_with_callback, gather_from_ranks
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.evaluation.harness import Ranks, evaluate, language_model
from tinyllama_ds.evaluation.scores import Score, outermost, read_scores
from tinyllama_ds.evaluation.tasks import silence
from tinyllama_ds.hf.convert import hf_model, hf_tokenizer
from tinyllama_ds.train.engine import gather_full_params

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from tinyllama_ds.run.resolve import Run


class StopRequested(Exception):
    """Scoring ends where a stop of the run was requested."""


def score_on_tasks(
    engine: "DeepSpeedEngine",
    run: "Run",
    world: DistributedInfo,
    stop_is_requested: Callable[[], bool],
    beat: Callable[[], None],
) -> tuple[Score, ...]:
    """The scores of the weights as they are. Collective; `beat` is called repeatedly.

    Raises, on all ranks alike, `ConfigError` or `EvaluationFailed` where it failed on any; the run can continue.
    """

    def check_for_stop(*_: object) -> None:
        beat()
        if stop_is_requested():
            raise StopRequested("a stop was requested")

    def build() -> Any:
        lm = _whole_model(engine, run)
        lm.model.register_forward_pre_hook(check_for_stop)
        return lm

    def gather(value: Any) -> list[Any]:
        barrier_with_callback(world.device, beat)  # ranks with longer texts
        return gather_from_ranks(value)

    assert run.evaluation.tasks is not None
    try:
        with _random_state_restored(world.device), silence():
            ranks = Ranks(world.rank, world.size, gather)
            results = evaluate(build, run.evaluation.tasks, ranks, run.recipe.evaluation.limit, may_fork=False)
    finally:
        _free_memory()
    return read_scores(results, outermost(results))


def score_one_prompt(engine: "DeepSpeedEngine", run: "Run", world: DistributedInfo) -> None:
    """The log-likelihood of one made-up continuation, by the model that scores tasks. Collective."""
    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood", doc={}, arguments=("The capital of France is", " Paris"), idx=0)
    try:
        with _random_state_restored(world.device), silence():
            _whole_model(engine, run).loglikelihood([request], disable_tqdm=True)
    finally:
        _free_memory()


def _whole_model(engine: "DeepSpeedEngine", run: "Run") -> Any:
    """lm-eval's model around the weights as they are, on this rank's device. Collective."""
    model = hf_model(gather_full_params(engine), run.model, run.data.tokenizer)
    tokenizer = hf_tokenizer(run.data.tokenizer, run.model.max_position_embeddings)
    return language_model(model, tokenizer, run.recipe.evaluation.batch_size)


@contextmanager
def _random_state_restored(device: torch.device) -> Iterator[None]:
    pythons, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(pythons)
            np.random.set_state(numpys)


def _free_memory() -> None:
    """Of the whole model; automatic garbage collection is off."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
