"""The runs of a ladder: recipe and DeepSpeed JSON of each size, and what the finished ones have measured.

A size is one run, with a stage for every number of tokens at which it is finished: each stage ends with a decay of the
learning rate, and the next one goes on at the peak (WSD-S; Wen et al. 2024, arXiv 2410.05192). So one run gives
several finished models. Losses between are not used: they depend on where in its schedule a run is (Hoffmann et al.).
"""

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tinyllama_ds.config.new_recipe import Draft, recipe_text
from tinyllama_ds.config.recipe import Evaluation, Recipe, Samples
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import read_object_if_whole
from tinyllama_ds.ladder.definition import Ladder, Size, decay_steps
from tinyllama_ds.ladder.result import Measurement
from tinyllama_ds.layout import METRICS_FILE, STATUS_FILE
from tinyllama_ds.numbers import short_count
from tinyllama_ds.report.history import read_metrics
from tinyllama_ds.run.decay import model_of_recipe

_LOGGED = 200  # steps of a run
_LOSS = "Validation/Loss/"


def recipe_of(ladder: Ladder, size: Size) -> str:
    """The recipe of a size as TOML: the large one's with its model, and a stage per finished model."""
    (large,) = ladder.recipe.stages
    stages = tuple(
        replace(
            large,
            name=f"{short_count(tokens)} tokens",
            tokens=tokens - before,
            global_batch_tokens=ladder.batch_tokens,
            ramp_tokens=0,
        )
        for before, tokens in pairwise((0, *size.tokens))
    )
    total = size.tokens[-1]
    intervals = replace(
        ladder.recipe.intervals,
        evaluate_tokens=total,  # the end of each stage is validated, and saved, in any case
        save_tokens=total,
        log_steps=max(1, total // ladder.batch_tokens // _LOGGED),
    )
    recipe = replace(
        ladder.recipe,
        name=f"{ladder.name}-{size.name}",
        model=size.model,
        stages=stages,
        intervals=intervals,
        samples=Samples(),
        evaluation=Evaluation(),
    )
    return recipe_text(Draft(recipe.name, model_of_recipe(recipe), recipe.sequence_length, recipe))


def config_of(ladder: Ladder, size: Size) -> dict:
    """The DeepSpeed JSON of a size: the large one's with its learning rate and schedule, and any micro-batch."""
    config = copy.deepcopy(ladder.config)
    config |= dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
    )
    if size.learning_rate is not None:
        config["optimizer"]["params"]["lr"] = size.learning_rate
    batch, share = ladder.batch_tokens, ladder.settings.decay
    shape = {"decay_type": "1-sqrt", "min_lr_ratio": 0.0}
    if (config.get("scheduler") or {}).get("type") == "warmup_stable_decay":
        given = config["scheduler"]["params"]
        shape = {key: given.get(key, default) for key, default in {"decay_type": "cosine", "min_lr_ratio": 0.0}.items()}
    params: dict[str, Any] = {
        "num_training_steps": "auto",
        "num_warmup_steps": round(ladder.settings.warmup * size.tokens[0] / batch),
        "warmup_min_ratio": 0.0,
        "num_decay_steps": [decay_steps(tokens, share, batch) for tokens in size.tokens],
        "decay_each_stage": True,
    }
    return config | {"scheduler": {"type": "warmup_stable_decay", "params": params | shape}}


def check_validation(recipe: Recipe, data: Path) -> None:
    """Raise `ConfigError` where a source of the recipe has no validation split, whose loss a ladder fits."""
    missing = [source for source in recipe.sources if not any((data / source / "validation").glob("*.idx"))]
    if missing:
        raise ConfigError(
            f"{data / missing[0] / 'validation'}: has no shards; a ladder fits validation losses, so expected a"
            " validation split of every source"
        )


def is_finished(run_dir: Path) -> bool:
    """Whether the run of a size has reached its end."""
    return read_object_if_whole(run_dir / STATUS_FILE).get("state") == "finished"


def flops_rate(run_dir: Path, size: Size, sequence_length: int) -> float:
    """FLOP/s of a finished run over its whole uptime, validation and saving included; 0 where it is not known."""
    seconds = [row["seconds"] for row in read_metrics(run_dir) if row.get("seconds", 0) > 0]
    return size.flops(sequence_length) / seconds[-1] if seconds else 0.0


def measurements(directory: Path, ladder: Ladder) -> dict[str, list[Measurement]]:
    """By source, every finished model of every size. Raises `ConfigError` where a run lacks a loss."""
    found: dict[str, list[Measurement]] = {source: [] for source in ladder.recipe.sources}
    for size in ladder.sizes:
        rows = {row["tokens"]: row for row in read_metrics(directory / size.name) if any(_LOSS in key for key in row)}
        for tokens in size.tokens:
            for source, measured in found.items():
                loss = rows.get(tokens, {}).get(f"{_LOSS}{source}")
                if loss is None or not 0 < loss < float("inf"):
                    raise ConfigError(
                        f"{directory / size.name / METRICS_FILE}: has no validation loss of {source} at {tokens:,}"
                        " tokens; expected one at the end of every stage"
                    )
                measured.append(Measurement(size.name, size.model.num_parameters, tokens, loss))
    return found
