"""A recipe: what is trained on what, for how many tokens. Read from TOML, checked, measured in tokens throughout."""

import difflib
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tinyllama_ds.errors import ConfigError, raise_problems, shown
from tinyllama_ds.inputs import read_text

RECIPE_DIRECTORY = Path(__file__).parents[1] / "recipes"
TASK_FILES = (".yaml", ".yml")  # of lm-eval


@dataclass(frozen=True)
class Stage:
    """A stretch of the run with one batch size and one mixture."""

    name: str
    tokens: int
    global_batch_tokens: int
    weights: dict[str, float]
    ramp_tokens: int = 0  # over which the mixture goes linearly from the stage before to this one


@dataclass(frozen=True)
class Intervals:
    """How often a run speaks, measures itself and saves, and which checkpoints stay."""

    log_steps: int
    evaluate_tokens: int
    save_tokens: int
    save_minutes: int = 30  # of wall clock, after which a save is due whatever the tokens say
    check_steps: int = 1000  # between two comparisons of the weights over the ranks; every save makes one too
    keep_last: int = 3  # checkpoints
    keep_tokens: int = 100_000_000_000  # one checkpoint for every so many tokens stays for ever


SPIKE_POLICIES = ("log", "skip", "rollback")


@dataclass(frozen=True)
class GuardSettings:
    """When a loss or a gradient norm counts as a spike, and what is done about it."""

    spike_policy: str = "log"  # or "skip" the step, or "rollback" to the last checkpoint and leave its samples out
    spike_window: int = 128  # steps that a new one is compared with; none is judged before the window is full
    spike_sigmas: float = (
        6.0  # above the window's median, in standard deviations estimated from its absolute deviations
    )
    max_rollbacks: int = 3  # of a whole run, then it ends for a human to look


@dataclass(frozen=True)
class Samples:
    """Texts that the run continues now and then, greedily, for people to see how it learns; none without prompts."""

    prompts: tuple[str, ...] = ()
    every_tokens: int = 0
    new_tokens: int = 0  # that each prompt is continued by


@dataclass(frozen=True)
class Evaluation:
    """What lm-eval scores the model on, now and then while it is trained; nothing without tasks."""

    tasks: tuple[str, ...] = ()  # suites, tasks or groups of lm-eval, and YAML files of tasks
    every_tokens: int = 0
    limit: int | None = None  # of documents, the first of each task
    batch_size: int = 32  # per rank
    data_dir: str | None = None  # with datasets on disk; the hub is left alone


@dataclass(frozen=True)
class Recipe:
    """Everything about a run that does not depend on the machines it runs on."""

    name: str
    model: str
    sequence_length: int
    seed: int
    stages: tuple[Stage, ...]
    intervals: Intervals
    validation_samples: int  # per source
    document_mask: bool = False  # attention inside documents only; TinyLlama's sees all of a packed row
    guard: GuardSettings = GuardSettings()
    samples: Samples = Samples()
    evaluation: Evaluation = Evaluation()

    @property
    def sources(self) -> list[str]:
        """All sources of all stages, in the order in which they are first named."""
        return list(dict.fromkeys(name for stage in self.stages for name in stage.weights))

    def to_dict(self) -> dict:
        return asdict(self)


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by its name, or one of the user's own by the path of its TOML file."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = RECIPE_DIRECTORY / f"{name_or_path}.toml"
        if not path.is_file():
            shipped = ", ".join(sorted(file.stem for file in RECIPE_DIRECTORY.glob("*.toml")))
            raise ConfigError(
                f"recipe {shown(name_or_path)} is unknown; the shipped ones are {shipped}, or give a .toml file"
            )
    try:
        raw = tomllib.loads(read_text(path, "the recipe"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid TOML (its arrays or tables are nested too deeply)") from error
    return _parse(raw, path)


def _parse(raw: dict, path: Path) -> Recipe:
    problems: list[str] = []
    recipe = _read(Recipe, raw, "", problems)
    raise_problems(path, problems)
    raise_problems(path, _contradictions(recipe))
    return replace(recipe, evaluation=_beside(path, recipe.evaluation))


def _beside(path: Path, evaluation: Evaluation) -> Evaluation:
    """Its paths are absolute or beside the recipe: ranks need not have this process's working directory."""
    here = path.absolute().parent
    tasks = tuple(str(here / name) if name.endswith(TASK_FILES) else name for name in evaluation.tasks)
    return replace(evaluation, tasks=tasks, data_dir=evaluation.data_dir and str(here / evaluation.data_dir))


_Rule = Callable[[str, Any], list[str]]  # of a key and its value: what is wrong with them


def _expect(name: str, value: Any, expected: str) -> list[str]:
    return [f"{name} is {shown(value)}; expected {expected}"]


def _whole(least: int, most: int) -> _Rule:
    def rule(name: str, value: Any) -> list[str]:
        if type(value) is not int:
            return _expect(name, value, "a whole number")
        return _expect(name, value, f"{least} or more") if value < least else _at_most(name, value, most)

    return rule


def _at_most(name: str, value: float, most: float) -> list[str]:
    return [] if value <= most else _expect(name, value, f"{most:,} or less")


def _positive(name: str, value: Any) -> list[str]:
    """A number that can be divided by and into others of its kind."""
    if type(value) not in (int, float):
        return _expect(name, value, "a number")
    return _at_most(name, value, 1e9) if value >= 1e-9 else _expect(name, value, "a positive number")


def _text(name: str, value: Any) -> list[str]:
    return [] if _is_text(value) else _expect(name, value, "a text")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, list) and value and all(map(_is_text, value)):
        return []
    return _expect(name, value, "an array of texts, none of them empty")


def _switch(name: str, value: Any) -> list[str]:
    return [] if isinstance(value, bool) else _expect(name, value, "true or false")


def _policy(name: str, value: Any) -> list[str]:
    return [] if value in SPIKE_POLICIES else _expect(name, value, ", ".join(SPIKE_POLICIES))


def _weights(name: str, value: Any) -> list[str]:
    if not isinstance(value, dict):
        return _expect(name, value, "a table of sources with their weights")
    if not value:
        return [f"{name} name no source"]
    return [
        problem for source, weight in value.items() for problem in _positive(f"the weight of {shown(source)}", weight)
    ]


_TOKENS = _whole(1, 10**15)  # more than all text there is; and counts of tokens stay exact in floats
_STEPS = _whole(1, 10**12)

# What the keys of each table hold: a rule, a table of its own, or an array of tables. Those without a default in the
# dataclass have to be there.
_KEYS: dict[type, dict[str, "_Rule | type | list[type]"]] = {
    Recipe: {
        "name": _text,
        "model": _text,
        "sequence_length": _whole(1, 10_000_000),
        "seed": _whole(0, 2**63 - 1),
        "validation_samples": _whole(1, 10**9),
        "document_mask": _switch,
        "stages": [Stage],
        "intervals": Intervals,
        "guard": GuardSettings,
        "samples": Samples,
        "evaluation": Evaluation,
    },
    Stage: {
        "name": _text,
        "tokens": _TOKENS,
        "global_batch_tokens": _whole(1, 2**31),
        "weights": _weights,
        "ramp_tokens": _TOKENS,
    },
    Intervals: {
        "log_steps": _STEPS,
        "evaluate_tokens": _TOKENS,
        "save_tokens": _TOKENS,
        "save_minutes": _whole(1, 10**6),
        "check_steps": _STEPS,
        "keep_last": _whole(2, 10**6),  # in case one is damaged
        "keep_tokens": _TOKENS,
    },
    GuardSettings: {
        "spike_policy": _policy,
        "spike_window": _whole(1, 10**6),
        "spike_sigmas": _positive,
        "max_rollbacks": _whole(1, 10**6),
    },
    Samples: {"prompts": _texts, "every_tokens": _TOKENS, "new_tokens": _whole(1, 10**6)},
    Evaluation: {
        "tasks": _texts,
        "every_tokens": _TOKENS,
        "limit": _whole(1, 10**9),
        "batch_size": _whole(1, 100_000),
        "data_dir": _text,
    },
}
_REQUIRED = {
    Samples: ("prompts", "every_tokens", "new_tokens"),
    Evaluation: ("tasks", "every_tokens"),
}  # once it is there


def _read(kind: type, raw: dict, place: str, problems: list[str]) -> Any:
    """The object of a table, or None where its problems were added to those of the file."""
    before, rules = len(problems), _KEYS[kind]
    where = f"{place}: " if place else ""
    found = {}
    for name in [name for name in rules if name in raw]:
        found[name], wrong = _value(rules[name], name, raw[name], f"{place}." if place else "", problems)
        problems += [f"{where}{problem}" for problem in wrong]
    required = _REQUIRED.get(kind) or [field.name for field in fields(kind) if _has_no_default(field)]
    missing = [name for name in required if name not in raw]
    problems += [f"{where}{problem}" for problem in _wrong_names(list(raw), list(rules), missing)]
    return kind(**found) if len(problems) == before else None


def _has_no_default(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _value(
    rule: "_Rule | type | list[type]", name: str, value: Any, prefix: str, problems: list[str]
) -> tuple[Any, list[str]]:
    """What a key holds, and what is wrong with it; of tables below it that goes to `problems`, with their places."""
    if isinstance(rule, type):
        if isinstance(value, dict):
            return _read(rule, value, f"{prefix}{name}", problems), []
        return None, _expect(name, value, "a table")
    if isinstance(rule, list):
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            entries = enumerate(value)
            return tuple(_read(rule[0], entry, f"{prefix}{name}[{n}]", problems) for n, entry in entries), []
        return None, _expect(name, value, "an array of tables")
    return tuple(value) if isinstance(value, list) else value, rule(name, value)


def _wrong_names(given: list[str], known: list[str], missing: list[str]) -> list[str]:
    """Keys that are missing, each with what may stand in its place, and those that are none."""
    problems, unknown = [], [name for name in given if name not in known]
    for name in missing:
        close = difflib.get_close_matches(name, unknown, n=1)
        problems.append(f"the key {name!r} is missing{f' ({close[0]!r} is not a key)' if close else ''}")
        unknown = [other for other in unknown if other not in close]
    for name in unknown:
        close = difflib.get_close_matches(name, [key for key in known if key not in given], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
        problems.append(f"unknown key {shown(name)}; {hint}")
    return problems


def _contradictions(recipe: Recipe) -> list[str]:
    """What is wrong with keys beside each other."""
    problems = []
    for before, stage in zip((None, *recipe.stages), recipe.stages, strict=False):
        if stage.global_batch_tokens % recipe.sequence_length:
            problems.append(
                f"stage {stage.name!r}: global_batch_tokens {stage.global_batch_tokens} is not a multiple of"
                f" sequence_length {recipe.sequence_length}"
            )
        if stage.ramp_tokens and before is None:
            problems.append(f"stage {stage.name!r}: ramp_tokens, but there is no stage before it to ramp from")
        if stage.ramp_tokens > stage.tokens:
            problems.append(f"stage {stage.name!r}: ramp_tokens {stage.ramp_tokens} exceed its {stage.tokens} tokens")
    for source in recipe.sources:
        if source != Path(source).name or source.startswith(".") or not _is_text(source):
            problems.append(f"{shown(source)} is not the name of a source, which is a folder of the data directory")
    return problems
