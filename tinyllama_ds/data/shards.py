"""Token shards: Megatron's MMIDIDX pair of files and a JSON manifest that describes them.

`NAME.bin` is an array of little-endian token ids. `NAME.idx` is, little-endian and packed:
9 bytes magic, uint64 version 1, uint8 dtype code, uint64 sequences S, uint64 documents D + 1, then int32 length[S],
int64 byte offset[S], int64 first sequence of each document[D + 1]
(Megatron-LM, megatron/core/datasets/indexed_dataset.py).
One sequence is one document here, its EOS included. `NAME.json` is written last: a shard exists when it does.

A shard of conversations has a loss mask in `NAME.mask`: one byte for each token, 1 where it is part of an answer, a
target of fine-tuning, else 0.
"""

import errno
import hashlib
import os
import struct
import time
from array import array
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict

from tinyllama_ds import __version__
from tinyllama_ds.config.validation import validate_json, whole_number
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import PartialFile, parse_row, write_durably, write_object

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_READ_AGAIN_SECONDS = (1.0, 2.0, 4.0)  # to wait after a short read
_DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # LITPKDS has the same
MANIFEST_VERSION: Literal[1] = 1
_Count = Annotated[int, whole_number()]
_Id = Annotated[int, whole_number(-(2**31), 2**31)]  # of a token


@dataclass(frozen=True)
class InputFile:
    """One raw file of a shard; its records are documents + rejected + faults."""

    path: str
    bytes: _Count
    records: _Count
    documents: _Count
    rejected: dict[str, _Count] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    text_bytes: _Count = 0
    encoder: str = "imported"
    shortened: dict[str, _Count] = field(default_factory=dict)  # conversations that were cut, among the documents


@dataclass(frozen=True)
class Manifest:
    """What a shard holds, and everything needed to verify it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    source: str
    split: str
    number: _Count  # of this shard, from 0
    shards: _Count  # of this source and split
    tokens: _Count
    documents: _Count
    smallest_id: _Id
    largest_id: _Id
    bin_sha256: str
    idx_sha256: str
    tokenizer_sha256: str
    vocab_size: _Count
    end_of_document: str
    source_format: dict  # how the inputs were read
    inputs: list[InputFile]
    tool_version: str = __version__
    manifest_version: Literal[1] = MANIFEST_VERSION
    mask_sha256: str | None = None  # of a shard of conversations
    dtype: str | None = None  # of the ids, as numpy calls it; older manifests leave it to the index

    @staticmethod
    def read(path: Path) -> "Manifest":
        """Raises `ConfigError` unless it is a complete manifest of this version."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: the shard's manifest cannot be read ({error.strerror})") from error
        if parse_row(content) is None:
            raise ConfigError(f"{path}: not a shard manifest, it is damaged; remove it and prepare the shard again")
        return validate_json(Manifest, content, f"{path}: not a shard manifest of version {MANIFEST_VERSION}")


@dataclass(frozen=True)
class ShardName:
    """Where a shard lies: `<data>/<source>/<split>/shard_<number>`, one of `shards`."""

    data: Path
    source: str
    split: str
    number: int
    shards: int

    def __post_init__(self) -> None:
        if not self.source or self.source != Path(self.source).name or self.source.startswith((".", "-")):
            raise ConfigError(f"source {self.source!r}: expected the name of a folder to make in {self.data}")

    @property
    def prefix(self) -> Path:
        return self.data / self.source / self.split / f"shard_{self.number:05d}"


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits, else int32 (Megatron has no uint32)."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")


def read_dtype(version: int, code: int, path: Path) -> np.dtype:
    """The type of the ids of an MMIDIDX or LITPKDS file, by its header; raises `ConfigError` for an unknown one."""
    if version != 1 or code not in _DTYPE_CODES:
        raise ConfigError(f"{path}: version {version} and dtype code {code}; expected version 1 and an integer dtype")
    return np.dtype(_DTYPE_CODES[code]).newbyteorder("<")


def shard_suffixes(has_mask: bool) -> list[str]:
    """The files of a shard in the order of their commit; the manifest is the last."""
    return [".bin", *([".mask"] if has_mask else []), ".idx", ".json"]


class ShardWriter:
    """Writes one shard under temporary names; `commit` makes .bin, .mask, .idx durable and visible, then the manifest.

    Two processes may write the same shard: both write the same bytes, and the later rename wins.
    """

    def __init__(self, name: ShardName, vocab_size: int, has_mask: bool = False) -> None:
        self._name = name
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        name.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = PartialFile(name.prefix.with_suffix(".bin"))
        self._mask = PartialFile(name.prefix.with_suffix(".mask")) if has_mask else None
        self._mask_hash = hashlib.sha256()
        self.tokens = 0
        self.smallest_id = vocab_size
        self.largest_id = -1

    def add(self, ids: np.ndarray, lengths: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append documents: their concatenated ids, each with its EOS, the length of each, and for conversations the
        loss mask of the ids (uint8).
        """
        if len(ids) == 0:
            return
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= self._vocab_size:
            raise ValueError(f"token ids {smallest} to {largest} do not fit a vocabulary of {self._vocab_size}")
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += len(ids)
        self.smallest_id, self.largest_id = min(self.smallest_id, smallest), max(self.largest_id, largest)
        payload = ids.astype(self._dtype).tobytes()
        self._hash.update(payload)
        self._bin.write(payload)
        if self._mask is not None:
            assert mask is not None
            self._mask_hash.update(mask.tobytes())
            self._mask.write(mask.tobytes())

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def commit(
        self, tokenizer_sha256: str, end_of_document: str, source_format: dict, inputs: list[InputFile]
    ) -> Manifest:
        """Make the shard durable and visible; returns its manifest."""
        index = self._index()
        manifest = Manifest(
            source=self._name.source,
            split=self._name.split,
            number=self._name.number,
            shards=self._name.shards,
            tokens=self.tokens,
            documents=self.documents,
            smallest_id=self.smallest_id,
            largest_id=self.largest_id,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=self._vocab_size,
            end_of_document=end_of_document,
            source_format=source_format,
            inputs=inputs,
            mask_sha256=self._mask_hash.hexdigest() if self._mask is not None else None,
            dtype=self._dtype.name,
        )
        self._bin.commit()
        if self._mask is not None:
            self._mask.commit()
        write_durably(self._name.prefix.with_suffix(".idx"), index)
        write_object(self._name.prefix.with_suffix(".json"), asdict(manifest))
        return manifest

    def abandon(self) -> None:
        """Remove what was written but not committed."""
        self._bin.abandon()
        if self._mask is not None:
            self._mask.abandon()

    def _index(self) -> bytes:
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        document_starts = np.arange(len(lengths) + 1, dtype="<i8")
        code = next(code for code, dtype in _DTYPE_CODES.items() if dtype == self._dtype.type)
        header = _HEADER.pack(_MAGIC, 1, code, len(lengths), len(document_starts))
        offsets = ends - lengths * self._dtype.itemsize
        return header + lengths.tobytes() + offsets.tobytes() + document_starts.tobytes()


@dataclass(frozen=True)
class IndexHeader:
    """The first 34 bytes of an .idx file, validated against the size of the file."""

    path: Path
    dtype: np.dtype
    sequences: int
    documents: int

    @staticmethod
    def read(path: Path) -> "IndexHeader":
        """Raises `ConfigError` unless it is a complete MMIDIDX index; allocates no more than the size of the file."""
        if not path.is_file():
            raise ConfigError(f"{path}: the shard's index is missing")
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
        if len(head) < _HEADER.size or head[:9] != _MAGIC:
            raise ConfigError(f"{path}: not a MMIDIDX index")
        _, version, code, sequences, boundaries = _HEADER.unpack(head)
        dtype = read_dtype(version, code, path)
        if boundaries < 1 or size != _HEADER.size + 12 * sequences + 8 * boundaries:
            raise ConfigError(
                f"{path}: {size} bytes do not hold {sequences} sequences and {boundaries} document boundaries"
            )
        return IndexHeader(path, dtype, sequences, boundaries - 1)

    def lengths(self) -> np.ndarray:
        """Tokens of each sequence (sequences,) int32; raises `ConfigError` for a negative one."""
        lengths = self._read("<i4", self.sequences, _HEADER.size)
        if len(lengths) and lengths.min() < 0:
            raise ConfigError(f"{self.path}: a sequence of negative length")
        return lengths

    def document_starts(self) -> np.ndarray:
        """First token of each document, and one past the last token (documents + 1,) int64."""
        starts = np.concatenate(([0], np.cumsum(self.lengths(), dtype=np.int64)))
        boundaries = self._read("<i8", self.documents + 1, _HEADER.size + 12 * self.sequences)
        if boundaries[0] != 0 or boundaries[-1] != self.sequences or (np.diff(boundaries) < 0).any():
            raise ConfigError(
                f"{self.path}: its document boundaries do not run from 0 to its {self.sequences} sequences"
            )
        return starts[boundaries]

    def document_starts_between(self, start: int, end: int) -> np.ndarray:
        """First tokens of the documents that begin in [start, end), by bisection, without loading the index."""
        pointers = _HEADER.size + 4 * self.sequences
        boundaries = _HEADER.size + 12 * self.sequences
        with self.path.open("rb") as file:

            def first_token(document: int) -> int:
                sequence = _int64_at(file, boundaries + 8 * document)
                if sequence == self.sequences:  # documents without tokens at the end
                    return end
                return _int64_at(file, pointers + 8 * sequence) // self.dtype.itemsize

            first = bisect_left(range(self.documents), start, key=first_token)
            last = bisect_left(range(self.documents), end, lo=first, key=first_token)
            return np.array([first_token(document) for document in range(first, last)], dtype=np.int64)

    def _read(self, dtype: str, count: int, offset: int) -> np.ndarray:
        return np.fromfile(self.path, dtype=dtype, count=count, offset=offset)


def _int64_at(file: IO[bytes], offset: int) -> int:
    return int.from_bytes(os.pread(file.fileno(), 8, offset), "little", signed=True)


class ShardReader:
    """Random access to one shard's tokens, with pread: a truncated file is an error with a place, not a SIGBUS.

    A file is open only while it is read: a corpus may have more shards than a process may have open files.
    """

    def __init__(self, prefix: Path) -> None:
        self.bin_path = prefix.with_suffix(".bin")
        self.mask_path = prefix.with_suffix(".mask")
        self.manifest = Manifest.read(prefix.with_suffix(".json"))
        self.index = IndexHeader.read(prefix.with_suffix(".idx"))
        self.tokens = self.manifest.tokens
        if not self.bin_path.is_file():
            raise ConfigError(f"{self.bin_path}: the shard's tokens are missing")
        if self.manifest.dtype not in (None, self.index.dtype.name):
            raise ConfigError(
                f"{self.index.path}: its ids are {self.index.dtype.name}, but its manifest has {self.manifest.dtype}"
            )
        size = self.bin_path.stat().st_size
        if size != self.tokens * self.index.dtype.itemsize:
            raise ConfigError(
                f"{self.bin_path}: {size} bytes of {self.index.dtype.name}, but its manifest has {self.tokens} tokens"
            )
        if self.index.documents != self.manifest.documents:
            raise ConfigError(
                f"{self.index.path}: {self.index.documents} documents, but its manifest has {self.manifest.documents}"
            )
        if self.has_mask and not (self.mask_path.is_file() and self.mask_path.stat().st_size == self.tokens):
            raise ConfigError(f"{self.mask_path}: expected one byte for each of the shard's {self.tokens} tokens")

    @property
    def has_mask(self) -> bool:
        """Whether the shard holds conversations, with a loss mask."""
        return self.manifest.mask_sha256 is not None

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count)."""
        return read_array(self.bin_path, self.index.dtype, start, count)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """The loss mask of tokens [start, start + count): 1 for tokens of answers, else 0, in uint8."""
        return read_array(self.mask_path, np.dtype(np.uint8), start, count)

    @property
    def document_starts(self) -> np.ndarray:
        """First token of each document, and one past the last token (documents + 1,) int64."""
        starts = self.index.document_starts()
        if starts[-1] != self.tokens:
            raise ConfigError(f"{self.index.path}: counts {starts[-1]} tokens, but its manifest has {self.tokens}")
        return starts


def read_array(path: Path, dtype: np.dtype, start: int, count: int) -> np.ndarray:
    """Elements [start, start + count) of a file that holds nothing but such elements.

    Raises OSError where the file is shorter than it was, after retries: network storage may recover.
    """
    for seconds in _READ_AGAIN_SECONDS:
        raw = _read_at(path, start * dtype.itemsize, count * dtype.itemsize)
        if len(raw) == count * dtype.itemsize:
            return np.frombuffer(raw, dtype=dtype)
        time.sleep(seconds)
    raise OSError(errno.EIO, f"truncated while it was read, at token {start}", str(path))


def _read_at(path: Path, offset: int, size: int) -> bytes:
    """Up to `size` bytes; one pread may return fewer than there are."""
    raw = b""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while len(raw) < size and (more := os.pread(descriptor, size - len(raw), offset + len(raw))):
            raw += more
    finally:
        os.close(descriptor)
    return raw
