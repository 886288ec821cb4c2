"""The command that tunes a chat model on preferences."""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from tinyllama_ds.commands.arguments import (
    POSITIVE,
    SEED,
    Number,
    WholeNumber,
    add_shared,
    as_dataclass,
    output_folder,
    with_absolute_paths,
    words_of,
)
from tinyllama_ds.commands.placement import local_placement, warn_of_hidden_gpus
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.commands.trained.stored import open_stored
from tinyllama_ds.distributed.session import run_in_session
from tinyllama_ds.errors import EXIT_FINISHED, ConfigError
from tinyllama_ds.files import read_object_if_whole
from tinyllama_ds.launch.launcher import PREFER, Placement, launcher_command, launcher_environment
from tinyllama_ds.outputs import new_folder, reporting_write_errors, write_figure, write_file

_POSITIVE_NUMBER = Number(most=1000.0)


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preferences", type=Path, required=True, metavar="FILE", help="JSON lines with chosen and rejected")
    add("--validation", type=Path, metavar="FILE", help="more of them, to measure on after each epoch")
    add_shared(parser, "--deepspeed-config")
    add("--batch-size", type=WholeNumber(1, 100_000), default=32, metavar="B", help="preferences per step")
    add("--epochs", type=_POSITIVE_NUMBER, default=1.0, metavar="E")
    add("--learning-rate", type=_POSITIVE_NUMBER, default=1e-6, metavar="LR", help="in place of the config's")
    add("--beta", type=_POSITIVE_NUMBER, default=0.1, help="of DPO: higher stays nearer to the model")
    add("--max-tokens", type=POSITIVE, default=1024, metavar="T", help="longer conversations are cut at their end")
    add("--seed", type=SEED, default=0, help="of the order")


def add_tuning_arguments(parser: argparse.ArgumentParser) -> None:
    """What a rank needs; `prefer` starts the ranks with them."""
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    _add_shared_arguments(parser)


def _add_prefer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="chat model: run, checkpoint, or Hugging Face folder")
    add("output", type=output_folder, metavar="OUT", help="folder to create: model, hf, report, TensorBoard")
    _add_shared_arguments(parser)
    add_shared(parser, "--num-gpus", "--json")


def _prefer(options: argparse.Namespace) -> int:
    """Tune a chat model on preferences with DPO by TRL, under the deepspeed launcher, and import the result."""
    from tinyllama_ds.preference.pairs import read_pairs
    from tinyllama_ds.preference.report import table
    from tinyllama_ds.preference.tuning import HISTORY_FILE, TUNED, Tuning, engine_config, require_trl

    require_trl()
    if options.output.exists():
        raise ConfigError(f"{options.output}: already exists; expected a new folder")
    placement = local_placement(options.num_gpus)
    for path in filter(None, (options.preferences, options.validation)):
        read_pairs(path)
    with reporting_write_errors(options.output):
        options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{options.output.name}.", dir=options.output.parent) as directory:
        options.work = Path(directory).absolute()
        options.folder = _as_chat_folder(options.model, options.work / "start").absolute()
        engine_config(as_dataclass(Tuning, options), placement.world_size, bf16=False)  # raises what the ranks would
        warn_of_hidden_gpus(placement)
        code = _run_ranks(options, placement)
        if code != EXIT_FINISHED:
            return code
        with new_folder(options.output) as folder:
            difference = _import(options.work / TUNED, options.folder, folder)
            shutil.copytree(options.work / "tensorboard", folder / "tensorboard")
            found = _write_report(options, json.loads((options.work / HISTORY_FILE).read_text())["history"], folder)
    result = {"output": str(options.output), "largest_logit_difference": difference, **found}
    text = (
        f"{table(found)}\n{options.output}: model, hf, preferences.png, largest difference of logits {difference:.1e}"
    )
    return print_result(options, result, text)


def _as_chat_folder(model: Path, exported: Path) -> Path:
    """The Hugging Face folder of a chat model; a run or a checkpoint is exported first."""
    from tinyllama_ds.hf.convert import ExportOptions, export

    if (model / "config.json").is_file():
        settings = read_object_if_whole(model / "tokenizer_config.json")
        if not (model / "chat_template.jinja").is_file() and not settings.get("chat_template"):
            raise ConfigError(f"{model}: has no chat template; expected a chat model (docs/chat.md)")
        return model
    stored = open_stored(model)
    if not stored.is_chat_model:
        raise ConfigError(f"{model}: was not trained on conversations; expected a chat model (docs/chat.md)")
    export(stored.tensors, stored.config, stored.tokenizer, exported, ExportOptions(stored.probe, is_chat_model=True))
    return exported


def _run_ranks(options: argparse.Namespace, placement: Placement) -> int:
    words = words_of(add_tuning_arguments, with_absolute_paths(options))
    command = launcher_command(placement, words, PREFER)
    return run_in_session(command, launcher_environment(placement))


def _import(tuned: Path, start: Path, output: Path) -> float:
    """Write the tuned model as `hf`, with the tokenizer's files of the start, and as `model`, verified.

    Returns the largest difference of logits, which import verifies. Raises `ConfigError` for another tokenizer.
    """
    from tinyllama_ds.data.tokenizers.storage import load_tokenizer
    from tinyllama_ds.hf.import_model import import_hf_folder

    folder = output / "hf"
    shutil.copytree(start, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    for path in (*tuned.glob("*.safetensors*"), tuned / "config.json"):
        shutil.copyfile(path, folder / path.name)
    imported = import_hf_folder(folder, output / "model")
    if load_tokenizer(output / "model").sha256 != load_tokenizer(start).sha256:
        raise ConfigError(f"{start}: the tokenizer of the tuned model is not this one")
    return imported.largest_logit_difference


def _write_report(options: argparse.Namespace, history: list, output: Path) -> dict:
    from tinyllama_ds.preference.report import picture_of, summary

    found = summary(history)
    write_file(output / "preferences.json", json.dumps({"summary": found, "history": history}, indent=1) + "\n")
    write_figure(picture_of(history, f"{options.model}, beta {options.beta:g}"), output / "preferences.png")
    return found


COMMANDS = (("prefer", _add_prefer, _prefer),)
