"""Raw files to token shards: a deterministic plan, a pool of processes, shards that are committed whole or not at all.

The plan depends on nothing but the sorted list of input files and their sizes, so the bytes written are the same for
any number of workers and after any crash; a shard whose manifest matches the plan is not made again.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tinyllama_ds.data.shards import InputFile, Manifest, ShardName, ShardWriter
from tinyllama_ds.data.sources import Record, SourceFormat, find_inputs, read_records
from tinyllama_ds.data.tokenizer import END_OF_DOCUMENT, TOKENIZER_FILE, Tokenizer
from tinyllama_ds.errors import Refusal

SHARD_BYTES = 256 * 2**20
_ENCODE_BYTES = 2**20  # how much text one call of the encoder sees
# Bytes of uint16 tokens per byte on disk, for planning only: 4 bytes of text per token, zstd and parquet about 3:1.
_TOKEN_BYTES_PER_INPUT_BYTE = {".zst": 1.5, ".gz": 1.5, ".parquet": 1.5}


@dataclass(frozen=True)
class ShardTask:
    """One unit of work: the input files that become one shard."""

    name: ShardName
    input_root: Path
    inputs: tuple[Path, ...]
    format: SourceFormat
    tokenizer: Path
    max_bad_records: int

    def relative(self, path: Path) -> str:
        return str(path.relative_to(self.input_root)) if path != self.input_root else path.name


def prepare(
    source: str,
    input_directory: Path,
    tokenizer_path: Path,
    output: Path,
    fmt: SourceFormat,
    workers: int,
    shard_bytes: int = SHARD_BYTES,
    max_bad_records: int = 0,
) -> list[Manifest]:
    """Tokenise one source into `output/<source>/<split>/`; returns the manifests of all its shards, old and new.

    Raises `Refusal` for more than `max_bad_records` records that cannot be read, for another tokenizer than the one
    `output` already holds, and for shards that were made from other inputs.
    """
    tokenizer = Tokenizer(tokenizer_path)
    tasks = plan_shards(source, input_directory, output, fmt, tokenizer_path, shard_bytes, max_bad_records)
    _hold_tokenizer(tokenizer, output)
    pending = [task for task in tasks if not _is_done(task, tokenizer)]
    _run(pending, workers, f"prepare {source}")
    manifests = [Manifest.read(task.name.prefix.with_suffix(".json")) for task in tasks]
    _check_faults(manifests, max_bad_records)
    if not any(manifest.documents for manifest in manifests):
        raise Refusal(f"{input_directory}: the corpus is empty, every record of it was rejected")
    return manifests


def plan_shards(
    source: str,
    input_directory: Path,
    output: Path,
    fmt: SourceFormat,
    tokenizer_path: Path,
    shard_bytes: int,
    max_bad_records: int,
) -> list[ShardTask]:
    """Sorted inputs, filled greedily into shards of about `shard_bytes`, split by split."""
    tasks = []
    for split, inputs in find_inputs(input_directory, fmt).items():
        groups = list(_fill(inputs, shard_bytes))
        for number, group in enumerate(groups):
            name = ShardName(output, source, split, number, len(groups))
            tasks.append(ShardTask(name, input_directory, tuple(group), fmt, tokenizer_path, max_bad_records))
    return tasks


def _fill(inputs: list[Path], shard_bytes: int) -> Iterator[list[Path]]:
    group: list[Path] = []
    size = 0.0
    for path in inputs:
        group.append(path)
        size += path.stat().st_size * _TOKEN_BYTES_PER_INPUT_BYTE.get(path.suffix, 0.5)
        if size >= shard_bytes:
            yield group
            group, size = [], 0.0
    if group:
        yield group


def _hold_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Keep the tokenizer with the tokens; refuse to mix those of two."""
    held = output / TOKENIZER_FILE
    if held.exists():
        if Tokenizer(held).sha256 != tokenizer.sha256:
            raise Refusal(f"{held}: differs from {tokenizer.path}; one data directory holds tokens of one tokenizer")
        return
    output.mkdir(parents=True, exist_ok=True)
    partial = held.with_suffix(".partial")
    shutil.copyfile(tokenizer.path, partial)
    partial.replace(held)


def _is_done(task: ShardTask, tokenizer: Tokenizer) -> bool:
    path = task.name.prefix.with_suffix(".json")
    if not path.exists():
        return False
    manifest = Manifest.read(path)
    made_from = [(entry.path, entry.bytes) for entry in manifest.inputs]
    wanted = [(task.relative(path), path.stat().st_size) for path in task.inputs]
    if made_from != wanted or manifest.tokenizer_sha256 != tokenizer.sha256 or manifest.shards != task.name.shards:
        raise Refusal(f"{path}: was made from other inputs or another tokenizer; remove it or choose another output")
    return all(task.name.prefix.with_suffix(suffix).is_file() for suffix in (".bin", ".idx"))


def _run(tasks: list[ShardTask], workers: int, description: str) -> None:
    with (
        ProcessPoolExecutor(max_workers=workers) as pool,
        tqdm(total=len(tasks), desc=description, unit="shard", disable=not tasks) as progress,
    ):
        futures = [pool.submit(make_shard, task) for task in tasks]
        tokens = 0
        try:
            for future in as_completed(futures):
                tokens += future.result().tokens
                progress.set_postfix_str(f"{tokens:,} tokens")
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_faults(manifests: list[Manifest], max_bad_records: int) -> None:
    faults = [fault for manifest in manifests for entry in manifest.inputs for fault in entry.faults]
    if len(faults) > max_bad_records:
        raise Refusal(f"{faults[max_bad_records]} (bad record {max_bad_records + 1}; {max_bad_records} were allowed)")


def make_shard(task: ShardTask) -> Manifest:
    """Tokenise the inputs of one task and commit its shard."""
    tokenizer = Tokenizer(task.tokenizer)
    writer = ShardWriter(task.name, tokenizer.vocab_size)
    try:
        inputs = [_add_file(writer, tokenizer, task, path) for path in task.inputs]
        return writer.commit(tokenizer.sha256, END_OF_DOCUMENT, inputs)
    except OSError as error:  # what cannot be read is a fault of its record, so this is a write
        raise Refusal(f"{task.name.prefix}.bin: the shard cannot be written ({error})") from error
    finally:
        writer.abandon()


def _add_file(writer: ShardWriter, tokenizer: Tokenizer, task: ShardTask, path: Path) -> InputFile:
    rejected: Counter[str] = Counter()
    faults: list[str] = []
    documents = records = text_bytes = 0
    for batch in _batches(read_records(path, task.format)):
        records += len(batch)
        rejected.update(record.rejected for record in batch if record.rejected)
        faults += [record.fault for record in batch if record.fault]
        if len(faults) > task.max_bad_records:
            raise Refusal(faults[task.max_bad_records])
        texts = [record.text for record in batch if record.text]
        writer.add(*tokenizer.encode_documents(texts))
        documents += len(texts)
        text_bytes += sum(record.text_bytes for record in batch)
    return InputFile(task.relative(path), path.stat().st_size, records, documents, dict(rejected), faults, text_bytes)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The records by the megabyte, so that neither many small documents nor a large one fill the memory."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.text_bytes
        if size >= _ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
