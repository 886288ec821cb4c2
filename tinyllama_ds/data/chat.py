r"""The chat template: a conversation as token ids, and its loss mask, the answers.

It is Zephyr's, as in TinyLlama-Chat v1.0, and needs no special tokens:

    <|system|>\n...EOS\n<|user|>\n...EOS\n<|assistant|>\n...EOS

The markers are text. EOS ends a turn, and text cannot fake it: `</s>` in a message is four characters to sentencepiece.
Everything between two EOS is one section, which is encoded by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllama_ds.data.encoding import Encoded
from tinyllama_ds.data.tokenizer import EOS_ID, UNK_ID, Tokenizer
from tinyllama_ds.errors import ConfigError

ROLES = ("system", "user", "assistant")
END_OF_TURN = f"one EOS (id {EOS_ID}) after each turn, no BOS"
ANSWER_HEADER = "\n<|assistant|>\n"  # the end of a generation prompt

# The same for transformers, which renders a string before it encodes it. There `</s>` in a message would become EOS, so
# a space separates it: the only case in which the ids differ from those of `conversation_ids`.
_BROKEN_UP = "".join(
    f" | replace({control}, {control}[:1] ~ ' ' ~ {control}[1:])" for control in ("bos_token", "eos_token", "'<unk>'")
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% set content = message['content']{_BROKEN_UP} %}}"
    "{{ ('' if loop.first else '\\n') ~ '<|' ~ message['role'] ~ '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ content ~ eos_token }}{% endgeneration %}"
    "{% else %}{{ content ~ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
)


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


def sections_of(messages: Sequence[Message]) -> list[str]:
    """The texts between the EOS tokens of a conversation, one for each turn."""
    return [
        f"{chr(10) if number else ''}<|{message.role}|>\n{message.content}" for number, message in enumerate(messages)
    ]


def reject_merged_line_breaks(tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` for a vocabulary in which the line break before an answer can merge with it, or is unknown.

    There a prompt's ids would not be a prefix of the conversation's.
    """
    merged = next((piece for piece in tokenizer.pieces if "\n" in piece and len(piece) > 1), None)
    if merged is not None:
        raise ConfigError(
            f"{tokenizer.path}: has the piece {merged!r}, which could merge an answer with the line break before it;"
            " expected a vocabulary that keeps line breaks apart"
        )
    if UNK_ID in tokenizer.encode(ANSWER_HEADER):
        raise ConfigError(
            f"{tokenizer.path}: has no tokens for {ANSWER_HEADER!r}, which begins an answer; expected a vocabulary with"
            " byte fallback"
        )


def header_tokens(tokenizer: Tokenizer) -> int:
    """The number of tokens before the answer in its section."""
    return len(tokenizer.encode(ANSWER_HEADER))


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The generation prompt for the next answer."""
    turns = [token for section in sections_of(messages) for token in (*tokenizer.encode(section), EOS_ID)]
    return turns + tokenizer.encode(ANSWER_HEADER)


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids and loss mask of a conversation: 1 for the tokens of answers, their EOS included, else 0."""
    ids: list[int] = []
    assistant_mask: list[int] = []
    for message, section in zip(messages, sections_of(messages), strict=True):
        turn = [*tokenizer.encode(section), EOS_ID]
        header = header_tokens(tokenizer) if message.role == "assistant" else len(turn)
        ids += turn
        assistant_mask += [0] * header + [1] * (len(turn) - header)
    return ids, assistant_mask


def encode_conversations(
    encode: Callable[[list[str]], Encoded], conversations: Sequence[Sequence[Message]], header: int, max_tokens: int
) -> EncodedConversations:
    """Encode many conversations by `encode`, which gives the ids of texts, each with its EOS.

    One of more than `max_tokens` tokens is cut after the last answer that fits. `header` is from `header_tokens`.
    """
    ids, lengths = encode([section for messages in conversations for section in sections_of(messages)])
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
