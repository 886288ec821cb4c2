"""Raw files to token shards: a deterministic plan, a pool of processes, shards that are committed whole or not at all.

The plan depends on nothing but the sorted list of input files and their sizes, so the bytes written are the same for
any number of workers and after any crash; a shard whose manifest matches the plan is not made again.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from tinyllama_ds.data.shards import InputFile, Manifest, ShardWriter
from tinyllama_ds.data.sources import SourceFormat, find_inputs, read_records
from tinyllama_ds.data.tokenizer import EOS_ID, TOKENIZER_FILE, Tokenizer
from tinyllama_ds.errors import Refusal

SHARD_BYTES = 256 * 2**20
_DOCUMENTS_PER_CALL = 64  # how many documents one call of the encoder sees
# Bytes of uint16 tokens per byte on disk, for planning only: 4 bytes of text per token, zstd and parquet about 3:1.
_TOKEN_BYTES_PER_INPUT_BYTE = {".zst": 1.5, ".gz": 1.5, ".parquet": 1.5}


@dataclass(frozen=True)
class ShardTask:
    """One unit of work: the input files that become one shard."""

    source: str
    split: str
    prefix: Path
    input_root: Path
    inputs: tuple[Path, ...]
    format: SourceFormat
    tokenizer: Path


def prepare(
    source: str,
    input_directory: Path,
    tokenizer_path: Path,
    output: Path,
    fmt: SourceFormat,
    workers: int,
    shard_bytes: int = SHARD_BYTES,
) -> list[Manifest]:
    """Tokenise one source into `output/<source>/<split>/`; returns the manifests of all its shards, old and new.

    Raises `Refusal` for unreadable input, for another tokenizer than the one `output` already holds, and for shards
    that were made from other inputs.
    """
    tokenizer = Tokenizer(tokenizer_path)
    tasks = plan_shards(source, input_directory, output, fmt, tokenizer_path, shard_bytes)
    _check_tokenizer(tokenizer, output)
    pending = [task for task in tasks if not _is_done(task, tokenizer)]
    output.mkdir(parents=True, exist_ok=True)
    if not (output / TOKENIZER_FILE).exists():
        shutil.copyfile(tokenizer_path, output / TOKENIZER_FILE)
    _run(pending, workers, f"prepare {source}")
    return [Manifest.read(task.prefix.with_suffix(".json")) for task in tasks]


def plan_shards(
    source: str, input_directory: Path, output: Path, fmt: SourceFormat, tokenizer_path: Path, shard_bytes: int
) -> list[ShardTask]:
    """Sorted inputs, filled greedily into shards of about `shard_bytes`, split by split."""
    if not input_directory.exists():
        raise Refusal(f"{input_directory}: the input directory is missing")
    tasks = []
    for split, root in find_splits(input_directory).items():
        inputs = find_inputs(root)
        if not inputs:
            raise Refusal(f"{root}: holds no file of a known kind (jsonl, jsonl.gz, jsonl.zst, parquet, txt)")
        for number, group in enumerate(_fill(inputs, shard_bytes)):
            prefix = output / source / split / f"shard_{number:05d}"
            tasks.append(ShardTask(source, split, prefix, input_directory, tuple(group), fmt, tokenizer_path))
    return tasks


def find_splits(input_directory: Path) -> dict[str, Path]:
    """The published split folders where a corpus has them; without any, all of it is training data."""
    found = {name: input_directory / name for name in ("train", "validation", "test")}
    return {name: path for name, path in found.items() if path.is_dir()} or {"train": input_directory}


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


def _check_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    held = output / TOKENIZER_FILE
    if held.exists() and Tokenizer(held).sha256 != tokenizer.sha256:
        raise Refusal(f"{held}: differs from {tokenizer.path}; one data directory holds tokens of one tokenizer")


def _is_done(task: ShardTask, tokenizer: Tokenizer) -> bool:
    path = task.prefix.with_suffix(".json")
    if not path.exists():
        return False
    manifest = Manifest.read(path)
    made_from = [(entry.path, entry.bytes) for entry in manifest.inputs]
    wanted = [(_relative(task, path), path.stat().st_size) for path in task.inputs]
    if made_from != wanted or manifest.tokenizer_sha256 != tokenizer.sha256:
        raise Refusal(f"{path}: was made from other inputs or another tokenizer; remove it or choose another output")
    return True


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


def make_shard(task: ShardTask) -> Manifest:
    """Tokenise the inputs of one task and commit its shard."""
    tokenizer = Tokenizer(task.tokenizer)
    task.prefix.parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(task.prefix, tokenizer.vocab_size)
    try:
        inputs = [_add_file(writer, tokenizer, task, path) for path in task.inputs]
        if not writer.documents:
            raise Refusal(f"{task.inputs[0].parent}: the corpus is empty, no document was found in it")
        return writer.commit(task.source, task.split, tokenizer.sha256, EOS_ID, inputs)
    except BaseException:
        writer.abandon()
        raise


def _add_file(writer: ShardWriter, tokenizer: Tokenizer, task: ShardTask, path: Path) -> InputFile:
    rejected: Counter[str] = Counter()
    documents = text_bytes = 0
    reader = read_records(path, task.format)
    while records := list(islice(reader, _DOCUMENTS_PER_CALL)):
        rejected.update(record.rejected for record in records if record.rejected)
        texts = [record.text for record in records if not record.rejected]
        if texts:
            writer.add(tokenizer.encode_documents(texts))
        documents += len(texts)
        text_bytes += sum(len(text.encode()) for text in texts)
    return InputFile(_relative(task, path), path.stat().st_size, documents, dict(rejected), text_bytes)


def _relative(task: ShardTask, path: Path) -> str:
    return str(path.relative_to(task.input_root)) if path != task.input_root else path.name
