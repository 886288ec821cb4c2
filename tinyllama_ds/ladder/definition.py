"""A ladder: which small models of a recipe are trained, for how many tokens and at which learning rate.

Read from TOML; every shape follows from that of the recipe's own model, so that it is one family.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from tinyllama_ds.config.deepspeed import load_deepspeed_config
from tinyllama_ds.config.key_lines import read_toml
from tinyllama_ds.config.recipe import Recipe, load_recipe
from tinyllama_ds.config.validation import Text, problems_in, validate, whole_number
from tinyllama_ds.errors import ConfigError, all_of, raise_problems, shown
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.shipped import shipped_config, shipped_toml

LADDER_DIRECTORY = Path(__file__).parents[1] / "ladders"
LEAST_SIZES, MOST_SIZES = 4, 6
_WIDTH_MULTIPLE = 16  # of an MLP, as matrix units want it
_Ratio = Annotated[float, Field(strict=True, gt=0, le=1e6)]
_Tokens = Annotated[int, whole_number(1, 10**15)]
_Share = Annotated[float, Field(strict=True, gt=0, le=0.5)]
_Depth = Annotated[int, whole_number(1, 10**4)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of a ladder's file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    recipe: Text  # whose final loss is to be predicted
    deepspeed_config: Text
    depths: Annotated[tuple[_Depth, ...], Field(min_length=LEAST_SIZES, max_length=MOST_SIZES)]
    tokens_per_parameter: tuple[_Ratio, ...] = ()  # of each finished model of a size, or
    tokens: tuple[_Tokens, ...] = ()  # the same for all sizes
    global_batch_tokens: Annotated[int, whole_number(1, 2**31)] | None = None  # default: the recipe's
    learning_rate: _Ratio | None = None  # at the width of the recipe's model; default: the DeepSpeed JSON's
    learning_rate_exponent: Annotated[float, Field(strict=True, ge=-2, le=2)] = 0.0  # of the width relative to it
    warmup: _Share = 0.05  # of the fewest tokens
    decay: _Share = 0.1  # of the tokens of each finished model, at their end


@dataclass(frozen=True)
class Size:
    """A model of the ladder, which one run trains: it is finished once at every number of `tokens`."""

    name: str
    model: LlamaConfig
    tokens: tuple[int, ...]  # ascending; whole steps
    learning_rate: float | None  # None: that of the DeepSpeed JSON

    def flops(self, sequence_length: int) -> int:
        """Of its training."""
        return self.model.flops_per_token(sequence_length) * self.tokens[-1]


@dataclass(frozen=True)
class Ladder:
    """A ladder's file with what it names, read and checked."""

    name: str
    settings: Settings
    recipe: Recipe  # the large one
    config: dict  # its DeepSpeed JSON
    sizes: tuple[Size, ...]  # smallest first
    batch_tokens: int


def load_ladder(name_or_path: str) -> Ladder:
    """A shipped ladder by its name, or one of the user's own by the path of its TOML file.

    Files that it names are relative to it, or shipped ones. Raises `ConfigError` with all that is wrong.
    """
    path = shipped_toml(name_or_path, "ladder", LADDER_DIRECTORY)
    raw, lines = read_toml(path, "the ladder")
    raise_problems(path, problems_in(Settings, raw, lines) + _contradictions(raw))
    settings = validate(Settings, raw, path)
    recipe, config = all_of(
        lambda: load_recipe(_beside(path, settings.recipe)),
        lambda: load_deepspeed_config(shipped_config(_beside(path, settings.deepspeed_config))),
    )
    batch = settings.global_batch_tokens or recipe.stages[0].global_batch_tokens
    _check_recipe(path, settings.recipe, recipe, batch)
    sizes = tuple(_size(settings, depth, recipe, config, batch) for depth in sorted(settings.depths))
    _check_sizes(path, sizes, settings, batch)
    return Ladder(path.stem, settings, recipe, config, sizes, batch)


def _beside(path: Path, name: str) -> str:
    """A file next to the ladder's, or the name of a shipped one."""
    return str(path.parent / name) if name.endswith((".toml", ".json")) else name


def _contradictions(raw: dict) -> list[str]:
    """Keys that are valid alone."""
    problems = []
    if ("tokens" in raw) == ("tokens_per_parameter" in raw):
        problems.append("tokens_per_parameter and tokens decide the same; expected one of them")
    for key in ("depths", "tokens", "tokens_per_parameter"):
        values = raw.get(key)
        twice = [value for value in values if values.count(value) > 1] if isinstance(values, list) else []
        if twice:
            problems.append(f"{key} has {shown(twice[0])} twice; expected different ones")
    return problems


def _check_recipe(path: Path, name: str, recipe: Recipe, batch: int) -> None:
    if len(recipe.stages) > 1:
        raise ConfigError(
            f"{path}: recipe {name} has {len(recipe.stages)} stages; expected one, as every finished model of a ladder"
            " has to be trained on the whole mixture"
        )
    if batch % recipe.sequence_length:
        raise ConfigError(
            f"{path}: global_batch_tokens is {batch}; expected a multiple of sequence_length {recipe.sequence_length}"
        )


def _check_sizes(path: Path, sizes: tuple[Size, ...], settings: Settings, batch: int) -> None:
    """Every decay is a step at least, and begins after the decay before."""
    for size in sizes:
        for before, tokens in zip((round(settings.warmup * size.tokens[0]), *size.tokens), size.tokens, strict=False):
            steps = decay_steps(tokens, settings.decay, batch)
            if steps < 1 or tokens - steps * batch < before:
                raise ConfigError(
                    f"{path}: {size.name}: a decay over {settings.decay:g} of {tokens:,} tokens, {steps} steps of"
                    f" {batch:,}, does not fit after {before:,} tokens; expected more tokens, or a smaller batch"
                )


def decay_steps(tokens: int, share: float, batch: int) -> int:
    """Of a finished model."""
    return round(tokens * share / batch)


def _size(settings: Settings, depth: int, recipe: Recipe, config: dict, batch: int) -> Size:
    model = scaled(recipe.model, depth)
    targets = settings.tokens or [ratio * model.num_parameters for ratio in settings.tokens_per_parameter]
    tokens = tuple(sorted({max(1, round(target / batch)) * batch for target in targets}))
    rate = settings.learning_rate or _rate_of(config)
    if rate is not None:
        rate *= (model.hidden_size / recipe.model.hidden_size) ** settings.learning_rate_exponent
        rate = float(f"{rate:.6g}")
    return Size(f"d{depth}", model, tokens, rate)


def _rate_of(config: dict) -> Any:
    rate = config.get("optimizer", {}).get("params", {}).get("lr")
    return rate if isinstance(rate, int | float) else None


def scaled(model: LlamaConfig, depth: int) -> LlamaConfig:
    """A model of another depth in the same proportions: width per layer, MLP per width, heads per key-value head.

    The width of a head is kept, and the vocabulary.
    """
    heads = max(1, round(model.num_attention_heads * depth / model.num_hidden_layers))
    width = heads * model.hidden_size // model.num_attention_heads
    mlp = round(model.intermediate_size / model.hidden_size * width / _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    wanted = heads * model.num_key_value_heads / model.num_attention_heads
    shared = [count for count in range(1, heads + 1) if heads % count == 0]
    return replace(
        model,
        hidden_size=width,
        intermediate_size=max(_WIDTH_MULTIPLE, mlp),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=min(shared, key=lambda count: abs(count - wanted)),
    )
