"""A recipe: what is trained on what, for how many tokens. Read from TOML, checked, measured in tokens throughout."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, ValidationInfo

from tinyllama_ds.config.key_lines import read_toml
from tinyllama_ds.config.model_table import Model
from tinyllama_ds.config.validation import (
    Lines,
    PositiveNumber,
    Text,
    expectation,
    problems_in,
    validate,
    whole_number,
    with_line,
)
from tinyllama_ds.errors import raise_problems
from tinyllama_ds.model.config import MODEL_SIZES, LlamaConfig, Mup
from tinyllama_ds.shipped import shipped_toml

RECIPE_DIRECTORY = Path(__file__).parents[1] / "recipes"
TASK_FILES = (".yaml", ".yml")  # of lm-eval

_MOST_SEQUENCE_TOKENS = 10_000_000
_Tokens = Annotated[int, whole_number(1, 10**15)]  # more than all text there is; such counts are exact in floats
_Steps = Annotated[int, whole_number(1, 10**12)]
_Count = Annotated[int, whole_number(1, 10**6)]
_Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
_Policy = Literal["log", "skip", "rollback"]
SPIKE_POLICIES = get_args(_Policy)
Packing = Literal["concatenate", "best_fit"]  # of documents into rows of a sequence length
CONCATENATE, BEST_FIT = get_args(Packing)
# The defaults of an optional table are checked as well, so that a table that is there has all keys that it needs.
_OPTIONAL_TABLE = ConfigDict(extra="forbid", validate_default=True)


def _source(name: str) -> str:
    if name != Path(name).name or name.startswith(".") or "\0" in name or not name.strip():
        raise expectation("the name of a source, which is a folder of the data directory")
    return name


def _within_the_stage(ramp_tokens: int, info: ValidationInfo) -> int:
    tokens = info.data.get("tokens", ramp_tokens)
    if ramp_tokens > tokens:
        raise expectation(f"at most the {tokens} tokens of the stage")
    return ramp_tokens


def _within_the_positions(sequence_length: int, info: ValidationInfo) -> int:
    model: LlamaConfig | None = info.data.get("model")
    if model and sequence_length > model.max_position_embeddings:
        raise expectation(f"at most the {model.max_position_embeddings} positions of model {_name_of(model)!r}")
    return sequence_length


def _only_with_a_document_mask(packing: str, info: ValidationInfo) -> str:
    if packing == BEST_FIT and info.data.get("document_mask") is False:
        raise expectation('"concatenate", or document_mask = true as well, as the documents of a row are unrelated')
    return packing


def _name_of(model: LlamaConfig) -> str:
    return next((name for name, size in MODEL_SIZES.items() if size == model), "custom")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the run with one batch size and one mixture."""

    name: Text = "pretraining"
    tokens: _Tokens
    global_batch_tokens: Annotated[int, whole_number(1, 2**31)] = 2**19
    weights: Annotated[dict[Annotated[str, AfterValidator(_source)], PositiveNumber], Field(min_length=1)]
    # Tokens over which the mixture changes linearly from the previous stage's to this one.
    ramp_tokens: Annotated[_Tokens, AfterValidator(_within_the_stage)] = 0


@dataclass(frozen=True)
class Intervals:
    """How often a run logs, evaluates and saves, and which checkpoints it keeps."""

    log_steps: _Steps = 10
    evaluate_tokens: _Tokens = 100_000_000
    save_tokens: _Tokens = 500_000_000
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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a run that does not depend on the machines it runs on.

    Only the model, and the tokens and sources of each stage, have no default.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    name: Text
    model: Model
    sequence_length: Annotated[int, whole_number(1, _MOST_SEQUENCE_TOKENS), AfterValidator(_within_the_positions)] = (
        2048
    )
    seed: Annotated[int, whole_number()] = 3407  # TinyLlama's
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    intervals: Intervals = Intervals()
    validation_samples: Annotated[int, whole_number(1, 10**9)] = 512  # per source
    document_mask: StrictBool = False  # attention inside documents only; TinyLlama's sees all of a packed row
    # Rows are the concatenated documents cut every `sequence_length` tokens, or whole documents packed by best fit.
    packing: Annotated[Packing, AfterValidator(_only_with_a_document_mask)] = "concatenate"
    guard: GuardSettings = GuardSettings()
    samples: Samples = Samples()
    evaluation: Evaluation = Evaluation()
    teacher: Teacher | None = None
    mup: Mup | None = None  # becomes the model's

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", replace(self.model, mup=self.mup))  # although frozen

    @property
    def sources(self) -> list[str]:
        """All sources of all stages, in the order in which they are first named."""
        return list(dict.fromkeys(name for stage in self.stages for name in stage.weights))

    @property
    def model_name(self) -> str:
        """The name of its size, or "custom"."""
        return _name_of(replace(self.model, mup=None))

    def to_dict(self) -> dict:
        """What run.json remembers, with a model of a named size by its name, and without tables that are absent.

        Keys of later versions are in it only if they are used, so that an older run keeps its identity.
        """
        model = replace(self.model, mup=None)
        content = asdict(self) | {"model": self.model_name if self.model_name in MODEL_SIZES else model.to_dict()}
        unused = {"packing": CONCATENATE}
        return {key: value for key, value in content.items() if value is not None and value != unused.get(key)}


def recipe_of_run(description: dict) -> Recipe:
    """The recipe in a run's description (`run.json`); raises KeyError or TypeError where there is none."""
    raw, tables = description["recipe"], {"intervals": Intervals, "guard": GuardSettings, "samples": Samples}
    model = raw["model"]
    values = raw | {
        "model": MODEL_SIZES[model] if isinstance(model, str) else validate(LlamaConfig, model, "model"),
        "stages": tuple(Stage(**stage) for stage in raw["stages"]),
    }
    values |= {
        key: table(**raw[key])
        for key, table in (tables | {"evaluation": Evaluation, "teacher": Teacher, "mup": Mup}).items()
        if key in raw
    }
    return Recipe(**values)


def recipe_path(name_or_path: str) -> Path:
    """The TOML file of a shipped recipe, or of one of the user's own."""
    return shipped_toml(name_or_path, "recipe", RECIPE_DIRECTORY)


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by its name, or one of the user's own by the path of its TOML file."""
    path = recipe_path(name_or_path)
    raw, lines = read_toml(path, "the recipe")
    raw.setdefault("name", path.stem)
    raise_problems(path, problems_in(Recipe, raw, lines) + _contradictions(raw, lines))
    recipe = validate(Recipe, raw, path)
    return replace(recipe, evaluation=_resolve_paths(path, recipe.evaluation))


def _resolve_paths(path: Path, evaluation: Evaluation) -> Evaluation:
    """Its paths are absolute or relative to the recipe: ranks need not have this process's working directory."""
    here = path.absolute().parent
    tasks = tuple(str(here / name) if name.endswith(TASK_FILES) else name for name in evaluation.tasks)
    return replace(evaluation, tasks=tasks, data_dir=evaluation.data_dir and str(here / evaluation.data_dir))


def _contradictions(raw: dict, lines: Lines) -> list[str]:
    """Stages that are valid alone, and not in this recipe; other keys of it may be invalid as well."""
    problems = []
    match raw:
        case {"stages": [{"ramp_tokens": int(ramp)}, *_]} if ramp > 0:
            sentence = f"stages[0].ramp_tokens is {ramp}; expected it in a later stage, as none is before the first"
            problems.append(with_line(("stages", 0, "ramp_tokens"), sentence, lines))
    length, stages = raw.get("sequence_length", Recipe.sequence_length), raw.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) and isinstance(length, int) else []):
        match {"global_batch_tokens": Stage.global_batch_tokens} | stage if isinstance(stage, dict) else {}:
            case {"global_batch_tokens": int(batch)} if 0 < length <= _MOST_SEQUENCE_TOKENS and batch % length:
                key = f"stages[{number}].global_batch_tokens"
                sentence = f"{key} is {batch}; expected a multiple of sequence_length {length}"
                problems.append(with_line(("stages", number, "global_batch_tokens"), sentence, lines))
    return problems
