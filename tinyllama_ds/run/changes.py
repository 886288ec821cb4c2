"""What differs between a run that is there and the one that is asked for, and what of it is allowed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_ds.errors import ConfigError

ABSENT = "absent"
# What decides the result of a run; a directory that holds other values of these holds another run.
_IDENTITY = ("recipe", "deepspeed_config", "model", "data", "order_version", "init_from")
_FREE = {  # may change from start to start
    "recipe": ("intervals", "validation_samples", "samples", "evaluation"),
    "deepspeed_config": (
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "zero_optimization",
        "tensorboard",
    ),
    "init_from": ("path",),
}
_FIXED = ("model", "order_version")  # no checkpoint can be continued with others
_WIDTH = 80  # of a printed value
_MOST = 20  # printed changes


@dataclass(frozen=True)
class Change:
    """One value that is another one now. The key is what `--allow-change` takes."""

    key: str
    there: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} is {_short(self.there)} there and {_short(self.now)} now"

    def is_below(self, key: str) -> bool:
        """Whether a key names this value or a table that it is in."""
        return f"{self.key}.".startswith(f"{key}.")


def identity_of(description: dict) -> dict:
    """The part of a run's description (`run.json`) that decides its result."""
    identity = {key: description.get(key, ABSENT) for key in _IDENTITY}
    for key, free in _FREE.items():
        if isinstance(identity[key], dict):
            identity[key] = {name: value for name, value in identity[key].items() if name not in free}
    stages = description.get("recipe", {}).get("stages", [])
    names = (name for stage in stages for name in stage.get("weights", {}))
    identity["sources"] = list(dict.fromkeys(names))  # their order decides ties
    return identity


def _short(value: Any) -> str:
    text = ABSENT if value == ABSENT else json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def changes_between(there: Any, now: Any, key: str = "") -> Iterator[Change]:
    """All leaves of two JSON values that differ, each under its dotted key; entries of lists are keyed by number."""
    if isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        there, now = ({str(number): entry for number, entry in enumerate(entries)} for entries in (there, now))
    if isinstance(there, dict) and isinstance(now, dict):
        for name in sorted(there.keys() | now.keys()):
            inner = f"{key}.{name}" if key else name
            yield from changes_between(there.get(name, ABSENT), now.get(name, ABSENT), inner)
    elif there != now:
        yield Change(key, there, now)


def reject_changes(changes: Sequence[Change], allowed: Sequence[str], what: str, instead: str) -> None:
    """Raises `ConfigError` with every change that is not allowed by its name or by the name of a table around it.

    `what` is there that differs, and `instead` is what to do about it.
    """
    fixed = [change for change in changes if any(change.is_below(key) for key in _FIXED)]
    if fixed:
        raise ConfigError(f"{what}: {_list(fixed)}; no run can change that, {instead}")
    refused = [change for change in changes if not any(change.is_below(key) for key in allowed)]
    if refused:
        names = dict.fromkeys("data" if change.is_below("data") else change.key for change in refused)
        raise ConfigError(
            f"{what}: {_list(refused)}; {instead}, or go on all the same with"
            f" {' '.join(f'--allow-change {name}' for name in names)}"
        )


def _list(changes: Sequence[Change]) -> str:
    more = len(changes) - _MOST
    return "; ".join(map(str, changes[:_MOST])) + (f"; and {more} more" if more > 0 else "")
