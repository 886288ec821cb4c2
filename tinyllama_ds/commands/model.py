"""Commands for what comes out of a run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.printing import add_json, print_result

if TYPE_CHECKING:
    from torch import Tensor

    from tinyllama_ds.data.tokenizer import Tokenizer
    from tinyllama_ds.model.config import LlamaConfig


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("output", type=Path, metavar="OUT", help="Hugging Face folder to create")
    add_json(parser)


def _export(options: argparse.Namespace) -> int:
    """Write a Hugging Face folder, after proving that transformers gives our logits and token ids."""
    from tinyllama_ds.convert import export
    from tinyllama_ds.training.checkpoint import read_manifest, resolve_checkpoint

    checkpoint = resolve_checkpoint(options.checkpoint)
    probe = read_manifest(checkpoint).health.probe
    difference = export(*_load_checkpoint(checkpoint), options.output, probe)
    result = {"output": str(options.output), "largest_logit_difference": difference}
    text = f"{options.output}: token ids equal, largest difference of logits {difference:.1e}"
    return print_result(options, result, text)


def _load_checkpoint(path: Path) -> "tuple[dict[str, Tensor], LlamaConfig, Tokenizer]":
    from tinyllama_ds.data.tokenizer import TOKENIZER_FILE, Tokenizer
    from tinyllama_ds.model.config import LlamaConfig
    from tinyllama_ds.training.checkpoint import consolidated_weights, resolve_checkpoint

    checkpoint = resolve_checkpoint(path)
    manifest, weights = consolidated_weights(checkpoint)
    return weights, LlamaConfig(**manifest.model), Tokenizer(checkpoint.parents[1] / TOKENIZER_FILE)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("prompt", metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    add_json(parser)


def _generate(options: argparse.Namespace) -> int:
    """Continue a text from a checkpoint or a Hugging Face folder."""
    from tinyllama_ds.generate import Sampling, generate, load_hf_folder, serve_weights

    is_hf_folder = (options.model / "config.json").is_file()
    served = load_hf_folder(options.model) if is_hf_folder else serve_weights(*_load_checkpoint(options.model))
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    text = generate(served, options.prompt, sampling)
    return print_result(options, {"prompt": options.prompt, "text": text}, text)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: RUN/report.png")
    add_json(parser)


def _report(options: argparse.Namespace) -> int:
    """Draw the curves of a run, and print where it stands."""
    from tinyllama_ds.evaluation.report import draw, read_metrics, summarise

    rows = read_metrics(options.run)
    output = options.output or options.run / "report.png"
    draw(rows, output, str(options.run))
    summary = summarise(rows)
    text = "\n".join(f"{name:<40} {value:>14,.4g}" for name, value in summary.items())
    return print_result(options, summary | {"picture": str(output)}, f"{text}\n{output}")


COMMANDS = (
    ("export", _add_export, _export),
    ("generate", _add_generate, _generate),
    ("report", _add_report, _report),
)
