"""The shapes of a run's files, as far as people are shown them: what has another shape is left out."""

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, OnErrorOmit, TypeAdapter, ValidationError
from typing_extensions import TypedDict

_STRICT = ConfigDict(strict=True, extra="allow")
_LARGEST = 1e30  # of a number that can be drawn
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Positive = Annotated[int, Field(gt=0, lt=2**53)]
_Number = Annotated[float, Field(gt=-_LARGEST, lt=_LARGEST, allow_inf_nan=False)]
_Hosts = OnErrorOmit[dict[str, _Count]]


class _Stage(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    name: str
    tokens: _Positive
    global_batch_tokens: _Positive
    weights: dict[str, _Number]
    ramp_tokens: NotRequired[_Count]


class _Recipe(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    name: OnErrorOmit[str]
    sequence_length: OnErrorOmit[_Count]
    stages: OnErrorOmit[list[_Stage]]


class _Plan(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    steps: OnErrorOmit[_Count]
    tokens: OnErrorOmit[_Count]


class _Parent(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    tokens: OnErrorOmit[_Count]


class _DeepSpeedConfig(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    gradient_clipping: OnErrorOmit[_Number]
    zero_optimization: OnErrorOmit[dict[str, Any]]


class Description(TypedDict, total=False):
    """run.json."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    recipe: OnErrorOmit[_Recipe]
    plan: OnErrorOmit[_Plan]
    parent: OnErrorOmit[_Parent]
    deepspeed_config: OnErrorOmit[_DeepSpeedConfig]
    versions: OnErrorOmit[dict[str, str]]


class Start(TypedDict):
    """A line of starts.jsonl."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    step: _Count
    tokens: _Count
    time: NotRequired[OnErrorOmit[str]]
    reached: NotRequired[OnErrorOmit[_Count]]
    restart: NotRequired[OnErrorOmit[_Count]]
    left_out: NotRequired[OnErrorOmit[_Count]]
    hosts: NotRequired[_Hosts]


class TaskScore(TypedDict):
    """A line of tasks.jsonl, and a score of `evaluate`."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    task: str
    metric: str
    value: _Number
    tokens: NotRequired[_Count]
    stderr: NotRequired[OnErrorOmit[_Number | None]]


class _Percent(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    value: _Number
    benchmark: NotRequired[OnErrorOmit[str]]
    stderr: NotRequired[OnErrorOmit[_Number | None]]


class _Published(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    model: str
    scores: list[_Number]
    average: _Number
    tokens: NotRequired[OnErrorOmit[_Number | None]]
    misprint: NotRequired[OnErrorOmit[str | None]]


class Scores(TypedDict, total=False):
    """A file of `evaluate`."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    tokens: OnErrorOmit[_Number | None]
    percent: OnErrorOmit[list[_Percent]]
    average: OnErrorOmit[_Percent]
    published: OnErrorOmit[list[OnErrorOmit[_Published]]]
    scores: OnErrorOmit[list[OnErrorOmit[TaskScore]]]


def in_shape(content: object, shape: Any) -> dict:
    """What of a JSON object has a shape; an empty one where that is too little."""
    try:
        return TypeAdapter(shape).validate_python(content)
    except (ValidationError, RecursionError):
        return {}


def is_number(value: object) -> bool:
    """Whether a figure can be computed with and drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
