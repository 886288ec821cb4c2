"""The schema of the run description in run.json and in every manifest, validated before use."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

Count = Annotated[int, Field(ge=0, lt=2**53)]
_Positive = Annotated[int, Field(gt=0, lt=2**53)]
_STRICT = ConfigDict(strict=True, extra="allow")


class _Stage(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    tokens: Count
    global_batch_tokens: _Positive
    weights: dict[str, float]


class _Recipe(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    stages: list[_Stage]


class _DeepSpeedConfig(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    zero_optimization: dict[str, Any]
    scheduler: dict[str, Any]


class _Data(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    train: dict[str, dict[str, Any]]


class _Parent(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]
    checkpoint: Annotated[str, Field(pattern=r"^/[^\x00]*/[^\x00]+/[^/\x00]+$")]
    step: Count
    tokens: Count
    manifest_sha256: str


class _Window(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]
    loss: list[float]
    grad_norm: list[float]


class _GuardState(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    skipped: Count
    spikes: Count
    in_a_row: Count
    window: _Window


class _Description(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    recipe: _Recipe
    deepspeed_config: _DeepSpeedConfig
    data: _Data
    parent: _Parent


_DESCRIPTION = TypeAdapter(_Description)


_GUARD_STATE = TypeAdapter(_GuardState)


def check_guard_state(state: dict) -> dict:
    """The same, where it can be what `AnomalyGuard.state` gave. Raises pydantic's ValidationError."""
    _GUARD_STATE.validate_python(state)
    return state


def why_no_description(content: dict) -> str | None:
    """What is wrong with a description of a run, by its key; None for one that can be read."""
    try:
        _DESCRIPTION.validate_python(content)
    except ValidationError as error:
        return problems(error)
    return None


def tokenizer_sha256_of(description: dict) -> str:
    """The SHA-256 of a run's tokenizer, from the run description in run.json or in a manifest."""
    return next(iter(description["data"]["train"].values()))["tokenizer_sha256"]


def problems(error: ValidationError) -> str:
    """Key and complaint of everything that pydantic finds wrong."""
    found = error.errors(include_url=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in found)
