"""A user's first recipe: a commented TOML file with every key, and a DeepSpeed JSON that fits any model and machine."""

import json
import re
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from tinyllama_ds.config.model_table import HuggingFaceConfig
from tinyllama_ds.config.recipe import Recipe, Stage, load_recipe, recipe_path
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.shipped import shipped_config

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Draft:
    """What a new recipe begins with; None is for the user to fill in."""

    name: str
    model: str | dict | None = None  # a named size, or keys of Hugging Face's config.json
    sequence_length: int = Recipe.sequence_length
    like: Recipe | None = None  # whose values are taken instead


def draft_like(name: str, like: str) -> Draft:
    """With the values of another recipe, given by its name or its file; raises `ConfigError` where it is not valid."""
    recipe = load_recipe(like)
    is_named = recipe.model_name in MODEL_SIZES
    model = recipe.model_name if is_named else tomllib.loads(recipe_path(like).read_text())["model"]
    return Draft(name, model, recipe.sequence_length, recipe)


def draft_of_model(name: str, config: Path) -> Draft:
    """With the model of a `config.json`, which has been validated."""
    model = model_keys(json.loads(config.read_bytes()))
    return Draft(name, model, min(Recipe.sequence_length, model["max_position_embeddings"]))


def model_keys(config: dict) -> dict:
    """The part of a `config.json` that a recipe's [model] table has."""
    return {key: value for key, value in config.items() if key in HuggingFaceConfig.model_fields and value is not None}


def recipe_text(draft: Draft) -> str:
    """The recipe as TOML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tinyllama_ds"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["toml"] = toml_value
    values = draft.like.to_dict() if draft.like else _defaults(draft.sequence_length)
    template = environment.get_template("recipe.toml")
    return template.render(name=draft.name, model=draft.model, recipe=values, sizes=", ".join(MODEL_SIZES)) + "\n"


def _defaults(sequence_length: int) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(Recipe)}
    stage = {field.name: None if field.default is MISSING else field.default for field in fields(Stage)}
    stage["global_batch_tokens"] = Stage.global_batch_tokens // sequence_length * sequence_length
    return defaults | {"sequence_length": sequence_length, "stages": [stage]}


def config_text() -> str:
    """The DeepSpeed JSON: ZeRO 3, with sizes, warmup and precision for the model, the run and the machines."""
    config = json.loads(shipped_config("zero3").read_bytes())
    config["train_micro_batch_size_per_gpu"] = config["bf16"]["enabled"] = "auto"
    config["scheduler"]["params"]["warmup_num_steps"] = "auto"
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    config["zero_optimization"] |= dict.fromkeys(sizes, "auto")
    return json.dumps(config, indent=2) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML has it; raises TypeError for a type that TOML lacks."""
    if isinstance(value, dict):
        value = {key: of for key, of in value.items() if of is not None}
        pairs = [
            f"{key if _BARE_KEY.fullmatch(key) else json.dumps(key)} = {toml_value(of)}" for key, of in value.items()
        ]
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    return json.dumps(value, ensure_ascii=False)
