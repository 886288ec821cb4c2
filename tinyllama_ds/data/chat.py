r"""The chat template: a conversation as token ids, and its loss mask, the answers.

It is Zephyr's, as in TinyLlama-Chat v1.0, and needs no special tokens:

    <|system|>\n...EOS\n<|user|>\n...EOS\n<|assistant|>\n...EOS

The markers are text. EOS ends a turn, and text cannot fake it: a special token's name in a message is encoded as text.
Each turn is encoded by itself. Where line breaks can merge with what follows, as in byte-level BPE, its header and its
message are encoded apart, so that a prompt's ids are a prefix of the conversation's.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from tinyllama_ds.data.tokenizers.abstract import Encoded, Tokenizer

ROLES = ("system", "user", "assistant")
ANSWER_HEADER = "\n<|assistant|>\n"  # the end of a generation prompt

_TEMPLATE = (
    "{% for message in messages %}"
    "{% set cleaned = namespace(content=message['content']) %}"
    "{% for control in CONTROLS %}"
    "{% set cleaned.content = cleaned.content | replace(control, control[:1] ~ ' ' ~ control[1:]) %}"
    "{% endfor %}"
    "{{ ('' if loop.first else '\\n') ~ '<|' ~ message['role'] ~ '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ cleaned.content ~ eos_token }}{% endgeneration %}"
    "{% else %}{{ cleaned.content ~ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
)


def chat_template(tokenizer: Tokenizer) -> str:
    """The same for transformers, which renders a string before it encodes it.

    There a special token's name in a message would become the token, so a space separates it. In this case the ids
    differ from those of `conversation_ids`, and with byte-level BPE where a message begins with white space, which may
    merge with the line break before it.
    """
    return _TEMPLATE.replace("CONTROLS", json.dumps(tokenizer.control_tokens(), ensure_ascii=False))


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class EncodedConversations:
    """Concatenated conversations, as in a shard."""

    ids: np.ndarray
    assistant_mask: np.ndarray  # of each id, 0 or 1 in uint8
    lengths: np.ndarray  # ids of each conversation
    shortened: int  # conversations without their last turns
    rejected: int  # conversations whose first answer does not fit


def parts_of_turn(tokenizer: Tokenizer) -> int:
    """The number of texts that a turn is encoded as: its header and its message, or both together."""
    return 2 if tokenizer.cuts_turns else 1


def _texts_of(messages: Sequence[Message], parts: int) -> list[str]:
    """The texts of a conversation that are encoded by themselves, so many for each turn."""
    turns = [(f"{chr(10) if number else ''}<|{message.role}|>\n", message.content)
             for number, message in enumerate(messages)]  # fmt: skip
    return list(chain.from_iterable(turns)) if parts == 2 else list(map("".join, turns))


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The generation prompt for the next answer."""
    return conversation_ids(tokenizer, messages)[0] + tokenizer.encode(ANSWER_HEADER)


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids and loss mask of a conversation: 1 for the tokens of answers, their EOS included, else 0."""
    ids: list[int] = []
    assistant_mask: list[int] = []
    answer_header = len(tokenizer.encode(ANSWER_HEADER))
    parts = parts_of_turn(tokenizer)
    encoded = map(tokenizer.encode, _texts_of(messages, parts))
    for message in messages:
        turn = [*chain.from_iterable(islice(encoded, parts)), tokenizer.eos_id]
        header = answer_header if message.role == "assistant" else len(turn)
        ids += turn
        assistant_mask += [0] * header + [1] * (len(turn) - header)
    return ids, assistant_mask


def encode_conversations(
    encode: Callable[[list[str], int], Encoded],
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    max_tokens: int,
) -> EncodedConversations:
    """Encode many conversations by `encode`, which gives the ids of documents of so many texts, each with its EOS.

    One of more than `max_tokens` tokens is cut after the last answer that fits.
    """
    header, parts = len(tokenizer.encode(ANSWER_HEADER)), parts_of_turn(tokenizer)
    ids, lengths = encode([text for messages in conversations for text in _texts_of(messages, parts)], parts)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    assistant_mask = np.zeros(len(ids), dtype=np.uint8)
    is_kept = np.zeros(len(ids), dtype=bool)
    kept_lengths = []
    shortened = rejected = first = 0
    for messages in conversations:
        offsets = ends[first : first + len(messages) + 1]
        first += len(messages)
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        fitting = [turn for turn in answers if offsets[turn + 1] - offsets[0] <= max_tokens]
        if not fitting:
            rejected += 1
            continue
        shortened += len(fitting) < len(answers)
        for turn in fitting:
            assistant_mask[offsets[turn] + header : offsets[turn + 1]] = 1
        end = offsets[fitting[-1] + 1]
        is_kept[offsets[0] : end] = True
        kept_lengths.append(end - offsets[0])
    lengths = np.array(kept_lengths, dtype=np.int64)
    return EncodedConversations(ids[is_kept], assistant_mask[is_kept], lengths, shortened, rejected)
