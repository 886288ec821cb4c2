"""Commands that turn token files of other toolkits into shards."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import add_shared, as_dataclass
from tinyllama_ds.commands.printing import print_result

if TYPE_CHECKING:
    from tinyllama_ds.data.shards import Manifest


def _add_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", type=Path, nargs="+", metavar="FILE", help="in the order in which they are joined")
    add("--split", choices=("train", "validation", "test"), default="train", help="part of the data directory")
    add_shared(parser, "--tokenizer", help="what made the tokens")
    add_shared(parser, "--source", "--output", "--json")


def _import_megatron(options: argparse.Namespace) -> int:
    """Make Megatron's .idx files (with their .bin files) usable for training, without a copy."""
    from tinyllama_ds.data.prepare.imports import import_megatron

    return _import_tokens(options, import_megatron)


def _import_litpkds(options: argparse.Namespace) -> int:
    """Turn the LITPKDS chunks of TinyLlama's own scripts into shards."""
    from tinyllama_ds.data.prepare.imports import import_litpkds

    return _import_tokens(options, import_litpkds)


def _import_tokens(options: argparse.Namespace, import_files: "Callable[..., list[Manifest]]") -> int:
    from tinyllama_ds.data.prepare.imports import Import

    manifests = import_files(as_dataclass(Import, options), options.inputs)
    result = {
        "shards": len(manifests),
        "documents": sum(manifest.documents for manifest in manifests),
        "tokens": sum(manifest.tokens for manifest in manifests),
        "filler_tokens": sum(manifest.source_format.get("filler_tokens_left_out", 0) for manifest in manifests),
    }
    text = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in result.items())
    return print_result(options, result, f"{options.source}/{options.split}: {text}")


COMMANDS = (
    ("import-megatron", _add_import, _import_megatron),
    ("import-litpkds", _add_import, _import_litpkds),
)
