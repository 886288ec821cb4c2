"""Commands for what comes out of a run, and for models that come from elsewhere."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import (
    DRAFT_LENGTH,
    FILE_SIZE,
    POSITIVE,
    SEED,
    SHARE,
    Number,
    add_shared,
    argument_type,
    as_dataclass,
    output_folder,
)
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.commands.trained.gguf import add_gguf_arguments, write_gguf
from tinyllama_ds.commands.trained.stored import open_stored
from tinyllama_ds.errors import EXIT_FINISHED, ConfigError, log
from tinyllama_ds.outputs import check_folder, new_folder

if TYPE_CHECKING:
    from tinyllama_ds.hf.generate import LoadedModel
    from tinyllama_ds.speculative.pair import Pair


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="MODEL", help="checkpoint, run directory or model folder")
    add("output", type=Path, metavar="OUT", help="Hugging Face folder, or file with --gguf, to create")
    add("--max-shard-size", type=FILE_SIZE, default="5GB", metavar="SIZE", help="of a safetensors file")
    average = "the mean of the last K checkpoints that the run has kept, in fp32"
    add("--average", type=POSITIVE, default=1, metavar="K", help=average)
    add_gguf_arguments(parser)
    add_shared(parser, "--json")


def _export(options: argparse.Namespace) -> int:
    """Write a Hugging Face folder with our logits and token ids in transformers, or a GGUF file for llama.cpp."""
    if options.gguf is not None:
        return write_gguf(options)
    check_folder(options.output)
    from tinyllama_ds.hf.convert import ExportOptions, export

    stored = open_stored(options.checkpoint, options.average)
    choices = ExportOptions(stored.probe, options.max_shard_size, stored.is_chat_model)
    difference = export(stored.tensors, stored.config, stored.tokenizer, options.output, choices)
    result = {"output": str(options.output), "largest_logit_difference": difference}
    symbols = len(stored.tokenizer.user_defined)
    but = f" (but of a text that is nothing but one of its {symbols} user-defined symbols)" if symbols else ""
    text = f"{options.output}: token ids equal{but}, largest difference of logits {difference:.1e}"
    return print_result(options, result, text)


def _add_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, metavar="HF_DIR", help="of Llama architecture, on this machine")
    add("output", type=output_folder, metavar="OUT", help="model folder to create, for pretrain --init-from")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer to take in place of the folder's own")
    numbers = "take only these decoder layers, such as 0,6,12,18,24,29, to begin a draft of the model"
    add("--layers", type=argument_type(_layers), metavar="N,N,...", help=numbers)
    add_shared(parser, "--json")


def _layers(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ConfigError(f"{text!r}: expected numbers with commas, such as 0,6,12")
    return [int(number) for number in numbers]


def _import(options: argparse.Namespace) -> int:
    """Read a Hugging Face folder into a model folder, after proving that transformers has our bits and logits."""
    from tinyllama_ds.hf.import_model import import_hf_folder
    from tinyllama_ds.model.config import dtype_name

    imported = import_hf_folder(options.folder, options.output, options.tokenizer, options.layers)
    dtype = dtype_name(imported.dtype)
    result = {
        "output": str(options.output),
        "model": imported.model.to_dict(),
        "dtype": dtype,
        "largest_logit_difference": imported.largest_logit_difference,
        "padding": imported.padding,
    }
    padded = f"; {imported.padding} rows of the vocabulary are padding, which no text uses" if imported.padding else ""
    text = (
        f"{options.output}: {imported.model.num_parameters:,} parameters in {dtype}, largest difference of logits"
        f" {imported.largest_logit_difference:.1e}{padded}"
    )
    return print_result(options, result, text)


def _add_import_checkpoint(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    old = "checkpoint of format 2 or older, its run, or DeepSpeed's TAG folder"
    add("folder", type=Path, metavar="FOLDER", help=old)
    add("output", type=output_folder, metavar="OUT", help="run directory to create with the checkpoint")
    add("--model", metavar="NAME", help="named size, of a checkpoint that is not of tinyllama-ds")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer of such a checkpoint")
    add_shared(parser, "--json")


def _import_checkpoint(options: argparse.Namespace) -> int:
    """Convert a checkpoint in DeepSpeed's format. UNPICKLES its files, which can run any code: only your own."""
    import shutil

    from tinyllama_ds.checkpoint.format import resolve_checkpoint
    from tinyllama_ds.checkpoint.import_deepspeed import import_checkpoint
    from tinyllama_ds.data.tokenizers.storage import load_tokenizer, write_tokenizer
    from tinyllama_ds.layout import CHECKPOINTS, RUN_FILE
    from tinyllama_ds.model.config import model_config

    is_of_run = (options.folder / CHECKPOINTS).is_dir()
    checkpoint = resolve_checkpoint(options.folder) if is_of_run else options.folder
    log(f"unpickling {checkpoint}: this runs code that its files may hold")
    model = model_config(options.model) if options.model else None
    with new_folder(options.output) as run_dir:
        written = import_checkpoint(checkpoint, run_dir, model)
        if options.tokenizer is not None:
            write_tokenizer(load_tokenizer(options.tokenizer), run_dir)
        elif (checkpoint.parents[1] / RUN_FILE).is_file():
            for path in filter(Path.is_file, checkpoint.parents[1].iterdir()):
                shutil.copyfile(path, run_dir / path.name)
    final = options.output / written.relative_to(run_dir)
    return print_result(options, {"checkpoint": str(final)}, f"{final}: in format 3; {options.folder} is as it was")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="checkpoint, run directory, model folder, HF folder")
    add("prompt", metavar="TEXT")
    add_sampling_arguments(parser, max_new_tokens=100, temperature=0.8)
    _add_target_arguments(parser)
    add_shared(parser, "--json")


def _add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Speculative decoding."""
    add = parser.add_argument
    add("--target", type=Path, metavar="MODEL", help="larger model that generates, with MODEL as its draft")
    add("--draft-length", type=DRAFT_LENGTH, default=4, metavar="N", help="tokens that the draft proposes at once")
    add_shared(parser, "--universal-assisted-decoding")


def add_sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    """The fields of `Sampling`."""
    add = parser.add_argument
    add("--max-new-tokens", type=POSITIVE, default=max_new_tokens, help="the longest answer")
    add("--temperature", type=Number(least=0, most=100), default=temperature, help="0 is greedy")
    add("--top-p", type=SHARE, default=0.95, help="nucleus sampling: the share of probability to sample from")
    add("--seed", type=SEED, default=0, help="of the sampling")


def _generate(options: argparse.Namespace) -> int:
    """Continue a text from a checkpoint or a Hugging Face folder, also as the draft of a larger model."""
    from tinyllama_ds.hf.generate import Sampling, generate

    if options.target is not None:
        return _generate_with_draft(options)
    text = generate(load_for_generation(options.model), options.prompt, as_dataclass(Sampling, options))
    return print_result(options, {"prompt": options.prompt, "text": text}, text)


def _generate_with_draft(options: argparse.Namespace) -> int:
    """The text as soon as there is one, then the speed: that takes the target alone on the same prompt."""
    import torch

    from tinyllama_ds.hf.generate import Sampling, prompt_tokens, text_of
    from tinyllama_ds.speculative import speed
    from tinyllama_ds.speculative.decode import alone, speculate

    pair, sampling = _load_pair(options), as_dataclass(Sampling, options)
    target, length = pair.target.loaded, options.draft_length
    ids = prompt_tokens(target, options.prompt)
    speed.warm_up(pair, ids, sampling, length)
    torch.manual_seed(sampling.seed)
    found = speculate(pair, ids, sampling, length)
    text = text_of(target, [*ids, *found.ids])
    if not options.json:
        print(text, flush=True)
    expected = alone(target, ids, sampling)
    if options.json:
        print_result(options, {"prompt": options.prompt, "text": text} | speed.speed_of(found, expected), text)
    log(speed.comparison_line(found, expected, length))
    if sampling.temperature == 0 and (difference := speed.difference_line(found, expected)):
        log(difference)
    return EXIT_FINISHED


def _load_pair(options: argparse.Namespace) -> "Pair":
    from tinyllama_ds.speculative.pair import NamedModel, make_pair

    target, draft = (NamedModel(str(path), load_for_generation(path)) for path in (options.target, options.model))
    return make_pair(target, draft, options.universal_assisted_decoding)


def load_for_generation(model: Path) -> "LoadedModel":
    """The model of a checkpoint, a run directory, a model folder or a Hugging Face folder."""
    from tinyllama_ds.hf.generate import load_from_hf_folder, load_from_weights

    if (model / "config.json").is_file():
        return load_from_hf_folder(model)
    stored = open_stored(model)
    return load_from_weights(dict(stored.tensors), stored.config, stored.tokenizer, stored.is_chat_model)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_sampling_arguments(parser, max_new_tokens=256, temperature=0.0)
    _add_target_arguments(parser)


def _chat(options: argparse.Namespace) -> int:
    """Talk to a chat model; questions come from the terminal, or a line each from standard input."""
    from tinyllama_ds.hf.chat import Conversation, chat_loop
    from tinyllama_ds.hf.generate import Sampling
    from tinyllama_ds.speculative.speed import SpeculativeAnswers

    pair = _load_pair(options) if options.target is not None else None
    loaded = pair.target.loaded if pair else load_for_generation(options.model)
    sampling = as_dataclass(Sampling, options)
    if loaded.encode_chat is None:
        name = options.target or options.model
        raise ConfigError(f"{name}: was not trained on conversations; expected a chat model (docs/chat.md)")
    if pair is None:
        chat_loop(Conversation(loaded, sampling, options.system))
        return EXIT_FINISHED
    answers = SpeculativeAnswers(pair, options.draft_length)
    chat_loop(Conversation(loaded, sampling, options.system, answers), answers.report_answer)
    answers.report_end()
    return EXIT_FINISHED


COMMANDS = (
    ("export", _add_export, _export),
    ("import", _add_import, _import),
    ("import-checkpoint", _add_import_checkpoint, _import_checkpoint),
    ("generate", _add_generate, _generate),
    ("chat", _add_chat, _chat),
)
