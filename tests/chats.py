"""Conversations for tests: made up, written in the forms that are read, prepared, and a recipe that trains on them."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
from launching import BATCH

from tinyllama_ds.data.prepare.conversations import ChatFormat
from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.shards import Manifest

SEQUENCE_LENGTH = 96  # of samples; a conversation may be as long
STEP_TOKENS = BATCH * SEQUENCE_LENGTH
_VOCABULARY = [
    "the",
    "a",
    "small",
    "llama",
    "model",
    "token",
    "shard",
    "reads",
    "writes",
    "learns",
    "loss",
    "rate",
    "rank",
    "7",
    "12\n",
    "batch,",
    "gradient.",
]


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Messages of user and assistant by turns."""
    roles = [{"role": "system", "content": system}] if system else []
    return roles + [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]


def guanaco(*contents: str) -> str:
    """The same as OpenAssistant-Guanaco writes it."""
    return "".join(f"### {('Human', 'Assistant')[number % 2]}: {content}" for number, content in enumerate(contents))


def conversations(count: int = 60) -> list[list[dict]]:
    """Of one to four exchanges of unequal lengths, a few with a system message."""
    return [
        turns(
            *(_words(10 * number + part, 2 + number % 7) for part in range(2 * (1 + number % 4))),
            system="be brief" if number % 5 == 0 else None,
        )
        for number in range(count)
    ]


def _words(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices(_VOCABULARY, k=count))


def write_records(path: Path, records: list[dict]) -> Path:
    """As JSON lines or parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare_chat(
    raw: Path, tokenizer: Path, output: Path, max_tokens: int = SEQUENCE_LENGTH, **changes: int
) -> list[Manifest]:
    """The source `chat`, each input file in a shard of its own."""
    fmt = ChatFormat(max_tokens=max_tokens)
    return prepare(Preparation("chat", raw, fmt, tokenizer, output, shard_bytes=1, **changes))


def write_chat_recipe(path: Path, steps: int, save_every: int | None = None, **changes: object) -> Path:
    """A recipe of some steps for the model size `test`."""
    lines = {
        "name": "chat",
        "model": "test",
        "sequence_length": SEQUENCE_LENGTH,
        "seed": 1,
        "validation_samples": 4,
        "document_mask": True,
    } | changes
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in lines.items())
    path.write_text(f"""{text}
[[stages]]
name = "only"
tokens = {steps * STEP_TOKENS}
global_batch_tokens = {STEP_TOKENS}
weights = {{ chat = 1 }}
[intervals]
log_steps = 1
evaluate_tokens = {steps * STEP_TOKENS}
save_tokens = {(save_every or steps) * STEP_TOKENS}
""")
    return path
