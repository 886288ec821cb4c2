"""Token shards: Megatron's MMIDIDX pair of files and a JSON manifest that says what is in them.

`NAME.bin` is a plain run of little-endian token ids. `NAME.idx` is, little-endian and packed:
9 bytes magic, uint64 version 1, uint8 dtype code, uint64 sequences S, uint64 documents D + 1, then int32 length[S],
int64 byte offset[S], int64 first sequence of each document[D + 1]
(Megatron-LM, megatron/core/datasets/indexed_dataset.py).
One sequence is one document here, its EOS included. `NAME.json` is written last: a shard exists when it does.
"""

import hashlib
import json
import os
import struct
from array import array
from bisect import bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from tinyllama_ds import __version__
from tinyllama_ds.errors import Refusal

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class InputFile:
    """One raw file that went into a shard, and what became of its records."""

    path: str
    bytes: int
    documents: int
    rejected: dict[str, int]
    text_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a shard holds, and everything needed to prove it."""

    source: str
    split: str
    tokens: int
    documents: int
    smallest_id: int
    largest_id: int
    bin_sha256: str
    idx_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    end_of_document: str
    inputs: list[InputFile]
    tool_version: str
    manifest_version: int = MANIFEST_VERSION

    @staticmethod
    def read(path: Path) -> "Manifest":
        try:
            raw = json.loads(path.read_text())
            raw["inputs"] = [InputFile(**entry) for entry in raw["inputs"]]
            return Manifest(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise Refusal(f"{path}: not a shard manifest of version {MANIFEST_VERSION} ({error})") from error

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def token_dtype(vocab_size: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    """uint16 while every id fits, else int32 (Megatron has no uint32)."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


class ShardWriter:
    """Writes one shard under temporary names; `commit` syncs and renames .bin, .idx, then the manifest."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        self._bin = self._temporary(".bin").open("wb")
        self.tokens = 0
        self.smallest_id = vocab_size
        self.largest_id = -1

    def add(self, documents: list[list[int]]) -> None:
        """Append documents, each a list of ids with its EOS."""
        self._lengths.extend(map(len, documents))
        ids = np.fromiter((token for ids in documents for token in ids), dtype=np.int64)
        self.tokens += len(ids)
        self.smallest_id = min(self.smallest_id, int(ids.min()))
        self.largest_id = max(self.largest_id, int(ids.max()))
        payload = ids.astype(self._dtype).tobytes()
        self._hash.update(payload)
        self._bin.write(payload)

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def commit(self, source: str, split: str, tokenizer_sha256: str, eos_id: int, inputs: list[InputFile]) -> Manifest:
        """Make the shard durable and visible; returns its manifest."""
        _sync_and_close(self._bin)
        index = self._index()
        with self._temporary(".idx").open("wb") as file:
            file.write(index)
            _sync_and_close(file)
        manifest = Manifest(
            source=source,
            split=split,
            tokens=self.tokens,
            documents=self.documents,
            smallest_id=self.smallest_id,
            largest_id=self.largest_id,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=self._vocab_size,
            end_of_document=f"one EOS (id {eos_id}) after each document, no BOS",
            inputs=inputs,
            tool_version=__version__,
        )
        with self._temporary(".json").open("w") as file:
            file.write(manifest.to_json())
            _sync_and_close(file)
        for suffix in (".bin", ".idx", ".json"):
            self._temporary(suffix).replace(self._prefix.with_suffix(suffix))
        return manifest

    def abandon(self) -> None:
        """Remove what was written so far."""
        self._bin.close()
        for suffix in (".bin", ".idx", ".json"):
            self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        return self._prefix.with_name(f".{self._prefix.name}{suffix}.partial")

    def _index(self) -> bytes:
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        offsets = np.concatenate(([0], ends[:-1])) if len(ends) else ends
        document_starts = np.arange(len(lengths) + 1, dtype="<i8")
        code = next(code for code, dtype in _DTYPE_CODES.items() if dtype == self._dtype.type)
        header = _HEADER.pack(_MAGIC, 1, code, len(lengths), len(document_starts))
        return header + lengths.astype("<i4").tobytes() + offsets.astype("<i8").tobytes() + document_starts.tobytes()


def _sync_and_close(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class ShardReader:
    """Random access to one shard's tokens, with pread: a file cut short is an error with a place, not a SIGBUS."""

    def __init__(self, prefix: Path) -> None:
        self.bin_path = prefix.with_suffix(".bin")
        self.manifest = Manifest.read(prefix.with_suffix(".json"))
        self.dtype, self.lengths = read_index(prefix.with_suffix(".idx"))
        self.tokens = int(self.lengths.sum(dtype=np.int64))
        self._file = os.open(self.bin_path, os.O_RDONLY)
        size = os.fstat(self._file).st_size
        if size != self.tokens * self.dtype.itemsize:
            raise Refusal(f"{self.bin_path}: {size} bytes, but its index counts {self.tokens} tokens")
        if self.manifest.tokens != self.tokens:
            raise Refusal(f"{self.bin_path}: {self.tokens} tokens, but its manifest says {self.manifest.tokens}")

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count)."""
        raw = os.pread(self._file, count * self.dtype.itemsize, start * self.dtype.itemsize)
        if len(raw) != count * self.dtype.itemsize:
            raise Refusal(f"{self.bin_path}: cut short while it was read, at token {start}")
        return np.frombuffer(raw, dtype=self.dtype)

    def close(self) -> None:
        os.close(self._file)


def read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """The token dtype and the document lengths of an .idx file, every bound checked before anything is allocated."""
    if not path.is_file():
        raise Refusal(f"{path}: the shard's index is missing")
    content = path.read_bytes()
    if len(content) < _HEADER.size or content[:9] != _MAGIC:
        raise Refusal(f"{path}: not a MMIDIDX index")
    _, version, code, sequences, documents = _HEADER.unpack_from(content)
    if version != 1 or code not in _DTYPE_CODES:
        raise Refusal(f"{path}: version {version} and dtype code {code}; expected version 1 and an integer dtype")
    if len(content) != _HEADER.size + 12 * sequences + 8 * documents:
        raise Refusal(
            f"{path}: {len(content)} bytes do not hold {sequences} sequences and {documents} document borders"
        )
    dtype = np.dtype(_DTYPE_CODES[code]).newbyteorder("<")
    lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size)
    if sequences and lengths.min() < 0:
        raise Refusal(f"{path}: a document of negative length")
    return dtype, lengths


class TokenStream:
    """All shards of one source and split as one run of tokens, and that run as samples of T + 1 tokens.

    Sample i is tokens [iT, iT + T]: stride T with one token of overlap, so that every token but the first is a target
    exactly once. Only the remainder of less than T tokens at the very end is left over.
    """

    def __init__(self, directory: Path) -> None:
        prefixes = sorted(path.with_suffix("") for path in directory.glob("*.json"))
        if not prefixes:
            raise Refusal(f"{directory}: holds no token shards; expected *.bin, *.idx and *.json made by prepare")
        self.directory = directory
        self.shards = [ShardReader(prefix) for prefix in prefixes]
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + shard.tokens)

    @property
    def tokens(self) -> int:
        return self._starts[-1]

    @property
    def manifests(self) -> list[Manifest]:
        return [shard.manifest for shard in self.shards]

    def num_samples(self, sequence_length: int) -> int:
        return max(0, (self.tokens - 1) // sequence_length)

    def sample(self, index: int, sequence_length: int) -> np.ndarray:
        """Sample `index`: T + 1 tokens, across shard borders where it must."""
        return self.read(index * sequence_length, sequence_length + 1)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream."""
        pieces = []
        while count > 0:
            number = bisect_right(self._starts, start) - 1
            available = min(count, self._starts[number + 1] - start)
            pieces.append(self.shards[number].read(start - self._starts[number], available))
            start, count = start + available, count - available
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def place(self, position: int) -> str:
        """Shard file and token offset of a stream position, for error messages."""
        number = bisect_right(self._starts, position) - 1
        return f"{self.shards[number].bin_path} at token {position - self._starts[number]}"

    def close(self) -> None:
        for shard in self.shards:
            shard.close()
