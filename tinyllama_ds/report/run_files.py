"""Types of a run's files, as far as a report shows them: values of a different type are dropped."""

from typing import Annotated, Any, NotRequired

from pydantic import Field, OnErrorOmit, TypeAdapter, ValidationError
from typing_extensions import TypedDict

LARGEST = 1e30  # of a number that can be drawn
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Positive = Annotated[int, Field(gt=0, lt=2**53)]
_Number = Annotated[float, Field(gt=-LARGEST, lt=LARGEST, allow_inf_nan=False)]
_Hosts = OnErrorOmit[dict[str, _Count]]


class _Stage(TypedDict):
    name: str
    tokens: _Positive
    global_batch_tokens: _Positive
    weights: dict[str, _Number]
    ramp_tokens: NotRequired[_Count]


class _Recipe(TypedDict, total=False):
    name: OnErrorOmit[str]
    sequence_length: OnErrorOmit[_Count]
    stages: OnErrorOmit[list[_Stage]]


class _Progress(TypedDict, total=False):
    steps: OnErrorOmit[_Count]
    tokens: OnErrorOmit[_Count]


class _DeepSpeedConfig(TypedDict, total=False):
    gradient_clipping: OnErrorOmit[_Number]
    zero_optimization: OnErrorOmit[dict[str, Any]]


class Description(TypedDict, total=False):
    """run.json."""

    recipe: OnErrorOmit[_Recipe]
    plan: OnErrorOmit[_Progress]
    parent: OnErrorOmit[_Progress]
    deepspeed_config: OnErrorOmit[_DeepSpeedConfig]
    versions: OnErrorOmit[dict[str, str]]


class Start(TypedDict):
    """A line of starts.jsonl."""

    step: _Count
    tokens: _Count
    time: NotRequired[OnErrorOmit[str]]
    reached: NotRequired[OnErrorOmit[_Count]]
    restart: NotRequired[OnErrorOmit[_Count]]
    left_out: NotRequired[OnErrorOmit[_Count]]
    hosts: NotRequired[_Hosts]


class _Value(TypedDict):
    value: _Number
    benchmark: NotRequired[OnErrorOmit[str]]
    stderr: NotRequired[OnErrorOmit[_Number | None]]


class TaskScore(_Value):
    """A line of tasks.jsonl, and a score of `evaluate`."""

    task: str
    metric: str
    tokens: NotRequired[_Count]
    version: NotRequired[OnErrorOmit[str]]
    shots: NotRequired[OnErrorOmit[_Count | None]]
    documents: NotRequired[OnErrorOmit[_Count | None]]


class _Published(TypedDict):
    model: str
    scores: list[_Number]
    average: _Number
    tokens: NotRequired[OnErrorOmit[_Number | None]]
    misprint: NotRequired[OnErrorOmit[str | None]]


class Scores(TypedDict, total=False):
    """A file of `evaluate`."""

    tokens: OnErrorOmit[_Number | None]
    percent: OnErrorOmit[list[_Value]]
    average: OnErrorOmit[_Value]
    published: OnErrorOmit[list[OnErrorOmit[_Published]]]
    nearest: OnErrorOmit[str | None]
    note: OnErrorOmit[str]
    scores: OnErrorOmit[list[OnErrorOmit[TaskScore]]]


class _Loss(TypedDict):
    value: _Number
    stderr: _Number | None


class _Position(_Loss):
    first: _Positive
    end: _Positive
    tokens: _Count


class _Context(_Loss):
    context: _Positive
    tokens: _Count
    difference: _Loss


class _Share(TypedDict):
    questions: _Positive
    right: _Count
    exact: _Count
    low: _Number
    high: _Number


class _Cell(_Share):
    length: _Positive
    depth: _Count


class _AllAnswers(_Share):
    p_value: _Number


class _Needle(TypedDict):
    choices: _Positive
    cells: Annotated[list[_Cell], Field(min_length=1)]
    all: _AllAnswers


class _Measured(TypedDict):
    documents: _Count
    document_tokens: _Count
    sources: dict[str, _Count]
    positions: list[_Position]
    contexts: list[_Context]
    needle: _Needle


class LongContext(TypedDict):
    """A file of `evaluate --suite long-context`."""

    long_context: _Measured


def validated(content: object, shape: Any) -> dict:
    """The parts of a JSON object that have the types of `shape`; empty if required ones are missing."""
    try:
        return TypeAdapter(shape).validate_python(content, strict=True, extra="allow")
    except (ValidationError, RecursionError):
        return {}
