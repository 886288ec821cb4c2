"""Commands for what comes out of a run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.printing import add_json, print_result
from tinyllama_ds.errors import EXIT_FINISHED, Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from tinyllama_ds.data.tokenizer import Tokenizer
    from tinyllama_ds.generate import Sampling, Served
    from tinyllama_ds.model.config import LlamaConfig


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument("output", type=Path, metavar="OUT", help="Hugging Face folder to create")
    add_json(parser)


def _export(options: argparse.Namespace) -> int:
    """Write a Hugging Face folder, after proving that transformers gives our logits and token ids."""
    from tinyllama_ds.convert import export
    from tinyllama_ds.training.checkpoint import read_manifest, resolve_checkpoint
    from tinyllama_ds.training.run import learned_to_chat

    checkpoint = resolve_checkpoint(options.checkpoint)
    manifest = read_manifest(checkpoint)
    chats = learned_to_chat(manifest.run)
    difference = export(*_load_checkpoint(checkpoint), options.output, manifest.health.probe, chats)
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
    from tinyllama_ds.generate import generate

    text = generate(_serve(options.model), options.prompt, _sampling(options))
    return print_result(options, {"prompt": options.prompt, "text": text}, text)


def _serve(model: Path) -> "Served":
    from tinyllama_ds.generate import load_hf_folder, serve_weights
    from tinyllama_ds.training.checkpoint import read_manifest, resolve_checkpoint
    from tinyllama_ds.training.run import learned_to_chat

    if (model / "config.json").is_file():
        return load_hf_folder(model)
    chats = learned_to_chat(read_manifest(resolve_checkpoint(model)).run)
    return serve_weights(*_load_checkpoint(model), chats)


def _sampling(options: argparse.Namespace) -> "Sampling":
    from tinyllama_ds.generate import Sampling

    return Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the first question")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _chat(options: argparse.Namespace) -> int:
    """Talk to a chat model; questions come from the terminal, or a line each from standard input."""
    from tinyllama_ds.chat import Conversation, talk

    served = _serve(options.model)
    if served.encode_chat is None:
        raise Refusal(f"{options.model}: was not trained on conversations; expected a chat model (docs/chat.md)")
    talk(Conversation(served, _sampling(options), options.system))
    return EXIT_FINISHED


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
    ("chat", _add_chat, _chat),
    ("report", _add_report, _report),
)
