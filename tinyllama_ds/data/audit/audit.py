"""The audit of a data directory: every claim of its manifests is checked against the files."""

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from tinyllama_ds.bars import progress
from tinyllama_ds.data.audit.packing import PackingAudit
from tinyllama_ds.data.chat import conversation_ids
from tinyllama_ds.data.prepare.conversations import ChatFormat, format_from_dict
from tinyllama_ds.data.prepare.coverage import Coverage
from tinyllama_ds.data.prepare.duplicates import count_duplicates, hash_documents
from tinyllama_ds.data.prepare.reading import read_records
from tinyllama_ds.data.prepare.sources import SPLITS, Record, SourceFormat
from tinyllama_ds.data.shards import ShardReader
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.data.teacher import damaged_shards
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import sha256_of

SUSPICIOUS_RUN = 256  # equal ids in a row; the padding of TinyLlama's bug 83 came by the thousand
SUSPICIOUS_DRIFT = 0.5  # total variation between the unigrams of a shard and of its source, from 0 to 1
_CHUNK = 2**22  # tokens counted together
_LENGTH_BINS = 32  # documents of 2^n to 2^(n+1) - 1 tokens


@dataclass(frozen=True)
class ShardAudit:
    """What one shard holds, counted from its tokens; `problems` are contradictions to its manifest."""

    name: str
    group: str  # source and split
    tokens: int
    unigrams: np.ndarray  # occurrences of each id (vocab_size,)
    document_lengths: np.ndarray  # documents by the power of two of their tokens (32,)
    document_hashes: np.ndarray  # 64 bits of each document, sorted (documents,)
    longest_run: tuple[int, int]  # how many equal ids in a row, and which id
    compared_with_raw: int
    inputs: list[str]  # the raw files in it; none for imported tokens
    problems: list[str]

    @property
    def documents(self) -> int:
        return len(self.document_hashes)


@dataclass
class DataAudit:
    """All shards, and the results of comparing them."""

    shards: list[ShardAudit]
    coverage: Coverage | None = None  # of a run by its samples
    packing: list[PackingAudit] = field(default_factory=list)  # of each source
    duplicates: dict[str, int] = field(default_factory=dict)  # "a/train" or "a/train and b/train" to documents
    drift: dict[str, float] = field(default_factory=dict)  # shard to its distance from its source
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def compared_with_raw(self) -> int:
        return sum(shard.compared_with_raw for shard in self.shards)

    @property
    def groups(self) -> dict[str, list[ShardAudit]]:
        """The shards of each source and split."""
        groups: dict[str, list[ShardAudit]] = {}
        for shard in self.shards:
            groups.setdefault(shard.group, []).append(shard)
        return groups


def audit_data(
    data: Path, raw: Mapping[str, Path], samples: int, workers: int, coverage: Coverage | None = None
) -> DataAudit:
    """Read every token of a data directory, and compare `samples` documents of every shard with the raw input.

    `raw` has the input directories of the sources to compare. The problems and warnings of `coverage` are added.
    """
    tokenizer = load_tokenizer(data)
    directories = [path for source in sorted(data.iterdir()) for split in SPLITS if (path := source / split).is_dir()]
    if not directories:
        raise ConfigError(f"{data}: holds no prepared source; expected <source>/<split>/ with shards")
    unknown = sorted(set(raw) - {directory.parent.name for directory in directories})
    if unknown:
        raise ConfigError(f"{data}: holds no source {unknown[0]!r}, which --raw names")
    prefixes = [shard.bin_path.with_suffix("") for directory in directories for shard in TokenStream(directory).shards]
    raws = [raw.get(prefix.parent.parent.name) for prefix in prefixes]
    audit_shard = functools.partial(_audit_shard, tokenizer.path, samples)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        audited = pool.map(audit_shard, prefixes, raws)
        shards = list(progress(audited, total=len(prefixes), desc="audit", unit="shard"))
    audit = DataAudit(shards, coverage)
    audit.problems = [f"{shard.name}: {problem}" for shard in shards for problem in shard.problems]
    audit.problems += [problem for directory in directories for problem in damaged_shards(directory)]
    _compare_shards(audit)
    if coverage is not None:
        audit.problems += coverage.problems
        audit.warnings += coverage.warnings
    return audit


# --- one shard --------------------------------------------------------------------------------------------------------


def _audit_shard(tokenizer_file: Path, samples: int, prefix: Path, raw: Path | None) -> ShardAudit:
    tokenizer = load_tokenizer(tokenizer_file)
    shard = ShardReader(prefix)
    manifest = shard.manifest
    tokens = shard.read(0, shard.tokens)
    try:
        starts, problems = shard.document_starts, []
    except ConfigError as error:
        starts, problems = np.array([0, shard.tokens]), [str(error)]
    unigrams = _count_ids(tokens, tokenizer.vocab_size)
    problems += _contradictions(shard, tokens, starts, unigrams, tokenizer)
    compared = 0
    if raw is not None and not problems:
        compared, problems = _compare_with_raw(raw, samples, shard, starts, tokenizer)
    group = f"{manifest.source}/{manifest.split}"
    return ShardAudit(
        name=f"{group}/{prefix.name}",
        group=group,
        tokens=shard.tokens,
        unigrams=unigrams[:-1].astype(np.min_scalar_type(unigrams.max())),
        document_lengths=_count_lengths(np.diff(starts)),
        document_hashes=np.sort(hash_documents(tokens, starts)),
        longest_run=_longest_run(tokens),
        compared_with_raw=compared,
        inputs=[entry.path for entry in manifest.inputs if entry.encoder != "imported"],
        problems=problems,
    )


def _count_ids(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Occurrences of each id of the vocabulary, and of all ids beyond it (vocab_size + 1,)."""
    counts = np.zeros(vocab_size + 1, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK].astype(np.uint32)  # negative ids become large ones
        counts += np.bincount(np.minimum(chunk, vocab_size), minlength=vocab_size + 1)
    return counts


def _contradictions(
    shard: ShardReader, tokens: np.ndarray, starts: np.ndarray, unigrams: np.ndarray, tokenizer: Tokenizer
) -> list[str]:
    manifest = shard.manifest
    documents = len(starts) - 1
    smallest, largest = (int(tokens.min()), int(tokens.max())) if len(tokens) else (manifest.vocab_size, -1)
    accounted = sum(entry.documents for entry in manifest.inputs)
    claims = [
        (sha256_of(shard.bin_path) == manifest.bin_sha256, ".bin differs from the hash in its manifest"),
        (sha256_of(shard.index.path) == manifest.idx_sha256, ".idx differs from the hash in its manifest"),
        (manifest.tokenizer_sha256 == tokenizer.sha256, "was made with a different tokenizer"),
        (documents == manifest.documents == accounted, f"{documents} documents, its inputs gave {accounted}"),
        ((smallest, largest) == (manifest.smallest_id, manifest.largest_id), f"ids run from {smallest} to {largest}"),
        (unigrams[-1] == 0, f"{unigrams[-1]} ids beyond the vocabulary of {tokenizer.vocab_size}"),
    ]
    is_chat = manifest.mask_sha256 is not None
    eos_id, unk_id = tokenizer.eos_id, tokenizer.unk_id
    if unk_id not in (None, eos_id):
        claims.append((unigrams[unk_id] == 0, f"{unigrams[unk_id]} unknown tokens (id {unk_id})"))
    if is_chat or manifest.end_of_document == tokenizer.end_of_document:
        ends_with_eos = bool((tokens[starts[1:] - 1] == eos_id).all())
        claims += [
            (ends_with_eos, f"a {'conversation' if is_chat else 'document'} does not end with EOS"),
            (is_chat or unigrams[eos_id] == documents, f"{unigrams[eos_id]} EOS tokens for {documents} documents"),
        ]
        claims += [
            (unigrams[number] == 0, f"{unigrams[number]} {name} tokens (id {number}), which prepare never writes")
            for name, number in (("BOS", tokenizer.bos_id), ("padding", tokenizer.pad_id))
            if number not in (None, eos_id, unk_id)
        ]
    if is_chat:
        claims += _claims_about_mask(shard, starts)
    return [problem for holds, problem in claims if not holds]


def _claims_about_mask(shard: ShardReader, starts: np.ndarray) -> list[tuple[bool, str]]:
    """Every conversation begins with a question, and ends with an answer whose EOS is a target too."""
    mask = shard.read_mask(0, shard.tokens)
    answers = np.add.reduceat(mask, starts[:-1], dtype=np.int64) if len(starts) > 1 else np.ones(1)
    return [
        (sha256_of(shard.mask_path) == shard.manifest.mask_sha256, ".mask differs from the hash in its manifest"),
        (int(mask.max(initial=0)) <= 1, ".mask has values other than 0 and 1"),
        (bool((answers > 0).all()), "a conversation has no answer"),
        (bool((mask[starts[:-1]] == 0).all()), "a conversation begins with an answer"),
        (bool((mask[starts[1:] - 1] == 1).all()), "a conversation does not end with an answer"),
    ]


def _count_lengths(lengths: np.ndarray) -> np.ndarray:
    exponents = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1
    return np.bincount(exponents, minlength=_LENGTH_BINS)[:_LENGTH_BINS]


def _longest_run(tokens: np.ndarray) -> tuple[int, int]:
    """The length of the longest run of equal ids, and the id."""
    longest, token = 0, -1
    open_length, open_token = 0, -1  # the run at the end of the chunk before
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK]
        boundaries = np.flatnonzero(chunk[1:] != chunk[:-1]) + 1
        edges = np.concatenate(([0], boundaries, [len(chunk)]))
        lengths = np.diff(edges)
        if chunk[0] == open_token:
            lengths[0] += open_length
        best = int(lengths.argmax())
        if lengths[best] > longest:
            longest, token = int(lengths[best]), int(chunk[edges[best]])
        open_length, open_token = int(lengths[-1]), int(chunk[-1])
    return longest, token


def _compare_with_raw(
    raw: Path, samples: int, shard: ShardReader, starts: np.ndarray, tokenizer: Tokenizer
) -> tuple[int, list[str]]:
    """Random documents of one random input file, encoded again and decoded, against the shard."""
    rng = random.Random(f"0/{shard.bin_path.stem}")
    inputs = shard.manifest.inputs
    candidates = [number for number, entry in enumerate(inputs) if entry.documents]
    if not candidates:
        return 0, []
    number = rng.choice(candidates)
    first = sum(entry.documents for entry in inputs[:number])
    chosen = set(rng.sample(range(inputs[number].documents), min(samples, inputs[number].documents)))
    path = raw / inputs[number].path if raw.is_dir() else raw
    if not path.is_file():
        return 0, [f"its input {path} is missing"]
    try:
        fmt = format_from_dict(shard.manifest.source_format)
    except ConfigError as error:
        return 0, [str(error)]
    differences = []
    for index, record in enumerate(islice(_kept_records(path, fmt, tokenizer), max(chosen) + 1)):
        if index not in chosen:
            continue
        document = first + index
        start, count = int(starts[document]), int(starts[document + 1] - starts[document])
        ids = shard.read(start, count)
        if isinstance(fmt, ChatFormat):
            is_same = _is_conversation(ids, shard.read_mask(start, count), record, fmt, tokenizer)
        else:
            is_same = _is_text(ids[:-1].tolist(), record.text, tokenizer)
        if not is_same:
            differences.append(f"document {document} differs from document {index} of {path}")
    return len(chosen), differences


def _kept_records(path: Path, fmt: SourceFormat, tokenizer: Tokenizer) -> Iterator[Record]:
    """The records of a raw file that became documents."""
    for record in read_records(path, fmt):
        if isinstance(fmt, ChatFormat):
            is_kept = _kept_turns(record, fmt, tokenizer) > 0
        else:
            is_kept = bool(record.text) and (not fmt.min_tokens or _is_long(record.text, fmt.min_tokens, tokenizer))
        if is_kept:
            yield record


def _is_long(text: str, min_tokens: int, tokenizer: Tokenizer) -> bool:
    return len(tokenizer.encode(text)) + 1 >= min_tokens  # with EOS


def _is_text(ids: list[int], text: str, tokenizer: Tokenizer) -> bool:
    return ids == tokenizer.encode(text) and tokenizer.decode(ids) == tokenizer.readable(text)


def _is_conversation(ids: np.ndarray, mask: np.ndarray, record: Record, fmt: ChatFormat, tokenizer: Tokenizer) -> bool:
    """Encoded again turn by turn, by code other than `prepare`'s."""
    expected = conversation_ids(tokenizer, record.messages[: _kept_turns(record, fmt, tokenizer)])
    return (ids.tolist(), mask.tolist()) == expected


def _kept_turns(record: Record, fmt: ChatFormat, tokenizer: Tokenizer) -> int:
    """The number of turns up to the last answer that fits; 0 where none does."""
    answers = [number for number, message in enumerate(record.messages, start=1) if message.role == "assistant"]
    sizes = (len(conversation_ids(tokenizer, record.messages[:turns])[0]) for turns in answers)
    return max((turns for turns, size in zip(answers, sizes, strict=True) if size <= fmt.max_tokens), default=0)


# --- all shards together ----------------------------------------------------------------------------------------------


def _compare_shards(audit: DataAudit) -> None:
    groups = audit.groups
    _find_duplicates(audit, groups)
    _check_listing(audit, groups)
    for shards in groups.values():
        total = total_unigrams(shards)
        for shard in shards:
            audit.drift[shard.name] = _total_variation(shard.unigrams, total)
    for shard in audit.shards:
        length, token = shard.longest_run
        if length >= SUSPICIOUS_RUN:
            audit.warnings.append(f"{shard.name}: {length} times the id {token} in a row; is it padding?")
        if audit.drift[shard.name] > SUSPICIOUS_DRIFT:
            audit.warnings.append(
                f"{shard.name}: its unigram distribution differs from its source's:"
                f" total variation {audit.drift[shard.name]:.2f}"
            )


def _find_duplicates(audit: DataAudit, groups: Mapping[str, list[ShardAudit]]) -> None:
    audit.duplicates = count_duplicates(
        {name: [shard.document_hashes for shard in shards] for name, shards in groups.items()}
    )
    for name, shards in groups.items():
        if audit.duplicates[name]:
            documents = sum(shard.documents for shard in shards)
            audit.warnings.append(f"{name}: {audit.duplicates[name]} of {documents} documents are exact duplicates")
    for name, shared in audit.duplicates.items():
        if shared and name not in groups:
            audit.warnings.append(f"{name}: {shared} documents are exact duplicates of each other")


def _check_listing(audit: DataAudit, groups: Mapping[str, list[ShardAudit]]) -> None:
    """Inputs are sorted and unique: the order of the file system differs between machines."""
    for name, shards in groups.items():
        inputs = [Path(path) for shard in shards for path in shard.inputs]
        for before, after in pairwise(inputs):
            if after <= before:
                audit.problems.append(
                    f"{name}: the input {after} comes after {before}; expected them sorted, each once"
                )


def total_unigrams(shards: Sequence[ShardAudit]) -> np.ndarray:
    """Occurrences of each id in all shards (vocab_size,) int64."""
    return functools.reduce(np.add, (shard.unigrams for shard in shards), np.zeros(1, dtype=np.int64))


def _total_variation(counts: np.ndarray, reference: np.ndarray) -> float:
    """Half the sum of the differences of two distributions: 0 for equal ones, 1 for disjoint ones."""
    if not counts.sum():
        return 0.0
    return float(np.abs(counts / counts.sum() - reference / reference.sum()).sum() / 2)
