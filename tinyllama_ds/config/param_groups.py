"""Parameter groups by rule: `optimizer.param_groups` of the DeepSpeed JSON, which DeepSpeed does not have.

An entry names parameters by glob patterns, as OLMo-core's `group_overrides` do, and what is different for them:
`{"params": ["*norm*", "*embed_tokens*"], "weight_decay": 0.0, "lr_multiplier": 0.5}`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from tinyllama_ds.config.validation import Lines, PositiveNumber, Text, problems_in
from tinyllama_ds.errors import ConfigError, shown
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.param_groups import Settings

KEY = "optimizer.param_groups"
_EXACT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ParamGroup:
    """An entry. Without a value of its own a parameter has the optimizer's."""

    __pydantic_config__: ClassVar[ConfigDict] = _EXACT
    params: Annotated[tuple[Text, ...], Field(min_length=1)]  # glob patterns over the names of parameters
    weight_decay: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] | None = None
    lr_multiplier: PositiveNumber = 1.0

    def __post_init__(self) -> None:
        if self.weight_decay is None and self.lr_multiplier == 1:
            raise ConfigError(
                f"{KEY}: the group of {shown(self.params[0])} changes nothing; expected weight_decay or lr_multiplier"
            )


@dataclass(frozen=True)
class _Optimizer:
    param_groups: tuple[ParamGroup, ...]


@dataclass(frozen=True)
class _Config:
    optimizer: _Optimizer


def problems_of(entries: object, lines: Lines) -> list[str]:
    """What is wrong with the entries alone, each with its line and key."""
    return problems_in(_Config, {"optimizer": {"param_groups": entries}}, lines)


def check_optimizer(optimizer: Mapping, model: LlamaConfig, path: Path) -> None:
    """Raises `ConfigError` where the JSON's parameter groups do not fit the model, or its optimizer the model's muP."""
    if model.mup and optimizer["type"].lower() == "muon":
        raise ConfigError(f"{path}: optimizer.type is Muon; the recipe's table [mup] has the rules for AdamW and Adam")
    if "param_groups" in optimizer:
        try:
            assign_settings(_parameter_names(model), optimizer)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _parameter_names(model: LlamaConfig) -> list[str]:
    import torch

    from tinyllama_ds.model.llama import LlamaForCausalLM

    with torch.device("meta"):
        return [name for name, _ in LlamaForCausalLM(model).named_parameters()]


def assign_settings(names: Iterable[str], optimizer: Mapping) -> dict[str, Settings]:
    """The settings of every parameter that is in a group, by name, given the names of all and the checked section.

    Raises `ConfigError` for a pattern that matches no parameter, and for a parameter that two entries match.
    """
    found: dict[str, Settings] = {}
    places: dict[str, str] = {}
    all_names = list(names)
    for number, entry in enumerate(optimizer.get("param_groups", ())):
        place, group = f"{KEY}[{number}]", ParamGroup(**entry)
        for pattern in group.params:
            matching = [name for name in all_names if fnmatchcase(name, pattern)]
            if not matching:
                raise ConfigError(
                    f"{place}: the pattern {shown(pattern)} matches no parameter; expected one over names such as"
                    f" {all_names[0]}"
                )
            for name in matching:
                if places.setdefault(name, place) != place:
                    raise ConfigError(f"{place}: {name} is in {places[name]} as well; expected one group for it")
                found[name] = Settings(group.lr_multiplier, group.weight_decay)
    return found


def without_param_groups(config: dict) -> dict:
    """The same config as DeepSpeed knows it."""
    optimizer = {key: value for key, value in config["optimizer"].items() if key != "param_groups"}
    return config | {"optimizer": optimizer}
