"""The schema of the run description in run.json and in every manifest, validated before use."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from tinyllama_ds.config.validation import problems_of
from tinyllama_ds.errors import raise_problems

Count = Annotated[int, Field(ge=0, lt=2**53)]
_EXACT = ConfigDict(extra="forbid")
_Positive = Annotated[int, Field(gt=0, lt=2**53)]


class _Stage(TypedDict, total=False):
    tokens: Count
    global_batch_tokens: _Positive
    weights: dict[str, float]


class _Recipe(TypedDict, total=False):
    stages: list[_Stage]


class _DeepSpeedConfig(TypedDict, total=False):
    zero_optimization: dict[str, Any]
    scheduler: dict[str, Any]


class _Data(TypedDict, total=False):
    train: dict[str, dict[str, Any]]


class _Parent(TypedDict):
    __pydantic_config__ = _EXACT  # type: ignore[misc]
    checkpoint: Annotated[str, Field(pattern=r"^/[^\x00]*/[^\x00]+/[^/\x00]+$")]
    step: Count
    tokens: Count
    manifest_sha256: str


class _Window(TypedDict, total=False):
    __pydantic_config__ = _EXACT  # type: ignore[misc]
    loss: list[float]
    grad_norm: list[float]


class _GuardState(TypedDict, total=False):
    skipped: Count
    spikes: Count
    in_a_row: Count
    window: _Window


class _Description(TypedDict, total=False):
    recipe: _Recipe
    deepspeed_config: _DeepSpeedConfig
    data: _Data
    parent: _Parent


def check_guard_state(state: dict) -> dict:
    """The same, where it can be what `AnomalyGuard.state` gave. Raises pydantic's ValidationError."""
    TypeAdapter(_GuardState).validate_python(state, strict=True)
    return state


def check_description(content: dict, place: object) -> None:
    """Raise `ConfigError`, with all problems by key, unless `content` can be the description of a run."""
    try:
        TypeAdapter(_Description).validate_python(content, strict=True)
    except ValidationError as error:
        raise_problems(place, problems_of(error, _Description, content))


def tokenizer_sha256_of(description: dict) -> str:
    """The SHA-256 of a run's tokenizer, from the run description in run.json or in a manifest."""
    return next(iter(description["data"]["train"].values()))["tokenizer_sha256"]
