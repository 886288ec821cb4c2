"""The suite `long-context` of `evaluate`: its options, and its results."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllama_ds.commands.arguments import WholeNumber, output_folder
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.suites import LONG_CONTEXT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tinyllama_ds.evaluation.harness import Ranks
    from tinyllama_ds.evaluation.long_context.measure import LongContext

_DOCUMENTS, _QUESTIONS = 100, 10  # at most; of each length and depth
_ONLY = ("data", "lengths", "document_tokens", "write_tasks")  # options of this suite alone
_LENGTH = WholeNumber(32, 10_000_000)


def add_long_context_arguments(parser: argparse.ArgumentParser) -> None:
    """What is read, how long the contexts are, and where the needles are kept for lm-eval."""
    add = parser.add_argument_group("--suite long-context (docs/long-context.md)").add_argument
    add("--data", type=Path, metavar="DIR", help="data directory made by prepare, for its held-out documents")
    powers = "of contexts, in tokens (default: powers of two from 256 up to the model's positions)"
    add("--lengths", type=_LENGTH, nargs="+", metavar="T", help=powers)
    tokens = "of each document; set it to compare models by the same tokens (default: the longest of --lengths)"
    add("--document-tokens", type=_LENGTH, metavar="N", help=tokens)
    add("--write-tasks", type=output_folder, metavar="DIR", help="write the needles as task files for lm-eval as well")


def check_long_context_arguments(options: argparse.Namespace) -> None:
    """Raises `ConfigError` where an option of this suite is given without it, or it lacks its data."""
    if options.suite != LONG_CONTEXT:
        for name in _ONLY:
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: is for --suite {LONG_CONTEXT}")
    elif options.data is None:
        raise ConfigError(f"--suite {LONG_CONTEXT}: expected --data as well, for its held-out documents")
    elif options.document_tokens and options.document_tokens < max(options.lengths or [0]):
        raise ConfigError(
            f"--document-tokens {options.document_tokens}: is less than the longest of --lengths,"
            f" {max(options.lengths)}; expected as many or more"
        )


def measure_long_context(options: argparse.Namespace, model: Any, tokenizer: Any, ranks: "Ranks") -> dict[str, Any]:
    """The suite's results; writes the task files if they are wanted. Collective."""
    from tinyllama_ds.evaluation.long_context.measure import measure
    from tinyllama_ds.evaluation.long_context.needle import write_tasks

    found, questions = measure(_suite(options, model.config.max_position_embeddings), model, tokenizer, ranks)
    if options.write_tasks is not None and ranks.rank == 0:
        write_tasks(questions, options.write_tasks)
    return found


def long_context_outputs(found: dict[str, Any]) -> "tuple[str, Figure]":
    """The results as text and as a picture."""
    from tinyllama_ds.evaluation.long_context.charts import long_context_figure
    from tinyllama_ds.evaluation.long_context.result import long_context_markdown

    return long_context_markdown(found), long_context_figure(found)


def _suite(options: argparse.Namespace, positions: int) -> "LongContext":
    from tinyllama_ds.evaluation.long_context.measure import LongContext, default_lengths

    lengths = tuple(sorted(set(options.lengths or default_lengths(positions))))
    return LongContext(
        options.data,
        lengths,
        options.limit or _DOCUMENTS,
        max(options.document_tokens or 0, lengths[-1]),
        options.limit or _QUESTIONS,
    )
