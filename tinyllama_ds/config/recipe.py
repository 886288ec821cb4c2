"""A recipe: what is trained on what, for how many tokens. Read from TOML, checked, measured in tokens throughout."""

import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field, StrictBool

from tinyllama_ds.config.key_lines import toml_lines
from tinyllama_ds.config.model_table import Model
from tinyllama_ds.config.validation import PositiveNumber, Text, validate, whole_number
from tinyllama_ds.errors import ConfigError, raise_problems, shown
from tinyllama_ds.inputs import read_text
from tinyllama_ds.model.config import MODEL_SIZES

RECIPE_DIRECTORY = Path(__file__).parents[1] / "recipes"
TASK_FILES = (".yaml", ".yml")  # of lm-eval

_Tokens = Annotated[int, whole_number(1, 10**15)]  # more than all text there is; such counts are exact in floats
_Steps = Annotated[int, whole_number(1, 10**12)]
_Count = Annotated[int, whole_number(1, 10**6)]
_Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
_Policy = Literal["log", "skip", "rollback"]
SPIKE_POLICIES = get_args(_Policy)
# The defaults of an optional table are checked as well, so that a table that is there has all keys that it needs.
_OPTIONAL_TABLE = ConfigDict(extra="forbid", validate_default=True)


@dataclass(frozen=True)
class Stage:
    """A part of the run with one batch size and one mixture."""

    name: Text
    tokens: _Tokens
    global_batch_tokens: Annotated[int, whole_number(1, 2**31)]
    weights: Annotated[dict[str, PositiveNumber], Field(min_length=1)]
    ramp_tokens: _Tokens = 0  # over which the mixture changes linearly from the previous stage's to this one


@dataclass(frozen=True)
class Intervals:
    """How often a run logs, evaluates and saves, and which checkpoints it keeps."""

    log_steps: _Steps
    evaluate_tokens: _Tokens
    save_tokens: _Tokens
    save_minutes: _Count = 30  # of wall clock, after which a save is due regardless of tokens
    check_steps: _Steps = 1000  # between two comparisons of the weights over the ranks; every save makes one too
    keep_last: Annotated[int, whole_number(2, 10**6)] = 3  # checkpoints; two, in case one is damaged
    keep_tokens: _Tokens = 100_000_000_000  # one checkpoint for every so many tokens is kept permanently


@dataclass(frozen=True)
class GuardSettings:
    """When a loss or a gradient norm counts as a spike, and what is done about it."""

    spike_policy: _Policy = "log"  # or "skip" the step, or "rollback" to the last checkpoint and exclude its samples
    spike_window: _Count = 128  # steps that a new one is compared with; none is checked before the window is full
    spike_sigmas: PositiveNumber = (
        6.0  # above the window's median, in standard deviations estimated from its absolute deviations
    )
    max_rollbacks: _Count = 3  # of a whole run; then it ends for manual inspection


@dataclass(frozen=True)
class Samples:
    """Texts that the run continues greedily at intervals, for people to see how it learns; none without prompts."""

    __pydantic_config__: ClassVar[ConfigDict] = _OPTIONAL_TABLE
    prompts: _Texts = ()
    every_tokens: _Tokens = 0
    new_tokens: _Count = 0  # that each prompt is continued by


@dataclass(frozen=True)
class Evaluation:
    """What lm-eval scores the model on at intervals during training; nothing without tasks."""

    __pydantic_config__: ClassVar[ConfigDict] = _OPTIONAL_TABLE
    tasks: _Texts = ()  # suites, tasks or groups of lm-eval, and YAML files of tasks
    every_tokens: _Tokens = 0
    limit: Annotated[int, whole_number(1, 10**9)] | None = None  # of documents, the first of each task
    batch_size: Annotated[int, whole_number(1, 100_000)] = 32  # per rank
    data_dir: Text | None = None  # with datasets on disk, so that the hub is not used


@dataclass(frozen=True)
class Teacher:
    """How much a student learns from its teacher, whose logits are cached next to the tokens by `prepare --teacher`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    weight: Annotated[float, Field(strict=True, gt=0, le=1)]  # of the divergence in the loss; the rest is cross-entropy
    temperature: Annotated[float, Field(strict=True, ge=0.1, le=100)] = 1.0  # at which both distributions are compared


@dataclass(frozen=True)
class Recipe:
    """Everything about a run that does not depend on the machines it runs on."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    name: Text
    model: Model
    sequence_length: Annotated[int, whole_number(1, 10_000_000)]
    seed: Annotated[int, whole_number()]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    intervals: Intervals
    validation_samples: Annotated[int, whole_number(1, 10**9)]  # per source
    document_mask: StrictBool = False  # attention inside documents only; TinyLlama's sees all of a packed row
    guard: GuardSettings = GuardSettings()
    samples: Samples = Samples()
    evaluation: Evaluation = Evaluation()
    teacher: Teacher | None = None

    @property
    def sources(self) -> list[str]:
        """All sources of all stages, in the order in which they are first named."""
        return list(dict.fromkeys(name for stage in self.stages for name in stage.weights))

    @property
    def model_name(self) -> str:
        """The name of its size, or "custom"."""
        return next((name for name, size in MODEL_SIZES.items() if size == self.model), "custom")

    def to_dict(self) -> dict:
        """What run.json remembers, with a model of a named size by its name, and without tables that are absent."""
        model = self.model_name if self.model_name in MODEL_SIZES else self.model.to_dict()
        content = asdict(self) | {"model": model}
        return content if self.teacher else {key: value for key, value in content.items() if key != "teacher"}


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
    text = read_text(path, "the recipe")
    try:
        raw = tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid TOML (its arrays or tables are nested too deeply)") from error
    recipe = validate(Recipe, raw, path, toml_lines(text))
    raise_problems(path, _contradictions(recipe))
    return replace(recipe, evaluation=_resolve_paths(path, recipe.evaluation))


def _resolve_paths(path: Path, evaluation: Evaluation) -> Evaluation:
    """Its paths are absolute or relative to the recipe: ranks need not have this process's working directory."""
    here = path.absolute().parent
    tasks = tuple(str(here / name) if name.endswith(TASK_FILES) else name for name in evaluation.tasks)
    return replace(evaluation, tasks=tasks, data_dir=evaluation.data_dir and str(here / evaluation.data_dir))


def _contradictions(recipe: Recipe) -> list[str]:
    """Problems of keys that depend on each other."""
    problems = []
    if recipe.sequence_length > recipe.model.max_position_embeddings:
        problems.append(
            f"sequence_length {recipe.sequence_length} is beyond the {recipe.model.max_position_embeddings} positions"
            f" of model {recipe.model_name!r}"
        )
    for before, stage in zip((None, *recipe.stages), recipe.stages, strict=False):
        if stage.global_batch_tokens % recipe.sequence_length:
            problems.append(
                f"stage {stage.name!r}: global_batch_tokens {stage.global_batch_tokens} is not a multiple of"
                f" sequence_length {recipe.sequence_length}"
            )
        if stage.ramp_tokens and before is None:
            problems.append(f"stage {stage.name!r}: ramp_tokens, but it is the first stage; expected it in a later one")
        if stage.ramp_tokens > stage.tokens:
            problems.append(f"stage {stage.name!r}: ramp_tokens {stage.ramp_tokens} exceed its {stage.tokens} tokens")
    for source in recipe.sources:
        if source != Path(source).name or source.startswith(".") or "\0" in source or not source.strip():
            problems.append(f"{shown(source)} is not the name of a source, which is a folder of the data directory")
    return problems
