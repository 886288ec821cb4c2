"""Files against types: everything that pydantic finds wrong, at once, each with line, key, value and expectation."""

import difflib
import json
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from tinyllama_ds.config.key_lines import KeyPath, json_lines, key_path
from tinyllama_ds.errors import ConfigError, raise_problems, shown, shown_as_json

T = TypeVar("T")
Lines = Mapping[KeyPath, int]
NO_LINES: Lines = {}
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
# pydantic's kinds of errors in plain words; the messages of others are plain enough.
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "an array",
    "tuple_type": "an array",
    "dict_type": "a table of keys and values",
    "dataclass_type": "a table of keys and values",
    "model_type": "a table of keys and values",
    "too_short": "at least {min_length} entr{plural}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:,} or more",
    "less_than_equal": "{le:,} or less",
    "literal_error": "{expected}",
    "expected": "{what}",
}
BY_NAME, AS_TABLE = "[name]", "[table]"  # what a value may be by its discriminator, which pydantic adds to the path
_NOT_KEYS = (BY_NAME, AS_TABLE, "[key]")  # the last where the name of a key is invalid
CONTRADICTION = "contradiction"  # of keys that are valid alone: the message is the whole sentence


def whole_number(least: int = 0, most: int = 2**63 - 1) -> Any:
    """For `Annotated[int, ...]`: a whole number in a range, written without a fraction."""
    return Field(strict=True, ge=least, le=most)


def expectation(what: str) -> PydanticCustomError:
    """What a validator raises for a value of the right type, with the values that were expected."""
    return PydanticCustomError("expected", "expected {what}", {"what": what})


def _positive(value: float) -> float:
    """A number that can be divided by and into others of its kind."""
    if not 1e-9 <= value <= 1e9:
        raise expectation("a positive number up to 1,000,000,000")
    return value


def _not_empty(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise expectation("a text that is not empty")
    return text


PositiveNumber = Annotated[float, Field(strict=True), AfterValidator(_positive)]
Text = Annotated[str, AfterValidator(_not_empty)]


@lru_cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def validate(kind: type[T], raw: object, place: object, lines: Lines = NO_LINES) -> T:
    """`raw` as a dataclass, or any other type that pydantic knows.

    Raises `ConfigError` with all problems of the file or section that `place` names, with lines where they are known.
    """
    try:
        return _adapter(cast(Hashable, kind)).validate_python(raw)
    except (ValidationError, ConfigError) as error:
        raise_problems(place, problems_of(error, kind, raw, lines))
        raise


def problems_in(kind: type, raw: object, lines: Lines = NO_LINES) -> list[str]:
    """What `validate` would raise, for a caller that has more to report of the same file."""
    try:
        _adapter(cast(Hashable, kind)).validate_python(raw)
    except (ValidationError, ConfigError) as error:
        return problems_of(error, kind, raw, lines)
    return []


def validate_json(kind: type[T], content: str | bytes, place: object) -> T:
    """The same of a JSON file, whose values have exactly the types of the fields."""
    try:
        return _adapter(cast(Hashable, kind)).validate_json(content, strict=True)
    except (ValidationError, ConfigError) as error:
        try:
            raw, lines = json.loads(content), json_lines(content if isinstance(content, str) else content.decode())
        except (ValueError, RecursionError):
            raw, lines = None, {}
        raise_problems(place, problems_of(error, kind, raw, lines))
        raise


def problems_of(
    error: ValidationError | ConfigError, kind: Any = None, raw: object = None, lines: Lines = NO_LINES
) -> list[str]:
    """A sentence for each problem. The type tells which keys there are; `raw` is what was validated.

    A `ConfigError` is that of a dataclass whose fields are valid alone, and contradict each other.
    """
    if isinstance(error, ConfigError):
        return [str(error)]
    errors = error.errors(include_url=False)
    for found in errors:
        found["loc"] = tuple(step for step in found["loc"] if step not in _NOT_KEYS)
    unknown = [found["loc"] for found in errors if found["type"] in _UNKNOWN]
    problems = []
    for found in errors:
        path = found["loc"]
        if found["type"] in _UNKNOWN or _follows_from_others(found, errors):
            continue
        if _is_missing(found, raw):
            near = [other for other in unknown if other[:-1] == path[:-1] and _nearest(path[-1], [other[-1]])][:1]
            unknown = [other for other in unknown if other not in near]
            hint = f" ({near[0][-1]!r} is not a key)" if near else ""
            sentence = f"the key {key_path(path)!r} is missing{hint}"
        elif found["type"] == CONTRADICTION:
            sentence = f"{key_path(path)}: {found['msg']}"
        elif found["type"] == "json_invalid":
            sentence = f"not valid JSON ({found['ctx']['error']})"
        else:
            sentence = f"{key_path(path) or 'it'} is {shown_as_json(found['input'])}; expected {_expected(found)}"
        problems.append(with_line(path, sentence, lines))
    return problems + [with_line(path, _unknown_key(path, kind, raw), lines) for path in unknown]


def _follows_from_others(found: ErrorDetails, errors: Sequence[ErrorDetails]) -> bool:
    """Whether an array is too short only because its entries are wrong."""
    path = found["loc"]
    return found["type"] == "too_short" and any(
        len(other["loc"]) > len(path) and other["loc"][: len(path)] == path for other in errors
    )


def _is_missing(found: ErrorDetails, raw: Any) -> bool:
    """Whether a key is absent; where a default is invalid, the table needs the key."""
    for step in found["loc"]:
        if isinstance(raw, dict) and step not in raw:
            return True
        raw = raw[step] if isinstance(raw, dict | list) else None  # type: ignore[index]
    return found["type"] == "missing"


def _expected(found: ErrorDetails) -> str:
    pattern, context = _EXPECTED.get(found["type"]), found.get("ctx", {})
    plural = "y" if context.get("min_length") == 1 else "ies"
    return pattern.format(**context, plural=plural) if pattern else found["msg"].removeprefix("Input should be ")


def _unknown_key(path: KeyPath, kind: Any, raw: Any) -> str:
    for step in path[:-1]:
        raw, kind = raw and raw[step], _type_of(kind, step)
    known = [key for key in get_type_hints(kind) if not key.startswith("_")] if hasattr(kind, "__annotations__") else []
    near = _nearest(path[-1], [key for key in known if not raw or key not in raw])
    hint = f"did you mean {key_path((*path[:-1], near))!r}?" if near else f"the keys are {', '.join(known)}"
    return f"unknown key {shown(key_path(path))}; {hint}"


def _type_of(kind: Any, step: int | str) -> Any:
    """The table below a key of a table, which may be in an array or be optional."""
    if isinstance(step, str):
        kind = get_type_hints(kind)[step]
    return next((inner for inner in get_args(kind) if hasattr(inner, "__annotations__")), kind)


def _nearest(key: object, known: Sequence[object]) -> str | None:
    return next(iter(difflib.get_close_matches(str(key), map(str, known), n=1)), None)


def with_line(path: KeyPath, sentence: str, lines: Lines) -> str:
    """The line of a key, or of the table or array that it is in."""
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)
    return f"line {line}: {sentence}" if line else sentence
