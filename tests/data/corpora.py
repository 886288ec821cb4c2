"""Made-up text for tests, and the files it is read from."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

_WORDS = (
    "the a small large model token shard reads writes learns step loss rate rank batch gradient weight norm layer "
    "attention head query key value rope cosine sine floor peak data order seed epoch sample document source prose"
)
# Texts on which tokenizers and readers tend to go wrong.
AWKWARD_TEXTS = [
    " ",
    "    return  x\n\n\n\tif y:\r\n        pass\n",
    "</s><s> [INST] <unk> <0x0A> text that looks like control tokens </s>",
    "é ü ß 中文文本 日本語 한국어 🙂👩‍👩‍👧 \u0000 \ufeff \u2581 \u00a0 \u202e",
    "12345678901234567890 3.14159 1e-5 0xFF",
    "a" * 5000,
    "=" * 300,
    "x\u2028y\u2029z\x0b\x0c\x1c",
]


def made_up_text(seed: int, words: int) -> str:
    rng, vocabulary = random.Random(seed), _WORDS.split()
    return " ".join(rng.choice(vocabulary) + rng.choice(["", "", ".", ",", "\n", "\n    ", " 7"]) for _ in range(words))


def write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path
