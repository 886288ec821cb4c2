"""Which keys of DeepSpeed's JSON there are, and the values that they may have: read from `deepspeed_keys.toml`."""

import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

AUTO = "auto"
_FILE = Path(__file__).with_name("deepspeed_keys.toml")


@dataclass(frozen=True)
class Key:
    """A key that is accepted: its effect, its values, whether "auto" is filled, and the ZeRO stages where it counts."""

    effect: str
    type: str = "enum"
    enum: tuple = ()
    minimum: float = 0
    maximum: float = math.inf
    exclusive_minimum: float = -math.inf
    exclusive_maximum: float = math.inf
    auto: bool = False
    stages: tuple[int, ...] = (0, 1, 2, 3)
    optimizers: tuple[str, ...] = ()  # that have this parameter, in lower case; empty: all
    schedulers: tuple[str, ...] = ()  # that have this parameter
    required_by: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)  # values in any case, and what each is
    rejected: Mapping[str, str] = field(default_factory=dict)  # other names, and why

    @property
    def expectation(self) -> str:
        """What to write, as in "expected ..."."""
        return _TYPES[self.type][0](self) + (' or "auto"' if self.auto else "")

    @property
    def is_whole(self) -> bool:
        """Whether numbers are ints, however the JSON writes them: 5e8."""
        return self.type in ("integer", "steps")

    def accepts(self, value: Any) -> bool:
        """Whether a value of the JSON has the type and the range."""
        return (self.auto and value == AUTO) or _TYPES[self.type][1](self, value)

    def why_not(self, value: Any) -> str:
        """Why a name is rejected; empty for any other value."""
        return next((why for name, why in self.rejected.items() if _is_name(value, [name])), "")


def _is_name(value: Any, names: Iterable[str]) -> bool:
    """As DeepSpeed reads it: in any case."""
    return isinstance(value, str) and value.lower() in map(str.lower, names)


def _describe_enum(key: Key) -> str:
    *others, last = map(str, key.enum or key.names)
    return f"{', '.join(others)} or {last}" if others else last


def _describe_number(key: Key) -> str:
    low = f"more than {key.exclusive_minimum:g}" if key.exclusive_minimum == 0 else f"{key.minimum:g} or more"
    high = f" and less than {key.exclusive_maximum:g}" if key.exclusive_maximum < math.inf else ""
    return f"a number of {low}{high}"


def _describe_integer(key: Key) -> str:
    if key.maximum == math.inf:
        return f"a whole number of {key.minimum} or more"
    return f"a whole number from {key.minimum} to {key.maximum:,}"


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def _is_within(key: Key, value: Any) -> bool:
    return (
        _is_number(value)
        and key.minimum <= value <= key.maximum
        and key.exclusive_minimum < value < key.exclusive_maximum
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_whole(key: Key, value: Any) -> bool:
    return _is_within(key, value) and value <= 2**62 and int(value) == value


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


# The types of `deepspeed_keys.toml`, in words and as a predicate.
_TYPES: dict[str, tuple[Callable[[Key], str], Callable[[Key, Any], bool]]] = {
    "switch": (lambda key: "true or false", lambda key, v: isinstance(v, bool)),
    # By type as well: True == 1 in Python.
    "enum": (_describe_enum, lambda key, v: any(type(v) is type(value) and v == value for value in key.enum)),
    "number": (_describe_number, _is_within),
    "integer": (_describe_integer, _is_whole),
    "steps": (
        lambda key: "a whole number of 0 or more, a list of them",
        lambda key, v: (
            _is_whole(key, v) or (v != [] and _is_list(v, lambda one: isinstance(one, int) and _is_whole(key, one)))
        ),
    ),
    "ratio": (lambda key: "a number from 0 to 1", lambda key, v: _is_number(v) and 0 <= v <= 1),
    "betas": (
        lambda key: "two numbers of 0 or more and less than 1",
        lambda key, v: _is_list(v, lambda beta: _is_number(beta) and 0 <= beta < 1) and len(v) == 2,
    ),
    "text": (lambda key: "a text", lambda key, v: _is_text(v)),
    "names": (lambda key: "a list of names", lambda key, v: _is_list(v, _is_text)),
    "groups": (
        lambda key: "a list of groups in braces, each with params",
        lambda key, v: _is_list(v, lambda group: isinstance(group, dict)) and len(v) > 0,
    ),
    "optimizer": (_describe_enum, lambda key, v: _is_name(v, key.names)),
    "recipe": (lambda key: '"auto" or nothing, because the recipe decides it', lambda key, v: v == AUTO),
}


@dataclass(frozen=True)
class KeyTables:
    """All keys in full, such as `optimizer.params.lr`; rejected ones with the reason and what to use."""

    supported: dict[str, Key]
    warned: dict[str, Key]
    rejected: dict[str, str]
    on_by_default: frozenset[str]  # of the rejected keys

    @cached_property
    def accepted(self) -> dict[str, Key]:
        return self.supported | self.warned

    @cached_property
    def sections(self) -> frozenset[str]:
        """The sections that have an accepted key."""
        return frozenset(full[:place] for full in self.accepted for place, sign in enumerate(full) if sign == ".")

    def is_off(self, full: str, value: Any) -> bool:
        """Whether a rejected key is switched off, as other programs' files have it: false, or a section with
        `"enabled": false`.
        """
        off = value is False or (isinstance(value, dict) and value.get("enabled") is False)
        return off and full not in self.on_by_default


@cache
def key_tables() -> KeyTables:
    """The tables of `deepspeed_keys.toml`."""
    raw = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    supported, warned = (
        {full: Key(**_as_tuples(entry)) for full, entry in _entries(raw[table])} for table in ("supported", "warned")
    )
    return KeyTables(supported, warned, dict(_entries(raw["rejected"])), frozenset(raw["on_by_default"]))


def _entries(section: dict, name: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and "effect" not in value:
            yield from _entries(value, f"{name}{key}.")
        else:
            yield f"{name}{key}", value


def _as_tuples(entry: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
