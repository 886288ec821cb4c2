"""Commands for what comes out of a run, and for models that come from elsewhere."""

import argparse
from pathlib import Path

from tinyllama_ds.commands.arguments import (
    FILE_SIZE,
    POSITIVE,
    add_shared,
    argument_type,
    output_folder,
)
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.commands.trained.gguf import add_gguf_arguments, write_gguf
from tinyllama_ds.commands.trained.stored import open_stored
from tinyllama_ds.errors import ConfigError, log
from tinyllama_ds.outputs import check_folder, new_folder


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


COMMANDS = (
    ("export", _add_export, _export),
    ("import", _add_import, _import),
    ("import-checkpoint", _add_import_checkpoint, _import_checkpoint),
)
