"""The published corpora: where a record has its text, and which of their subsets are used.

No record is dropped silently: each becomes a text, a rejection with its reason, or a fault with its file and line.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from pydantic import ConfigDict

from tinyllama_ds.data.chat import Message
from tinyllama_ds.errors import ConfigError

SPLITS = ("train", "validation", "test")
_TOKENS_WITHOUT_BYTES = 2  # EOS, and the space that sentencepiece adds before a text; others are a byte or more
META_FIELD = "meta"  # of a record of a published corpus
_KINDS = {
    str: "a text",
    bytes: "bytes",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True)
class SourceFormat:
    """Where a corpus has its text, and which of its subsets are used.

    A record's subset is in its metadata under `subset_field`; where a corpus has no such field, a file's subset
    is its folder. `subsets` are the chosen ones, None for all but `excluded`. Documents of fewer than `min_tokens`
    tokens, EOS included, are rejected.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    text_field: str = "text"
    subset_field: str | None = None
    subsets: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()
    min_tokens: int = 0

    @property
    def folders(self) -> frozenset[str]:
        """The chosen subsets of a corpus that keeps its subsets in folders; empty where all are used."""
        return self.subsets if self.subsets is not None and self.subset_field is None else frozenset()

    @property
    def too_short(self) -> str:
        """The rule that rejects a document of fewer than `min_tokens` tokens."""
        return f"fewer than {self.min_tokens} tokens"

    def includes(self, subset: str) -> bool:
        return subset not in self.excluded if self.subsets is None else subset in self.subsets

    @property
    def keys(self) -> frozenset[str]:
        """The keys of a record that are read; none of them may be given twice."""
        return frozenset({self.text_field, *([META_FIELD, self.subset_field] if self.subset_field else [])})

    @property
    def expected_columns(self) -> str:
        """What `columns` looks for, for error messages."""
        return repr(self.text_field)

    def columns(self, present: Sequence[str]) -> list[str]:
        """The columns of a parquet file that are read; empty where one that is needed is missing."""
        return [name for name in present if name in self.keys] if self.text_field in present else []

    def record(self, raw: object, place: str) -> "Record":
        """The content of a record of a file, or why there is none to train on; `place` names it."""
        text = raw.get(self.text_field) if isinstance(raw, dict) else None
        if not isinstance(raw, dict) or not isinstance(text, str):
            expected = f"{place}: expected a record with a text under {self.text_field!r}"
            return Record(fault=f"{expected}, {instead_of(raw, self.text_field)}")
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair, which is not a character
            return Record(fault=f"{place}: a lone surrogate at character {error.start} of {self.text_field!r}")
        if not text:
            return Record(rejected="empty text")
        if self.subset_field is not None:
            subset = _subset_of(raw, self.subset_field)
            if subset not in SLIMPAJAMA_SUBSETS:
                return Record(fault=f"{place}: {_unknown_subset(subset, self.subset_field)}")
            if not self.includes(subset):
                return Record(rejected=f"subset {subset}")
        if size + _TOKENS_WITHOUT_BYTES < self.min_tokens:  # without encoding it
            return Record(rejected=self.too_short)
        return Record(text, size)

    def to_dict(self) -> dict:
        """As in a manifest. `min_tokens` is in it only if it is used, so that older shards stay valid."""
        content = asdict(self) | {
            "subsets": None if self.subsets is None else sorted(self.subsets),
            "excluded": sorted(self.excluded),
        }
        return {key: value for key, value in content.items() if (key, value) != ("min_tokens", 0)}


def instead_of(raw: object, key: str) -> str:
    """What was found instead of a text, for a message."""
    if isinstance(raw, list):
        return "found an array (jq -c '.[]' FILE writes one record a line)"
    if not isinstance(raw, dict):
        return f"found {_KINDS.get(type(raw), 'a different value')}"
    if key in raw:
        return f"which holds {_KINDS.get(type(raw[key]), 'a different value')}"
    return f"which is not among its keys: {', '.join(f'{key!r:.40}' for key in list(raw)[:10]) or 'it has none'}"


def _subset_of(raw: dict, key: str) -> object:
    """As published, in an object under `meta`; copies of a corpus have it as JSON, or its key in the record itself."""
    meta = raw.get(META_FIELD)
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except (ValueError, RecursionError):
            meta = None
    return meta[key] if isinstance(meta, dict) and key in meta else raw.get(key)


def _unknown_subset(subset: object, key: str) -> str:
    if subset is None:
        return f"has no {key!r} under {META_FIELD!r}, so its subset is unknown"
    return f"{key!r} is {subset!r:.40}; expected one of {', '.join(SLIMPAJAMA_SUBSETS)}"


SLIMPAJAMA_SUBSETS = tuple(
    f"RedPajama{name}" for name in ("CommonCrawl", "C4", "Github", "Book", "ArXiv", "Wikipedia", "StackExchange")
)
# SlimPajama's GitHub part is excluded because StarCoderData has the code (TinyLlama paper, section 2.1).
SOURCES: dict[str, SourceFormat] = {
    "slimpajama": SourceFormat("text", "redpajama_set_name", excluded=frozenset({"RedPajamaGithub"})),
    "starcoderdata": SourceFormat("content"),
    "proof-pile-2": SourceFormat("text"),
    "skypile": SourceFormat("text"),
}


def source_format(
    name: str, text_field: str | None = None, subsets: list[str] | None = None, min_tokens: int = 0
) -> SourceFormat:
    """The format of a published corpus by its name; any other name is a corpus of the user's own.

    Raises `ConfigError` for a subset that SlimPajama does not have; subsets of other corpora are folders, which
    `find_inputs` checks.
    """
    known = SOURCES.get(name, SourceFormat())
    for subset in subsets or []:
        if known.subset_field and subset not in SLIMPAJAMA_SUBSETS:
            raise ConfigError(f"{name}: has no subset {subset!r}; its subsets are {', '.join(SLIMPAJAMA_SUBSETS)}")
    chosen = frozenset(subsets) if subsets else None
    return SourceFormat(text_field or known.text_field, known.subset_field, chosen, known.excluded, min_tokens)


@dataclass(frozen=True)
class Record:
    """One record of a file: a text or the turns of a conversation, or why there is neither.

    `rejected` is the rule that rejected it (a subset, an empty text); `fault` is a place and the problem there.
    """

    text: str = ""
    text_bytes: int = 0
    rejected: str | None = None
    fault: str | None = None
    messages: tuple["Message", ...] = ()
    shortened: str | None = None  # what was dropped from a conversation
