"""A recipe: what is trained on what, for how many tokens. Read from TOML, checked, measured in tokens throughout."""

import difflib
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from tinyllama_ds.errors import Refusal

RECIPE_DIRECTORY = Path(__file__).parent / "recipes"
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
            raise Refusal(f"recipe {name_or_path!r} is unknown; the shipped ones are {shipped}, or give a .toml file")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refusal(f"{path}: the recipe is missing") from error
    except ValueError as error:
        raise Refusal(f"{path}: not valid TOML ({error})") from error
    return _parse(raw, path)


def _parse(raw: dict, path: Path) -> Recipe:
    top = _Table(raw, str(path))
    stages = tuple(
        _parse_stage(_Table(entry, f"{path}: stages[{number}]")) for number, entry in enumerate(top.tables("stages"))
    )
    recipe = Recipe(
        name=top.text("name"),
        model=top.text("model"),
        sequence_length=top.positive("sequence_length"),
        seed=top.whole("seed"),
        stages=stages,
        intervals=_parse_intervals(_Table(top.table("intervals"), f"{path}: intervals")),
        validation_samples=top.positive("validation_samples"),
        document_mask=top.switch("document_mask") if top.holds("document_mask") else False,
        guard=_parse_guard(_Table(top.table("guard") if top.holds("guard") else {}, f"{path}: guard")),
        samples=_parse_samples(_Table(top.table("samples"), f"{path}: samples")) if top.holds("samples") else Samples(),
        evaluation=_parse_evaluation(top, path) if top.holds("evaluation") else Evaluation(),
    )
    top.finish()
    _check(recipe, path)
    return recipe


def _parse_intervals(table: "_Table") -> Intervals:
    required = {key: table.positive(key) for key in ("log_steps", "evaluate_tokens", "save_tokens")}
    optional = ("save_minutes", "check_steps", "keep_last", "keep_tokens")
    intervals = Intervals(**required, **{key: table.positive(key) for key in optional if table.holds(key)})
    table.finish()
    if intervals.keep_last < 2:
        raise Refusal(f"{table.place}: keep_last is {intervals.keep_last}; expected 2 or more, in case one is damaged")
    return intervals


def _parse_guard(table: "_Table") -> GuardSettings:
    readers: dict[str, Callable[[str], Any]] = {
        "spike_policy": table.text,
        "spike_window": table.positive,
        "spike_sigmas": table.number,
        "max_rollbacks": table.positive,
    }
    guard = GuardSettings(**{key: read(key) for key, read in readers.items() if table.holds(key)})
    table.finish()
    if guard.spike_policy not in SPIKE_POLICIES:
        raise Refusal(f"{table.place}: spike_policy is {guard.spike_policy!r}; expected {', '.join(SPIKE_POLICIES)}")
    return guard


def _parse_samples(table: "_Table") -> Samples:
    samples = Samples(tuple(table.texts("prompts")), table.positive("every_tokens"), table.positive("new_tokens"))
    table.finish()
    return samples


def _parse_evaluation(top: "_Table", path: Path) -> Evaluation:
    """Its paths are absolute or beside the recipe: ranks need not have this process's working directory."""
    table = _Table(top.table("evaluation"), f"{path}: evaluation")
    here = path.absolute().parent
    evaluation = Evaluation(
        tasks=tuple(str(here / name) if name.endswith(TASK_FILES) else name for name in table.texts("tasks")),
        every_tokens=table.positive("every_tokens"),
        limit=table.positive("limit") if table.holds("limit") else None,
        batch_size=table.positive("batch_size") if table.holds("batch_size") else Evaluation.batch_size,
        data_dir=str(here / table.text("data_dir")) if table.holds("data_dir") else None,
    )
    table.finish()
    return evaluation


def _parse_stage(table: "_Table") -> Stage:
    weights = table.table("weights")
    for source, weight in weights.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise Refusal(f"{table.place}: the weight of {source!r} is {weight!r}; expected a positive number")
    if not weights:
        raise Refusal(f"{table.place}: weights name no source")
    stage = Stage(
        name=table.text("name"),
        tokens=table.positive("tokens"),
        global_batch_tokens=table.positive("global_batch_tokens"),
        weights=weights,
        ramp_tokens=table.positive("ramp_tokens") if table.holds("ramp_tokens") else 0,
    )
    table.finish()
    return stage


def _check(recipe: Recipe, path: Path) -> None:
    for stage in recipe.stages:
        if stage.global_batch_tokens % recipe.sequence_length:
            raise Refusal(
                f"{path}: stage {stage.name!r}: global_batch_tokens {stage.global_batch_tokens} is not a multiple of"
                f" sequence_length {recipe.sequence_length}"
            )
    for before, stage in zip((None, *recipe.stages), recipe.stages, strict=False):
        if stage.ramp_tokens and before is None:
            raise Refusal(f"{path}: stage {stage.name!r}: ramp_tokens, but there is no stage before it to ramp from")
        if stage.ramp_tokens > stage.tokens:
            raise Refusal(
                f"{path}: stage {stage.name!r}: ramp_tokens {stage.ramp_tokens} exceed its {stage.tokens} tokens"
            )
    for source in recipe.sources:
        if source != Path(source).name or source.startswith("."):
            raise Refusal(f"{path}: {source!r} is not the name of a source, which is a folder of the data directory")


class _Table:
    """A TOML table that is read key by key, and refuses what is missing, of the wrong kind, or left over."""

    def __init__(self, raw: dict, place: str) -> None:
        self._raw = dict(raw)
        self._known: list[str] = []
        self.place = place

    def _take(self, key: str, kind: type | UnionType, expected: str) -> Any:
        self._known.append(key)
        if key not in self._raw:
            close = difflib.get_close_matches(key, self._raw, n=1)
            hint = f" ({close[0]!r} is not a key)" if close else ""
            raise Refusal(f"{self.place}: the key {key!r} is missing{hint}")
        value = self._raw.pop(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Refusal(f"{self.place}: {key} is {value!r}; expected {expected}")
        return value

    def holds(self, key: str) -> bool:
        """Whether a key that may be left out is there."""
        self._known.append(key)
        return key in self._raw

    def text(self, key: str) -> str:
        return self._take(key, str, "a text")

    def texts(self, key: str) -> list[str]:
        value = self._take(key, list, "an array of texts")
        if not value or not all(isinstance(entry, str) and entry for entry in value):
            raise Refusal(f"{self.place}: {key} is {value!r}; expected an array of texts, none of them empty")
        return value

    def whole(self, key: str) -> int:
        return self._take(key, int, "a whole number")

    def positive(self, key: str) -> int:
        value = self.whole(key)
        if value < 1:
            raise Refusal(f"{self.place}: {key} is {value}; expected 1 or more")
        return value

    def number(self, key: str) -> float:
        value = self._take(key, int | float, "a number")
        if not 0 < value < float("inf"):
            raise Refusal(f"{self.place}: {key} is {value}; expected a positive number")
        return float(value)

    def switch(self, key: str) -> bool:
        self._known.append(key)
        value = self._raw.pop(key)
        if not isinstance(value, bool):
            raise Refusal(f"{self.place}: {key} is {value!r}; expected true or false")
        return value

    def table(self, key: str) -> dict:
        return self._take(key, dict, "a table")

    def tables(self, key: str) -> list[dict]:
        value = self._take(key, list, "an array of tables")
        if not value or not all(isinstance(entry, dict) for entry in value):
            raise Refusal(f"{self.place}: {key} is empty or holds something else than tables")
        return value

    def finish(self) -> None:
        for key in self._raw:
            close = difflib.get_close_matches(key, self._known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the keys are {', '.join(self._known)}"
            raise Refusal(f"{self.place}: unknown key {key!r}{hint}")
