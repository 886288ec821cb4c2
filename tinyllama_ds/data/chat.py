r"""The chat template: a conversation as token ids, and which of them are answers, the targets of fine-tuning.

It is Zephyr's, as in TinyLlama-Chat v1.0, and needs no vocabulary of its own:

    <|system|>\n...EOS\n<|user|>\n...EOS\n<|assistant|>\n...EOS

The markers are text; what ends a turn is EOS, which no text can spell: `</s>` in a message is four characters to
sentencepiece. Everything between two EOS is one section, and is encoded alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllama_ds.data.encoding import Encoded
from tinyllama_ds.data.tokenizer import EOS_ID, UNK_ID, Tokenizer
from tinyllama_ds.errors import ConfigError

ROLES = ("system", "user", "assistant")
END_OF_TURN = f"one EOS (id {EOS_ID}) after each turn, no BOS"
ANSWER_HEADER = "\n<|assistant|>\n"  # what a model is given to answer

# The same for transformers, which renders a string before it encodes it. There `</s>` in a message would become EOS, so
# that a space breaks it up: the one case in which the ids are not those of `conversation_ids`.
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
    """Conversations one after the other, as a shard holds them."""

    ids: np.ndarray
    assistant_mask: np.ndarray  # of each id, 0 or 1 in uint8
    lengths: np.ndarray  # ids of each conversation
    shortened: int  # conversations that lost their last turns
    rejected: int  # conversations of which not even the first answer fits


def sections_of(messages: Sequence[Message]) -> list[str]:
    """The texts between the EOS of a conversation, one for each turn."""
    return [
        f"{chr(10) if number else ''}<|{message.role}|>\n{message.content}" for number, message in enumerate(messages)
    ]


def reject_merged_line_breaks(tokenizer: Tokenizer) -> None:
    """Raises `ConfigError` for a vocabulary in which the line break before an answer can become one token with it, or
    none.

    There a prompt's ids would not be the beginning of the conversation's, and no token would be the answer's first.
    """
    merged = next((piece for piece in tokenizer.pieces if "\n" in piece and len(piece) > 1), None)
    if merged is not None:
        raise ConfigError(
            f"{tokenizer.path}: has the piece {merged!r}, which could merge the line break before an answer with it;"
            " expected a vocabulary that keeps line breaks apart"
        )
    if UNK_ID in tokenizer.encode(ANSWER_HEADER):
        raise ConfigError(
            f"{tokenizer.path}: has no tokens for {ANSWER_HEADER!r}, which begins an answer; expected a vocabulary with"
            " byte fallback"
        )


def header_tokens(tokenizer: Tokenizer) -> int:
    """How many tokens of an answer's section come before the answer."""
    return len(tokenizer.encode(ANSWER_HEADER))


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """What a model is given to write the next answer."""
    turns = [token for section in sections_of(messages) for token in (*tokenizer.encode(section), EOS_ID)]
    return turns + tokenizer.encode(ANSWER_HEADER)


def conversation_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """A whole conversation, and of each id whether it is an answer's (1) or not (0); its EOS is part of an answer."""
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
    """Many conversations through `encode`, which gives the ids of texts, each with its EOS.

    One of more than `max_tokens` tokens loses its last turns, so that it ends with the last answer that fits. `header`
    is what `header_tokens` says.
    """
    ids, lengths = encode([section for messages in conversations for section in sections_of(messages)])
    ends = np.concatenate(([0], np.cumsum(lengths)))
    assistant_mask = np.zeros(len(ids), dtype=np.uint8)
    is_kept = np.zeros(len(ids), dtype=bool)
    kept_lengths = []
    shortened = rejected = first = 0
    for messages in conversations:
        borders = ends[first : first + len(messages) + 1]
        first += len(messages)
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        fitting = [turn for turn in answers if borders[turn + 1] - borders[0] <= max_tokens]
        if not fitting:
            rejected += 1
            continue
        shortened += len(fitting) < len(answers)
        for turn in fitting:
            assistant_mask[borders[turn] + header : borders[turn + 1]] = 1
        end = borders[fitting[-1] + 1]
        is_kept[borders[0] : end] = True
        kept_lengths.append(end - borders[0])
    lengths = np.array(kept_lengths, dtype=np.int64)
    return EncodedConversations(ids[is_kept], assistant_mask[is_kept], lengths, shortened, rejected)
