"""`tokenizer.json`: byte-level BPE of the tokenizers library, as Llama 3's and SmolLM2's.

The file does not tell which of its tokens begin, end and pad a document. In order of precedence that is in
`tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` or `config.json` next to it.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import tokenizers

from tinyllama_ds.data.tokenizers.abstract import Encoded, Tokenizer
from tinyllama_ds.data.tokenizers.vocabulary import PROBE_TEXTS, encode_fast
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import parse_row, read_object
from tinyllama_ds.layout import SPECIAL_TOKENS, TOKENIZER_JSON

_OTHER_ROLES = ("bos_token", "pad_token", "unk_token")
_ROLES = ("eos_token", *_OTHER_ROLES)
# Of a tokenizer.json: what comes before and after the ids of a text. It has no part in the identity of a tokenizer.
_NOT_USED = ("truncation", "padding", "post_processor")
_FILES_WITH_ROLES = ("tokenizer_config.json", SPECIAL_TOKENS, "generation_config.json", "config.json")


class FastTokenizer(Tokenizer):
    """A `tokenizer.json` with a BPE model."""

    library = "tokenizers"
    cuts_turns = True  # line breaks are part of longer pieces

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        described = parse_row(content)
        kind = _kind_of(described)
        if described is None or kind is None:
            raise ConfigError(f"{path}: not a tokenizer.json, it is damaged or has no model; copy it again")
        if kind != "BPE":
            raise ConfigError(f"{path}: has a model of the type {kind!r:.40}; expected BPE, as Llama 3's and SmolLM2's")
        canonical = json.dumps(described | dict.fromkeys(_NOT_USED), ensure_ascii=False)
        try:
            self._fast = tokenizers.Tokenizer.from_str(canonical)
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{path}: the tokenizers library cannot read it ({str(error):.200})") from error
        self._fast.encode_special_tokens = True
        self._added = described.get("added_tokens") or []
        self._added_ids = {token["id"] for token in self._added}
        self._check_added_tokens()
        pieces = self._fast.get_vocab()
        self.vocab_size = max(pieces.values(), default=-1) + 1
        missing = [byte for byte, character in enumerate(byte_characters()) if character not in pieces]
        self._missing = bytes(missing if is_byte_level(described.get("pre_tokenizer")) else [])
        roles = self._read_roles(pieces)
        self.eos_id = pieces[roles["eos_token"]]
        self.bos_id, self.pad_id, self.unk_id = (pieces.get(roles.get(role, "")) for role in _OTHER_ROLES)
        described_roles = json.dumps(roles, indent=2, ensure_ascii=False)
        self.files = {TOKENIZER_JSON: canonical.encode(), SPECIAL_TOKENS: f"{described_roles}\n".encode()}

    def _check_added_tokens(self) -> None:
        """No two claim one id, and no text could be matched in two ways; runs of white space are matched as a whole."""
        texts = [token["content"] for token in self._added]
        moved = next((token for token in self._added if self._fast.token_to_id(token["content"]) != token["id"]), None)
        if moved is not None or len(set(texts)) < len(texts):
            text = moved["content"] if moved else next(text for text in texts if texts.count(text) > 1)
            raise ConfigError(
                f"{self.path}: its added token {text!r:.80} overlaps with a different token of the same id or text;"
                " expected one id for each"
            )
        pairs = combinations([text for text in texts if text.strip()], 2)
        both = next((pair for pair in pairs if _overlap(*pair) or _overlap(*pair[::-1])), None)
        if both is not None:
            raise ConfigError(
                f"{self.path}: its added tokens {both[0]!r:.80} and {both[1]!r:.80} overlap, so that a text could be"
                " encoded in two ways; expected tokens of which none begins within another"
            )

    def _read_roles(self, pieces: dict[str, int]) -> dict[str, str]:
        """The special tokens by role. Raises `ConfigError` where none separates documents, or one is not a piece."""
        found: dict[str, str] = {}
        names = {number: piece for piece, number in pieces.items()}
        for name in _FILES_WITH_ROLES:
            file = self.path.parent / name
            for role, token in _roles_in(file, names) if file.is_file() else ():
                if token not in pieces:
                    raise ConfigError(f"{file}: its {role} {token!r:.80} is not a token of {self.path}")
                found.setdefault(role, token)
        if "eos_token" not in found:
            raise ConfigError(
                f"{self.path}: its eos_token, which separates documents, is unknown; expected it in one of"
                f" {', '.join(_FILES_WITH_ROLES)} in the same folder"
            )
        return {role: found[role] for role in _ROLES if role in found}

    @property
    def has_symbols(self) -> bool:
        return not all(token.get("special") for token in self._added)

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        return encode_fast(self._fast, texts)

    def decode(self, ids: list[int]) -> str:
        special = set(self.special_ids)
        return self._fast.decode([number for number in ids if number not in special], skip_special_tokens=False)

    def readable(self, text: str) -> str:
        if self.drops_bytes_of(text):
            return self.decode(self.encode(text))
        return self._fast.normalizer.normalize_str(text) if self._fast.normalizer else text

    def drops_bytes_of(self, text: str) -> bool:
        content = text.encode()
        return len(content.translate(None, self._missing)) < len(content)

    def piece_texts(self) -> list[str]:
        return self._fast.decode_batch([[number] for number in range(self.vocab_size)], skip_special_tokens=False)

    def is_plain(self, number: int) -> bool:
        return number not in self._added_ids

    def control_tokens(self) -> list[str]:
        special = [token["content"] for token in self._added if token.get("special")]
        roles = [token for number in self.special_ids if (token := self._fast.id_to_token(number))]
        return list(dict.fromkeys([*roles, *special]))

    def to_fast(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._fast.to_str())

    def reject_inconvertible(self) -> None:
        for text in PROBE_TEXTS:
            ids = self.encode(text)
            if self.decode(ids) != self.readable(text) or self.unk_id in ids:
                raise ConfigError(
                    f"{self.path}: decoding the ids of {text[:40]!r} does not give the text; expected byte-level BPE"
                )

    def reject_for_chat(self, header: str) -> None:
        """No message merges with its header, which is encoded apart."""
        if self.decode(self.encode(header)) != header:
            raise ConfigError(
                f"{self.path}: has no tokens for {header!r}, which begins an answer; expected byte-level BPE"
            )


def is_byte_level(pre_tokenizer: dict | None) -> bool:
    """Whether a text is encoded by its bytes, given what splits it into words."""
    return "ByteLevel" in json.dumps(pre_tokenizer)


def byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: printable ones of Latin-1 for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _kind_of(described: dict | None) -> str | None:
    """The type of the model; older files of BPE models do not tell it."""
    model = (described or {}).get("model")
    if not isinstance(model, dict):
        return None
    return model.get("type") or ("BPE" if "merges" in model else None)


def _overlap(one: str, other: str) -> bool:
    """Whether a text of one token continues as the other, or contains it."""
    return other in one or any(one.endswith(other[:size]) for size in range(1, len(other)))


def _roles_in(file: Path, names: dict[int, str]) -> Iterator[tuple[str, str]]:
    """The special tokens that a file of a Hugging Face folder names, as text or by id; `names` are the texts by id."""
    try:
        content = read_object(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    if content is None:
        raise ConfigError(f"{file}: is damaged; expected a JSON object with the special tokens")
    for role in _ROLES:
        token, number = content.get(role), content.get(f"{role}_id")
        if isinstance(token, dict):  # as an added token with its settings
            token = token.get("content")
        if token is None and number is not None:
            first = number[0] if isinstance(number, list) and number else number  # a list of all that end a text
            token = names.get(first) if isinstance(first, int) else None
            if token is None:
                raise ConfigError(f"{file}: its {role}_id {first!r:.40} is not the id of a token")
        if isinstance(token, str) and token:
            yield role, token
