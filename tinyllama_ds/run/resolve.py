"""One run, resolved: recipe, DeepSpeed config, data and machines put together and checked before anything starts.

Nothing here writes, and nothing here imports deepspeed.
"""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tinyllama_ds import __version__
from tinyllama_ds.checkpoint.description import tokenizer_sha256_of
from tinyllama_ds.checkpoint.initial_weights import InitialWeights, open_initial_weights
from tinyllama_ds.config.ablation import Ablation
from tinyllama_ds.config.deepspeed import (
    AutoValues,
    computes_in_16_bit,
    load_deepspeed_config,
    requested_micro_batch,
    resolve_deepspeed_config,
    split_off_our_sections,
)
from tinyllama_ds.config.param_groups import check_optimizer
from tinyllama_ds.config.recipe import Recipe, load_recipe
from tinyllama_ds.config.run_plan import RunPlan, data_parallel_size, micro_batch_of
from tinyllama_ds.config.schedule import Schedule, make_schedule
from tinyllama_ds.data.loader import SampleReader, open_streams
from tinyllama_ds.data.order import ORDER_VERSION, SampleOrder, planned_order
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.data.teacher import TeacherCache
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import stored_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.tasks import load_tasks
from tinyllama_ds.evaluation.validation import ValidationSet
from tinyllama_ds.hardware.devices import PACKAGES, installed_versions
from tinyllama_ds.layout import RUN_FILE, reject_unusable_directory
from tinyllama_ds.model.attention import AttentionChoice, Demands, Device, resolve_attention_backend
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.run.identity import Parent, checkpoint_at, find_parent, inherited_ledger, recorded_parent
from tinyllama_ds.run.ledger import Entry, excluded_samples, read_ledger
from tinyllama_ds.run.run_file import read_run_file

_MASKS = "mask_sha256"  # in run.json: of a source of conversations
# DeepSpeed's throughput timer is on by default and waits for the device at every micro-batch.
_NO_TIMER = {"timers": {"throughput": {"enabled": False}}}


@dataclass(frozen=True)
class Options:
    """The command line of `pretrain`."""

    recipe: str
    deepspeed_config: Path
    data: Path
    run_dir: Path
    resume: str = "auto"  # auto, must, never
    attention: str = "auto"
    compile: str = "auto"
    activation_checkpointing: int = 0  # every k-th block; 0 none, 1 all
    sequence_parallel: int = 1  # ranks that share each sequence
    deterministic: bool = False  # the same bits every time on GPUs too
    allow_change: tuple[str, ...] = ()  # keys of what may differ from the run that the directory holds
    branch_from: Path | None = None  # a run or checkpoint to begin with
    init_from: Path | None = None  # model folder, run or checkpoint with the weights to start from
    without: Ablation | None = None  # a source that is excluded from the recipe


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run in their order."""

    order: SampleOrder
    reader: SampleReader
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated while a run trains."""

    validation: list[ValidationSet]
    prompts: list[list[int]]  # to continue, as ids
    tasks: dict[str, Any] | None  # of lm-eval


@dataclass(frozen=True)
class Run:
    """Everything a rank needs to train."""

    options: Options
    recipe: Recipe
    plan: RunPlan
    schedule: Schedule
    model: LlamaConfig
    attention: AttentionChoice
    engine_config: dict
    monitors: dict
    micro_batch: int
    data: TrainingData
    evaluation: Evaluation
    rollbacks: int  # so far
    parent: Parent | None  # of a branch
    init_from: InitialWeights | None
    description: dict  # the content of run.json without its history

    @property
    def run_dir(self) -> Path:
        return self.options.run_dir

    @property
    def first_step(self) -> int:
        """The step that a branch begins with, else 0."""
        return self.parent.step if self.parent else 0

    @property
    def kernels(self) -> str:
        """The attention backend, why `auto` took no faster one, and whether kernels are deterministic: for the log."""
        reason = f" ({self.attention.reason})" if self.attention.reason else ""
        return f"attention {self.attention.backend}{reason}{', deterministic' if self.options.deterministic else ''}"


def resolve_run(
    options: Options, world_size: int, device_type: str, bf16: bool, capability: tuple[int, int] | None = None
) -> Run:
    """Check and derive everything, attention on GPUs if their compute capability is known. Raises `ConfigError`."""
    reject_unusable_directory(options.run_dir)
    whole = load_recipe(options.recipe)
    recipe = options.without.apply(whole) if options.without else whole
    raw = load_deepspeed_config(options.deepspeed_config)
    model, plan = recipe.model, RunPlan(recipe)
    data_size = data_parallel_size(recipe, world_size, options.sequence_parallel)
    micro_batch = micro_batch_of(plan, requested_micro_batch(raw), data_size)
    values = AutoValues(micro_batch, plan.stages[0].batch, data_size, plan.total_steps, model.hidden_size, bf16)
    resolved = resolve_deepspeed_config(raw, options.deepspeed_config, values)
    check_optimizer(resolved["optimizer"], model, options.deepspeed_config)
    engine_config, monitors = split_off_our_sections(resolved)
    _reject_absent_monitors(monitors, options.deepspeed_config)
    attention = _resolve_attention(options, recipe, Device(device_type, capability), computes_in_16_bit(resolved))
    streams, validation = _open_data(options.data, recipe, whole.sources)
    teachers = _open_teachers(recipe, streams)
    description = _settings(options, recipe, plan, model, world_size) | {
        "deepspeed_config": resolved,
        "micro_batch": micro_batch,
        "attention": attention.backend,
        "data": _fingerprints(streams, validation, teachers),
    }
    sha256 = tokenizer_sha256_of(description)
    tokenizer = stored_tokenizer(options.data, sha256, "the tokens next to it")
    parent, init_from = _origin_of(options, model, tokenizer, description)
    excluded = excluded_samples(_ledger_of(options.run_dir, parent))
    sizes = {name: stream.num_samples(recipe.sequence_length) for name, stream in streams.items()}
    order = planned_order(recipe, plan, sizes, excluded)
    reader = SampleReader(streams, order, recipe.sequence_length, model.vocab_size, teachers)
    return Run(
        options, recipe, plan, make_schedule(raw, options.deepspeed_config, plan), model, attention,
        _for_engine(engine_config, world_size), monitors, micro_batch, TrainingData(order, reader, tokenizer),
        Evaluation(validation, _encode_prompts(recipe, tokenizer), load_tasks(recipe, model)),
        len(excluded), parent, init_from, description,
    )  # fmt: skip


def _for_engine(config: dict, world_size: int) -> dict:
    """To DeepSpeed all ranks are data-parallel, also those that share sequences: their losses, of parts of a sequence,
    are weighted by their targets like all others. So its gradients have one scale at every stage, where with groups of
    its own it divides by the ranks at stage 3 and by the data-parallel ranks at others.
    """
    sequences = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    return _NO_TIMER | config | {"train_batch_size": sequences * world_size}


def _origin_of(
    options: Options, model: LlamaConfig, tokenizer: Tokenizer, description: dict
) -> tuple[Parent | None, InitialWeights | None]:
    """Where the weights come from, added to the description: another run's state, stored weights, or neither."""
    if options.branch_from is not None and options.init_from is not None:
        raise ConfigError("--branch-from and --init-from: both set where the weights come from; expected one of them")
    parent = _parent_of(options, description)
    if parent is not None:
        description["parent"] = asdict(parent)
    if options.init_from is None:
        return parent, None
    weights = open_initial_weights(options.init_from, model, tokenizer)
    description["init_from"] = weights.to_dict()
    return parent, weights


def _parent_of(options: Options, description: dict) -> Parent | None:
    """What a run that is there began with, else what it is to begin with."""
    held = read_run_file(options.run_dir)
    if held is not None:
        return recorded_parent(options.run_dir / RUN_FILE, held.description, options.branch_from)
    if options.branch_from is None:
        if options.without is not None and options.without.tokens:
            raise ConfigError(
                f"--without {options.without}: expected --branch-from RUN, a run with a checkpoint of"
                f" {options.without.tokens:,} tokens"
            )
        return None
    return find_parent(_branch_point(options), description, options.allow_change)


def _branch_point(options: Options) -> Path:
    """The run or checkpoint to begin with: that at which a source is excluded, if one is from there on."""
    assert options.branch_from is not None
    if options.without is None or not options.without.tokens:
        return options.branch_from
    return checkpoint_at(options.branch_from, options.without.tokens)


def _ledger_of(run_dir: Path, parent: Parent | None) -> list[Entry]:
    """The run's own ledger, or before it has begun its parent's."""
    if parent is not None and not (run_dir / RUN_FILE).exists():
        return inherited_ledger(parent)
    return read_ledger(run_dir)


def _encode_prompts(recipe: Recipe, tokenizer: Tokenizer) -> list[list[int]]:
    prompts = [tokenizer.encode(prompt) for prompt in recipe.samples.prompts]
    for text, ids in zip(recipe.samples.prompts, prompts, strict=True):
        if len(ids) + recipe.samples.new_tokens > recipe.sequence_length:
            raise ConfigError(
                f"recipe {recipe.name!r}: samples: the prompt {text[:40]!r} has {len(ids)} tokens, and new_tokens"
                f" {recipe.samples.new_tokens} more are beyond the sequence_length {recipe.sequence_length}"
            )
    return prompts


def _resolve_attention(options: Options, recipe: Recipe, device: Device, sixteen_bit: bool) -> AttentionChoice:
    if options.activation_checkpointing < 0:
        raise ConfigError(
            f"--activation-checkpointing {options.activation_checkpointing}: expected 0 (none), 1 (all) or more"
        )
    demands = Demands(sixteen_bit, recipe.document_mask, options.deterministic)
    return resolve_attention_backend(options.attention, device, demands)


def _settings(options: Options, recipe: Recipe, plan: RunPlan, model: LlamaConfig, world_size: int) -> dict:
    """The part of run.json that is known before the data is opened."""
    return {
        "recipe": recipe.to_dict(),
        "model": model.to_dict(),
        "order_version": ORDER_VERSION,
        "world_size": world_size,
        "sequence_parallel": options.sequence_parallel,
        "compile": options.compile,
        "activation_checkpointing": options.activation_checkpointing,
        "deterministic": options.deterministic,
        "plan": {"steps": plan.total_steps, "tokens": plan.total_tokens},
        "versions": _versions(),
    }


def _open_teachers(recipe: Recipe, streams: dict[str, TokenStream]) -> dict[str, TeacherCache]:
    """The predictions of the teacher for every source; none without a teacher."""
    if recipe.teacher is None:
        return {}
    wanted = {key: getattr(recipe, key) for key in ("sequence_length", "document_mask", "packing")}
    teachers = {name: TeacherCache(stream, **wanted) for name, stream in streams.items()}
    first, *others = teachers.values()
    for other in others:
        for key in ("model_sha256", "top_k"):
            if other.fingerprint()[key] != first.fingerprint()[key]:
                raise ConfigError(
                    f"{other.directory}: its predictions have a different {key} than {first.directory}; expected the"
                    " same teacher for all sources of a recipe"
                )
    return teachers


def _fingerprints(
    streams: dict[str, TokenStream], validation: list[ValidationSet], teachers: dict[str, TeacherCache]
) -> dict:
    """What identifies the tokens of every source, by split, and the predictions of a teacher for them."""
    held_out = {held.source: held.stream for held in validation}
    found = {
        split: {name: _fingerprint(stream) for name, stream in opened.items()}
        for split, opened in (("train", streams), ("validation", held_out))
    }
    for name, teacher in teachers.items():
        found["train"][name]["teacher"] = teacher.fingerprint()
    return found


def _reject_absent_monitors(monitors: dict, path: Path) -> None:
    for section, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        if monitors.get(section, {}).get("enabled") and find_spec(package) is None:
            raise ConfigError(f"{path}: {section}.enabled is true, but the package {package} is not installed")


def _open_data(
    data: Path, recipe: Recipe, validated: Sequence[str]
) -> tuple[dict[str, TokenStream], list[ValidationSet]]:
    """What is trained on, and of the sources `validated` what is held out."""
    vocab_size = recipe.model.vocab_size
    if not data.is_dir():
        raise ConfigError(f"{data}: the data directory is missing")
    streams = open_streams(data, recipe.sources, "train", vocab_size, recipe.packing)
    chats = [name for name, stream in streams.items() if stream.holds_conversations]
    if chats and not recipe.document_mask:
        raise ConfigError(
            f"recipe {recipe.name!r}: the source {chats[0]!r} holds conversations, which must not see the others of"
            " their row; expected document_mask = true"
        )
    held_out = [name for name in validated if (data / name / "validation").is_dir()]
    validation = open_streams(data, held_out, "validation", vocab_size, recipe.packing)
    return streams, [
        ValidationSet(name, stream, recipe.sequence_length, recipe.validation_samples, recipe.document_mask)
        for name, stream in validation.items()
    ]


def _fingerprint(stream: TokenStream) -> dict:
    """What identifies a source's tokens, in their order."""
    found = {
        "tokens": stream.tokens,
        "documents": sum(manifest.documents for manifest in stream.manifests),
        "tokenizer_sha256": stream.manifests[0].tokenizer_sha256,
        "bin_sha256": [manifest.bin_sha256 for manifest in stream.manifests],
    }
    if stream.holds_conversations:
        found[_MASKS] = [manifest.mask_sha256 for manifest in stream.manifests]
    return found


def is_chat_run(description: dict) -> bool:
    """Whether a run was trained on conversations, given its description in run.json or a checkpoint's manifest."""
    return any(_MASKS in source for source in description.get("data", {}).get("train", {}).values())


def _versions() -> dict[str, str]:
    found = {"tinyllama_ds": __version__, "python": platform.python_version()}
    found |= installed_versions((*PACKAGES, "lm-eval"))
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
