"""Tokens prepared by other programs: Megatron's shards, and TinyLlama's LITPKDS chunks."""

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tinyllama_ds.bars import progress
from tinyllama_ds.data.prepare.inputs import grouped_by_size
from tinyllama_ds.data.shards import IndexHeader, InputFile, Manifest, ShardName, ShardWriter, read_dtype
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer, store_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import temporary_name, write_object

_READ_TOKENS = 2**22
_NO_TOKENS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Import:
    """Source, split and data directory of imported tokens; `tokenizer` is the one that they were made with."""

    source: str
    split: str
    tokenizer: Path
    output: Path


def _store_tokenizer(job: Import, inputs: list[Path], read: Callable[[Path], object]) -> Tokenizer:
    """The tokenizer, stored with the tokens once the headers of all inputs were read without an error."""
    tokenizer = load_tokenizer(job.tokenizer)
    tokenizer.reject_inconvertible()
    for path in inputs:
        read(path)
    store_tokenizer(tokenizer, job.output)
    return tokenizer


# --- Megatron ---------------------------------------------------------------------------------------------------------


def import_megatron(job: Import, inputs: list[Path]) -> list[Manifest]:
    """Link .bin/.idx pairs into the data directory, in the order given, and write their manifests.

    `inputs` are the .idx files. Raises `ConfigError` for a pair that is damaged or holds ids beyond the vocabulary.
    """
    tokenizer = _store_tokenizer(job, inputs, IndexHeader.read)
    manifests = []
    for number, index in enumerate(progress(inputs, desc=f"import {job.source}", unit="shard")):
        name = ShardName(job.output, job.source, job.split, number, len(inputs))
        manifest = _describe_megatron(index, name, tokenizer)
        name.prefix.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".bin", ".idx"):
            _link(index.with_suffix(suffix), name.prefix.with_suffix(suffix))
        write_object(name.prefix.with_suffix(".json"), asdict(manifest))
        manifests.append(manifest)
    return manifests


def _describe_megatron(index: Path, name: ShardName, tokenizer: Tokenizer) -> Manifest:
    header = IndexHeader.read(index)
    starts = header.document_starts()
    path = index.with_suffix(".bin")
    if not path.is_file() or path.stat().st_size != int(starts[-1]) * header.dtype.itemsize:
        raise ConfigError(f"{path}: does not hold the {starts[-1]} tokens of {header.dtype.name} that its index counts")
    smallest, largest, digest = tokenizer.vocab_size, -1, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_TOKENS * header.dtype.itemsize):
            ids = np.frombuffer(block, header.dtype)
            smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
            digest.update(block)
    if largest >= tokenizer.vocab_size or (smallest < 0 <= largest):
        raise ConfigError(
            f"{path}: ids from {smallest} to {largest} do not fit the {tokenizer.vocab_size} of the tokenizer"
        )
    return Manifest(
        source=name.source,
        split=name.split,
        number=name.number,
        shards=name.shards,
        tokens=int(starts[-1]),
        documents=header.documents,
        smallest_id=smallest,
        largest_id=largest,
        bin_sha256=digest.hexdigest(),
        idx_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        end_of_document="as in the imported shard",
        source_format={"imported_from": "MMIDIDX"},
        inputs=[_imported_file(path, header.documents)],
        dtype=header.dtype.name,
    )


def _link(target: Path, link: Path) -> None:
    """By a symbolic link: corpora are too large to copy, and hard links do not cross file systems."""
    partial = temporary_name(link)
    partial.symlink_to(target.resolve())
    partial.replace(link)


def _imported_file(path: Path, documents: int) -> InputFile:
    return InputFile(path.name, path.stat().st_size, records=documents, documents=documents)


# --- LITPKDS ----------------------------------------------------------------------------------------------------------

# lit_gpt/packed_dataset.py of TinyLlama's repository: magic, version, dtype code, tokens per chunk, then the tokens.
_LITPKDS_HEADER = struct.Struct("<7sQBQ")
_LITPKDS_MAGIC = b"LITPKDS"


def import_litpkds(job: Import, inputs: list[Path], shard_bytes: int = 256 * 2**20) -> list[Manifest]:
    """Turn TinyLlama's chunks, in the order given, into shards of about `shard_bytes`.

    Documents are cut after EOS, or before BOS where a file knows no EOS; one that runs on in the next chunk of the same
    process stays whole. Padding, a run of BOS at the end of a chunk, is dropped and counted (TinyLlama's issue 83).
    """
    tokenizer = _store_tokenizer(job, inputs, _chunk_of)
    groups = list(grouped_by_size(inputs, lambda path: path.stat().st_size, shard_bytes))
    chunks = _documents(inputs, tokenizer)
    manifests = []
    with progress(total=len(inputs), desc=f"import {job.source}", unit="chunk") as bar:
        for number, group in enumerate(groups):
            name = ShardName(job.output, job.source, job.split, number, len(groups))
            writer = ShardWriter(name, tokenizer.vocab_size)
            try:
                manifests.append(_import_group(writer, tokenizer, group, chunks))
            finally:
                writer.abandon()
            bar.update(len(group))
    return manifests


def _import_group(
    writer: ShardWriter, tokenizer: Tokenizer, group: list[Path], chunks: Iterator[tuple[list[np.ndarray], int]]
) -> Manifest:
    """Write the chunks of one shard."""
    inputs, padding = [], 0
    for path, (documents, dropped) in zip(group, chunks, strict=False):
        padding += dropped
        try:
            writer.add(np.concatenate([_NO_TOKENS, *documents]), np.array(list(map(len, documents)), dtype=np.int64))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        inputs.append(_imported_file(path, len(documents)))
    origin = {"imported_from": "LITPKDS", "filler_tokens_left_out": padding}
    return writer.commit(tokenizer.sha256, "as in the imported chunks", origin, inputs)


def _documents(inputs: list[Path], tokenizer: Tokenizer) -> Iterator[tuple[list[np.ndarray], int]]:
    """The documents that end in each chunk, and the number of its padding tokens."""
    open_document = _NO_TOKENS
    for path, following in zip(inputs, [*inputs[1:], None], strict=True):
        ids = read_litpkds(path)
        text = _without_padding(ids, tokenizer.bos_id)
        documents = _cut(np.concatenate((open_document, text)), tokenizer)
        runs_on = following is not None and _process_of(following) == _process_of(path) and len(documents) > 0
        open_document = documents.pop() if runs_on and documents[-1][-1] != tokenizer.eos_id else _NO_TOKENS
        yield documents, len(ids) - len(text)


def read_litpkds(path: Path) -> np.ndarray:
    """All ids of a chunk (n,) int64; raises `ConfigError` unless it is a complete LITPKDS file of integers."""
    return np.fromfile(path, dtype=_chunk_of(path), offset=_LITPKDS_HEADER.size).astype(np.int64)


def _chunk_of(path: Path) -> np.dtype:
    """The dtype of a chunk's ids, validated against the size of the file."""
    if not path.is_file():
        raise ConfigError(f"{path}: the chunk is missing")
    with path.open("rb") as file:
        head = file.read(_LITPKDS_HEADER.size)
    size = path.stat().st_size - _LITPKDS_HEADER.size
    if len(head) < _LITPKDS_HEADER.size or head[:7] != _LITPKDS_MAGIC:
        raise ConfigError(f"{path}: not a LITPKDS chunk")
    _, version, code, tokens = _LITPKDS_HEADER.unpack(head)
    dtype = read_dtype(version, code, path)
    if size != tokens * dtype.itemsize:
        raise ConfigError(f"{path}: {size} bytes do not hold {tokens} tokens of {dtype.name}")
    return dtype


def _without_padding(ids: np.ndarray, bos_id: int | None) -> np.ndarray:
    others = np.flatnonzero(ids != (-1 if bos_id is None else bos_id))
    end = int(others[-1]) + 1 if len(others) else 0
    return ids[:end] if len(ids) - end > 1 else ids


def _cut(ids: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
    if not len(ends) and tokenizer.bos_id is not None:
        ends = np.flatnonzero(ids == tokenizer.bos_id)
    return [document for document in np.split(ids, ends) if len(document)]


def _process_of(path: Path) -> str:
    """Chunks are named PREFIX_PROCESS_COUNTER.bin; those of one process follow each other without a gap."""
    return path.stem.rpartition("_")[0]
