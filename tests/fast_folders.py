"""Folders with a `tokenizer.json`, made as SmolLM2's and Llama 3's, from made-up text, for tests."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_RANDOM = random.Random(0)
_COMMON = ("the", "a", "small", "model", "token", "reads", "writes", "learns", "loss", "rate", "batch", "weight")
_WORDS = [*_COMMON] * 12
_WORDS += ["".join(_RANDOM.choices("aeiounrtsl", k=_RANDOM.randint(2, 9))) for _ in range(400)]
TEXT = [" ".join(_RANDOM.choices(_WORDS, k=1400)) + ".\n\n    é 中文 ½ 2024," for _ in range(6)]


def smollm2(folder: Path, vocab_size: int = 600) -> Path:
    """Digits one by one, special tokens first, and no pieces for bytes that are not in the text."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    alphabet = [piece for piece in pre_tokenizers.ByteLevel.alphabet() if piece not in "ĄĆò"]  # bytes 4, 6 and 0xF2
    fast.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    roles = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": {"content": "<|endoftext|>"}}
    return _write(folder, fast, {"tokenizer_config.json": roles})


def llama_3(folder: Path) -> Path:
    """Words of its own pattern, special tokens behind the others, a BOS before every text, and truncation on."""
    fast = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA_3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{number}" for number in range(8)), "eot_id"]
    fast.add_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    first = fast.token_to_id("<|begin_of_text|>")
    fast.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", first)]
    )
    fast.enable_truncation(100)
    fast.enable_padding()
    ids = {"bos_token_id": first, "eos_token_id": [first + 1, first + 10]}
    return _write(folder, fast, {"generation_config.json": ids})


def _write(folder: Path, fast: tokenizers.Tokenizer, others: dict[str, dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    for name, content in others.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def change(folder: Path, edit: Callable[[dict], object]) -> Path:
    """Edit the `tokenizer.json` of a folder."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def with_many_ids(folder: Path, vocab_size: int) -> Path:
    """A vocabulary of so many pieces, whose last one is that of the text `ab`."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    path = _write(folder, fast, {"special_tokens_map.json": {"eos_token": "<end>"}}) / "tokenizer.json"

    def fill(content: dict) -> None:
        pieces = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        pieces += [f"unused {number}" for number in range(vocab_size - len(pieces) - 1)] + ["ab"]
        content["model"] |= {"vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": [["a", "b"]]}

    change(folder, fill)
    return path
