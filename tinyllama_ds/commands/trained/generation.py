"""Commands that generate text with a model, also as the draft of a larger one."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.bars import progress
from tinyllama_ds.commands.arguments import (
    POSITIVE,
    SEED,
    SHARE,
    Number,
    WholeNumber,
    add_shared,
    as_dataclass,
    output_folder,
)
from tinyllama_ds.commands.printing import print_result
from tinyllama_ds.commands.trained.stored import open_stored
from tinyllama_ds.errors import EXIT_FINISHED, ConfigError, log
from tinyllama_ds.outputs import reporting_write_errors, write_figure, write_file

if TYPE_CHECKING:
    from tinyllama_ds.hf.generate import LoadedModel
    from tinyllama_ds.speculative.pair import Pair

_DRAFT_LENGTH = WholeNumber(1, 100)
_DEFAULT_DRAFT_LENGTH = 4
_UNIVERSAL = "also accept a draft with a different tokenizer, translated by transformers"


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="checkpoint, run directory, model folder, HF folder")
    add("prompt", metavar="TEXT")
    _add_sampling_arguments(parser, max_new_tokens=100, temperature=0.8)
    _add_target_arguments(parser)
    add_shared(parser, "--json")


def _add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Speculative decoding."""
    add = parser.add_argument
    add("--target", type=Path, metavar="MODEL", help="larger model that generates, with MODEL as its draft")
    length = f"tokens that the draft proposes at once (default: {_DEFAULT_DRAFT_LENGTH})"
    add("--draft-length", type=_DRAFT_LENGTH, metavar="N", help=length)
    add("--universal-assisted-decoding", action="store_true", help=_UNIVERSAL)


def _add_sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    """The fields of `Sampling`."""
    add = parser.add_argument
    add("--max-new-tokens", type=POSITIVE, default=max_new_tokens, help="the longest answer")
    add("--temperature", type=Number(least=0, most=100), default=temperature, help="0 is greedy")
    add("--top-p", type=SHARE, default=0.95, help="nucleus sampling: the share of probability to sample from")
    add("--seed", type=SEED, default=0, help="of the sampling")


def _generate(options: argparse.Namespace) -> int:
    """Continue a text from a checkpoint or a Hugging Face folder, also as the draft of a larger model."""
    from tinyllama_ds.hf.generate import Sampling, generate

    if _has_target(options):
        return _generate_with_draft(options)
    text = generate(_load(options.model), options.prompt, as_dataclass(Sampling, options))
    return print_result(options, {"prompt": options.prompt, "text": text}, text)


def _generate_with_draft(options: argparse.Namespace) -> int:
    """The text as soon as there is one, then the speed: that takes the target alone on the same prompt."""
    import torch

    from tinyllama_ds.hf.generate import Sampling, prompt_tokens, text_of
    from tinyllama_ds.speculative import speed
    from tinyllama_ds.speculative.decode import alone, speculate

    pair, sampling = _load_pair(options), as_dataclass(Sampling, options)
    target, length = pair.target.loaded, options.draft_length or _DEFAULT_DRAFT_LENGTH
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


def _has_target(options: argparse.Namespace) -> bool:
    """Whether the model is a draft; raises `ConfigError` for options that would have no effect."""
    if options.target is None and (options.draft_length or options.universal_assisted_decoding):
        name = "--draft-length" if options.draft_length else "--universal-assisted-decoding"
        raise ConfigError(f"{name} is for speculative decoding; expected --target with the model that generates")
    return options.target is not None


def _load_pair(options: argparse.Namespace) -> "Pair":
    from tinyllama_ds.speculative.pair import NamedModel, make_pair

    target, draft = (NamedModel(str(path), _load(path)) for path in (options.target, options.model))
    return make_pair(target, draft, options.universal_assisted_decoding)


def _load(model: Path) -> "LoadedModel":
    """The model of a checkpoint, a run directory, a model folder or a Hugging Face folder."""
    from tinyllama_ds.hf.generate import load_from_hf_folder, load_from_weights

    if (model / "config.json").is_file():
        return load_from_hf_folder(model)
    stored = open_stored(model)
    return load_from_weights(dict(stored.tensors), stored.config, stored.tokenizer, stored.is_chat_model)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint, run directory or Hugging Face folder")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    _add_sampling_arguments(parser, max_new_tokens=256, temperature=0.0)
    _add_target_arguments(parser)


def _chat(options: argparse.Namespace) -> int:
    """Talk to a chat model; questions come from the terminal, or a line each from standard input."""
    from tinyllama_ds.hf.chat import Conversation, chat_loop
    from tinyllama_ds.hf.generate import Sampling
    from tinyllama_ds.speculative.speed import SpeculativeAnswers

    pair = _load_pair(options) if _has_target(options) else None
    loaded = pair.target.loaded if pair else _load(options.model)
    sampling = as_dataclass(Sampling, options)
    if loaded.encode_chat is None:
        name = options.target or options.model
        raise ConfigError(f"{name}: was not trained on conversations; expected a chat model (docs/chat.md)")
    if pair is None:
        chat_loop(Conversation(loaded, sampling, options.system))
        return EXIT_FINISHED
    answers = SpeculativeAnswers(pair, options.draft_length or _DEFAULT_DRAFT_LENGTH)
    chat_loop(Conversation(loaded, sampling, options.system, answers), answers.report_answer)
    answers.report_end()
    return EXIT_FINISHED


def _add_draft_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", type=Path, required=True, metavar="MODEL", help="the model to be made faster")
    add("--drafts", type=Path, nargs="+", required=True, metavar="MODEL", help="smaller models to compare")
    add("--prompts", type=Path, required=True, metavar="FILE", help="text file with one prompt a line")
    lengths = "tokens that a draft proposes at once (default: 1 2 3 4 5 8)"
    add("--draft-lengths", type=_DRAFT_LENGTH, nargs="+", default=[1, 2, 3, 4, 5, 8], metavar="N", help=lengths)
    _add_sampling_arguments(parser, max_new_tokens=64, temperature=0.0)
    add("--universal-assisted-decoding", action="store_true", help=_UNIVERSAL)
    files = "for draft_bench.json and draft_bench.png"
    add("--output", type=output_folder, default="draft-bench", metavar="DIR", help=files)
    add_shared(parser, "--json")


def _draft_bench(options: argparse.Namespace) -> int:
    """Measure acceptance and speed-up of drafts for speculative decoding, by draft length."""
    from tinyllama_ds.hf.generate import Sampling
    from tinyllama_ds.speculative.bench import Bench, read_prompts
    from tinyllama_ds.speculative.pair import NamedModel, make_pair
    from tinyllama_ds.speculative.report import figure_of, report_text

    target = NamedModel(str(options.target), _load(options.target))
    prompts = read_prompts(options.prompts, target)
    drafts = (NamedModel(str(path), _load(path)) for path in dict.fromkeys(options.drafts))
    pairs = [make_pair(target, draft, options.universal_assisted_decoding) for draft in drafts]
    bench = Bench(target, pairs, options.draft_lengths, as_dataclass(Sampling, options))
    total = (len(prompts) + 1) * len(bench.settings)  # the warm-up is one
    for _ in progress(bench.measure(prompts), total=total, desc="draft-bench", unit="text"):
        pass
    result = bench.result()
    code = print_result(options, result, f"{report_text(result)}\n{options.output / 'draft_bench.png'}")
    with reporting_write_errors(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    write_file(options.output / "draft_bench.json", json.dumps(result, indent=1) + "\n")
    write_figure(figure_of(result), options.output / "draft_bench.png")
    return code


COMMANDS = (
    ("generate", _add_generate, _generate),
    ("chat", _add_chat, _chat),
    ("draft-bench", _add_draft_bench, _draft_bench),
)
