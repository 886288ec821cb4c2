"""Raw files to token shards: a deterministic plan, a pool of processes, shards that are committed atomically.

The plan depends only on the sorted list of input files and their sizes, so the bytes written are the same for any
number of workers and after any crash; a shard whose manifest matches the plan is not made again.
"""

import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from tinyllama_ds.data.chat import ANSWER_HEADER, encode_conversations
from tinyllama_ds.data.prepare.conversations import ChatFormat
from tinyllama_ds.data.prepare.inputs import find_inputs, grouped_by_size
from tinyllama_ds.data.prepare.progress import ShardProgress
from tinyllama_ds.data.prepare.reading import read_records
from tinyllama_ds.data.prepare.sources import Record, SourceFormat
from tinyllama_ds.data.shards import InputFile, Manifest, ShardName, ShardWriter, shard_suffixes, token_dtype
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.encoding import FileEncoder, load_gigatoken
from tinyllama_ds.data.tokenizers.storage import load_tokenizer, store_tokenizer
from tinyllama_ds.errors import ConfigError

# Of text in one call of the encoder, so that neither many small documents nor a large one fill the memory.
_ENCODE_BYTES = 2**20
_RECORD_BYTES = 100  # of memory for a record without its text: most may be rejected
# Bytes of uint16 tokens per byte on disk, for planning only: 4 bytes of text per token, zstd and parquet about 3:1.
_TOKEN_BYTES_PER_INPUT_BYTE = {".zst": 1.5, ".gz": 1.5, ".parquet": 1.5}
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Preparation:
    """What is prepared, and how: everything that determines the bytes of the shards."""

    source: str
    input: Path
    format: SourceFormat
    tokenizer: Path
    output: Path
    encoder: str = "auto"
    max_bad_records: int = 0
    shard_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class ShardTask:
    """One unit of work: the input files that become one shard."""

    job: Preparation
    name: ShardName
    inputs: tuple[Path, ...]

    @property
    def holds_conversations(self) -> bool:
        return isinstance(self.job.format, ChatFormat)

    @property
    def manifest(self) -> Path:
        return self.name.prefix.with_suffix(".json")

    def relative(self, path: Path) -> str:
        return str(path.relative_to(self.job.input)) if path != self.job.input else path.name


def prepare(
    job: Preparation, workers: int = 1, share: tuple[int, int] = (0, 1), use_mpi: bool = False
) -> list[Manifest]:
    """Tokenise one source into `output/<source>/<split>/`; returns the manifests of all its shards, old and new.

    `workers` processes of this machine do it, or with `use_mpi` those of `python -m mpi4py.futures`. A `share`
    (rank, size) is every size-th shard, for one of several machines; only its manifests are returned.
    Raises `ConfigError` for more than `max_bad_records` records that cannot be read, for a tokenizer that differs
    from the one in `output`, and for shards that were made from other inputs.
    """
    tokenizer = load_tokenizer(job.tokenizer)
    tokenizer.reject_inconvertible()
    if isinstance(job.format, ChatFormat):
        tokenizer.reject_for_chat(ANSWER_HEADER)
    _encoder_of(job.tokenizer, job.encoder)  # raises here what would fail in every worker
    rank, size = share
    tasks = plan_shards(job)[rank::size]
    store_tokenizer(tokenizer, job.output)
    finished = {task.manifest: _finished(task, tokenizer) for task in tasks}
    pending = [task for task in tasks if finished[task.manifest] is None]
    with watch_shards(f"prepare {job.source}", pending, tokenizer.vocab_size).watching():
        _run(job, pending, [manifest for manifest in finished.values() if manifest], workers, use_mpi)
    manifests = [finished[task.manifest] or Manifest.read(task.manifest) for task in tasks]
    _check_accounts(manifests)
    if size == 1:
        _remove_leftovers(job)
        if not any(manifest.documents for manifest in manifests):
            raise ConfigError(f"{job.input}: the corpus is empty, every record of it was rejected")
    return manifests


def plan_shards(job: Preparation) -> list[ShardTask]:
    """Sorted inputs, filled greedily into shards of about `shard_bytes`, split by split."""
    tasks = []
    for split, inputs in find_inputs(job.input, job.format).splits.items():
        groups = list(grouped_by_size(inputs, _expected_token_bytes, job.shard_bytes))
        for number, group in enumerate(groups):
            tasks.append(ShardTask(job, ShardName(job.output, job.source, split, number, len(groups)), tuple(group)))
    return tasks


def _expected_token_bytes(path: Path) -> float:
    return path.stat().st_size * _TOKEN_BYTES_PER_INPUT_BYTE.get(path.suffix, 0.5)


def watch_shards(description: str, tasks: list[ShardTask], vocab_size: int) -> ShardProgress:
    """The progress bar of some tasks, on whatever process or host they run."""
    expected = {task.name.prefix.with_suffix(".bin"): sum(map(_expected_token_bytes, task.inputs)) for task in tasks}
    return ShardProgress(description, expected, token_dtype(vocab_size).itemsize)


def _remove_leftovers(job: Preparation) -> None:
    """Partial files of killed processes; when every shard is complete no process is writing any more."""
    for path in (job.output / job.source).rglob(".*.partial"):
        path.unlink()


def _finished(task: ShardTask, tokenizer: Tokenizer) -> Manifest | None:
    """The manifest of a complete shard, or None; raises `ConfigError` for one that was made from other inputs."""
    suffixes = shard_suffixes(task.holds_conversations)
    if not all(task.name.prefix.with_suffix(suffix).is_file() for suffix in suffixes):
        return None
    manifest = Manifest.read(task.manifest)
    made_from = ([(entry.path, entry.bytes) for entry in manifest.inputs], manifest.shards, manifest.source_format)
    wanted = (
        [(task.relative(path), path.stat().st_size) for path in task.inputs],
        task.name.shards,
        task.job.format.to_dict(),
    )
    if made_from != wanted or manifest.tokenizer_sha256 != tokenizer.sha256:
        raise ConfigError(
            f"{task.manifest}: was made from other inputs, subsets or tokenizer; remove it or choose another output"
        )
    return manifest


def _run(job: Preparation, pending: list[ShardTask], done: list[Manifest], workers: int, use_mpi: bool) -> None:
    """Make the pending shards; stop at the first bad record beyond the allowed number."""
    faults = _faults(done)
    _check_faults(faults, job.max_bad_records)
    for manifest in _make_shards(pending, workers, use_mpi):
        faults += _faults([manifest])
        _check_faults(faults, job.max_bad_records)


def _faults(manifests: list[Manifest]) -> list[str]:
    return [fault for manifest in manifests for entry in manifest.inputs for fault in entry.faults]


def _check_faults(faults: list[str], allowed: int) -> None:
    if len(faults) > allowed:
        raise ConfigError(faults[allowed] + (f" (bad record {allowed + 1}; {allowed} were allowed)" if allowed else ""))


def _check_accounts(manifests: list[Manifest]) -> None:
    """Records in = documents out + rejected + faults, file by file; the documents add up to the shard's."""
    for manifest in manifests:
        for entry in manifest.inputs:
            if entry.records != entry.documents + sum(entry.rejected.values()) + len(entry.faults):
                raise ConfigError(f"{entry.path}: {entry.records} records went in, but not all of them came out")
        given = sum(entry.documents for entry in manifest.inputs)
        if given != manifest.documents:
            raise ConfigError(
                f"{manifest.source}/{manifest.split} shard {manifest.number}: holds {manifest.documents} documents,"
                f" but its inputs gave {given}"
            )


def _make_shards(tasks: list[ShardTask], workers: int, use_mpi: bool) -> Iterator[Manifest]:
    if workers == 1 and not use_mpi:
        yield from map(make_shard, tasks)
        return
    yield from results_of(_open_mpi_pool() if use_mpi else open_pool(workers), make_shard, tasks)


def results_of(pool: Executor, make: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """What the pool's processes make of all tasks, in the order of their ends; the first failure is raised."""
    with pool:
        futures = [pool.submit(make, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def open_pool(workers: int) -> Executor:
    """Processes of this machine, which end with this one."""
    # Not forked: Arrow has started threads, whose locks a fork would copy.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def _open_mpi_pool() -> Executor:
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPIPoolExecutor
    except ImportError as error:
        raise ConfigError(f"--mpi: needs an MPI and the package mpi4py ({error})") from error
    world = MPI.COMM_WORLD
    if world.Get_rank() != 0 or world.Get_size() < 2:  # under mpi4py.futures only rank 0 gets here
        raise ConfigError("--mpi: start with mpirun -n RANKS python -m mpi4py.futures -m tinyllama_ds.cli prepare ...")
    return MPIPoolExecutor(initializer=_use_one_core)


def _use_one_core() -> None:
    """The other cores have workers of their own, which is faster than a library's threads over one batch."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _start_worker() -> None:
    """A worker whose parent was killed would wait for its next task forever."""
    _use_one_core()

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_shard(task: ShardTask) -> Manifest:
    """Tokenise the inputs of one task and commit its shard."""
    tokenizer, fast = _encoder_of(task.job.tokenizer, task.job.encoder)
    writer = ShardWriter(task.name, tokenizer.vocab_size, has_mask=task.holds_conversations)
    ending = tokenizer.end_of_turn if task.holds_conversations else tokenizer.end_of_document
    try:
        inputs = [_add_file(writer, FileEncoder(tokenizer, fast), task, path) for path in task.inputs]
        return writer.commit(tokenizer.sha256, ending, task.job.format.to_dict(), inputs)
    except OSError as error:  # read errors are faults of records, so this is a write error
        raise ConfigError(f"{task.name.prefix}.bin: the shard cannot be written ({error})") from error
    finally:
        writer.abandon()


@lru_cache(maxsize=1)
def _encoder_of(path: Path, encoder: str) -> tuple:
    """The tokenizer and gigatoken's form of it; a second's work, once per process."""
    tokenizer = load_tokenizer(path)
    return tokenizer, load_gigatoken(tokenizer, encoder)


def _add_file(writer: ShardWriter, encoder: FileEncoder, task: ShardTask, path: Path) -> InputFile:
    rejected: Counter[str] = Counter()
    shortened: Counter[str] = Counter()
    faults: list[str] = []
    before, records, text_bytes = writer.documents, 0, 0
    fmt = task.job.format
    for batch in grouped_by_size(read_records(path, fmt), _memory, _ENCODE_BYTES):
        records += len(batch)
        rejected.update(record.rejected for record in batch if record.rejected)
        shortened.update(record.shortened for record in batch if record.shortened)
        faults += [record.fault for record in batch if record.fault]
        _check_faults(faults, task.job.max_bad_records)
        if isinstance(fmt, ChatFormat):
            conversations = [record.messages for record in batch if record.messages]
            encoded = encode_conversations(encoder.encode, encoder.tokenizer, conversations, fmt.max_tokens)
            writer.add(encoded.ids, encoded.lengths, encoded.assistant_mask)
            shortened += Counter({f"turns beyond {fmt.max_tokens} tokens": encoded.shortened})
            rejected += Counter({f"first answer beyond {fmt.max_tokens} tokens": encoded.rejected})
            text_bytes += sum(record.text_bytes for record in batch)
        else:
            kept_bytes, too_short = _add_texts(writer, encoder, [record for record in batch if record.text], fmt)
            rejected += Counter({fmt.too_short: too_short})
            text_bytes += kept_bytes
    return InputFile(
        path=task.relative(path),
        bytes=path.stat().st_size,
        records=records,
        documents=writer.documents - before,
        rejected=dict(sorted(rejected.items())),
        faults=faults,
        text_bytes=text_bytes,
        encoder=encoder.name,
        shortened=dict(sorted(shortened.items())),
    )


def _add_texts(
    writer: ShardWriter, encoder: FileEncoder, records: Sequence[Record], fmt: SourceFormat
) -> tuple[int, int]:
    """Write the documents that are long enough; returns the bytes of their text, and how many others there are."""
    ids, lengths = encoder.encode([record.text for record in records])
    is_kept = lengths >= fmt.min_tokens
    if not is_kept.all():
        ids = ids[np.repeat(is_kept, lengths)]
    writer.add(ids, lengths[is_kept])
    sizes = np.array([record.text_bytes for record in records], dtype=np.int64)
    return int(sizes[is_kept].sum()), int(len(records) - is_kept.sum())


def _memory(record: Record) -> int:
    return record.text_bytes + _RECORD_BYTES


def summarise(manifests: list[Manifest]) -> dict[str, dict]:
    """A row per split for the final table: shards, files, documents, rejected records, tokens, bytes per token."""
    table: dict[str, dict] = {}
    for split in dict.fromkeys(manifest.split for manifest in manifests):
        chosen = [manifest for manifest in manifests if manifest.split == split]
        inputs = [entry for manifest in chosen for entry in manifest.inputs]
        tokens = sum(manifest.tokens for manifest in chosen)
        rejected = sum((Counter(entry.rejected) for entry in inputs), Counter())
        shortened = sum((Counter(entry.shortened) for entry in inputs), Counter())
        table[split] = {
            "shards": len(chosen),
            "files": len(inputs),
            "records": sum(entry.records for entry in inputs),
            "documents": sum(manifest.documents for manifest in chosen),
            "rejected": dict(sorted(rejected.items())),
            "shortened": dict(sorted(shortened.items())),
            "faults": _faults(chosen),
            "tokens": tokens,
            "bytes_per_token": sum(entry.text_bytes for entry in inputs) / tokens if tokens else 0.0,
            "encoders": dict(Counter(entry.encoder.split(",")[0] for entry in inputs)),
            "fallbacks": [f"{entry.path}: {entry.encoder}" for entry in inputs if "," in entry.encoder],
        }
    return table
