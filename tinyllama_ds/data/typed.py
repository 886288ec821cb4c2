"""JSON objects as dataclasses: what a file says under each key is of the kind that the field is annotated with."""

from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

_LARGEST = 2**63 - 1  # of a whole number: what NumPy counts with


def from_json(kind: Any, value: object, place: str = "") -> Any:
    """`value` as the annotation `kind` says: a dataclass, list, dict, optional or plain type.

    Raises `ValueError`, naming the key, where it is something else.
    """
    inner = get_args(kind)
    match get_origin(kind), value:
        case (_, dict()) if is_dataclass(kind):
            return _fill(kind, value, place)
        case (origin, list()) if origin is list:
            return [from_json(inner[0], entry, f"{place}[{number}]") for number, entry in enumerate(value)]
        case (origin, dict()) if origin is dict:
            return {key: from_json(inner[1], entry, f"{place}.{key:.40}") for key, entry in value.items()}
        case (origin, _) if origin is UnionType:
            return None if value is None else from_json(inner[0], value, place)
    is_number = kind is float and type(value) is int
    if kind is not Any and not is_number and type(value) is not kind:
        raise ValueError(f"{place or 'it'} is {_short(value)}; expected {_name(kind)}")
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{place or 'it'} is beyond 64 bits")
    return value


def _fill(kind: Any, raw: dict, place: str) -> Any:
    before = f"{place}." if place else ""
    hints = get_type_hints(kind)
    needed = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in needed if name not in raw]
    unknown = [name for name in raw if name not in hints]
    if missing or unknown:
        what = f"{before}{missing[0]} is missing" if missing else f"{before}{unknown[0]:.40} is not a key of it"
        raise ValueError(what)
    return kind(**{name: from_json(hints[name], value, f"{before}{name}") for name, value in raw.items()})


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str | float | bool | None) else type(value).__name__
    return text if len(text) <= 40 else f"{text[:37]}..."


def _name(kind: Any) -> str:
    return {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}.get(
        kind, "an array" if get_origin(kind) is list else "an object in braces"
    )
