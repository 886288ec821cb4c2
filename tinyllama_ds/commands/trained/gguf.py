"""`export --gguf`: a file for llama.cpp and the programs built on it."""

import argparse
from dataclasses import asdict
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.commands.trained.stored import open_stored
from tinyllama_ds.errors import log
from tinyllama_ds.outputs import check_new_file

if TYPE_CHECKING:
    from tinyllama_ds.hf.gguf.export import GgufResult


def add_gguf_arguments(parser: argparse.ArgumentParser) -> None:
    """Which types of weights, and what the file is compared on."""
    add = parser.add_argument
    kinds = ("f16", "q8_0", "q4_0")
    add("--gguf", choices=kinds, help="write a GGUF file with weights of 16, 8.5 or 4.5 bits instead")
    text = "with --gguf: text file, or data directory for its validation split, to compare perplexities on"
    add("--text", type=Path, metavar="PATH", help=f"{text} (default: Python's language reference)")


def write_gguf(options: argparse.Namespace) -> int:
    """Write the file, and print what its weights cost."""
    from tinyllama_ds.hf.gguf.comparison import sample_text
    from tinyllama_ds.hf.gguf.export import GgufModel, export_gguf, require_gguf

    require_gguf()
    check_new_file(options.output)
    stored = open_stored(options.checkpoint, options.average)
    text = sample_text(options.text, stored.tokenizer, stored.config)
    weights = dict(stored.tensors)
    model = GgufModel(stored.name, stored.config, weights, stored.tokenizer, stored.is_chat_model)
    written = export_gguf(model, options.gguf, options.output, text)
    if written.kept:
        log(f"{written.kept} tensors are in f16: their rows are not a multiple of 32 weights, which share a scale")
    found = written.comparison
    perplexities = {"perplexity": exp(found.loss), "gguf_perplexity": exp(found.gguf_loss)}
    result = {"output": str(options.output), "type": options.gguf, "bytes": written.size, **asdict(found)}
    result |= perplexities | {"perplexity_change": found.perplexity_change}
    return print_result(options, result, _as_text(options, written, stored.config.num_parameters))


def _as_text(options: argparse.Namespace, written: "GgufResult", parameters: int) -> str:
    found = written.comparison
    return (
        f"{options.output}: {options.gguf}, {written.size / 1e6:,.1f} MB,"
        f" {8 * written.size / parameters:.2f} bits per parameter\n"
        f"perplexity {exp(found.loss):.4f} -> {exp(found.gguf_loss):.4f}, {found.perplexity_change:+.3%}"
        f" (standard error {found.loss_error:.3%}), on {found.tokens:,} tokens of {found.text}\n"
        f"the same most likely token for {found.same_top_token:.2%} of them, largest difference of logits"
        f" {found.largest_logit_difference:.1e}"
    )
