"""A teacher's predictions for the samples of a source, computed once for all students (`data/teacher.py`).

Every worker computes on one thread, or one GPU, in batches of one shape: so the bytes of a shard do not depend on the
number of workers, nor on where an interrupted run continues. They depend on the machine: on CPUs of another kind, or
other versions of PyTorch, the last bits differ.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from tinyllama_ds.config.recipe import CONCATENATE, Packing
from tinyllama_ds.data.loader import open_streams
from tinyllama_ds.data.packing import open_stream
from tinyllama_ds.data.prepare.prepare import open_pool, results_of
from tinyllama_ds.data.prepare.progress import ShardProgress
from tinyllama_ds.data.shards import token_dtype
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.data.teacher import TEACHER_FOLDER, Predictions, TeacherManifest, tokens_sha256
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError, log
from tinyllama_ds.files import PartialFile, sha256_of, write_object
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.hf.import_model import CONFIG_FILE, find_tensors, read_config, read_parameters
from tinyllama_ds.model.attention import Demands, Device, capability_of, resolve_attention_backend
from tinyllama_ds.model.config import MAX_CHUNK_LOGITS
from tinyllama_ds.model.distillation import top_log_probs
from tinyllama_ds.model.llama import LlamaForCausalLM, assign_weights

_BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}  # of a forward pass
_SHARD_BYTES = 8 * 2**20  # what an interruption can cost: a minute of a core


@dataclass(frozen=True)
class Teaching:
    """Which model predicts which tokens, and how much is kept of it."""

    teacher: Path  # a Hugging Face folder
    output: Path  # the data directory
    source: str
    sequence_length: int
    document_mask: bool
    teacher_top_k: int
    packing: Packing = CONCATENATE

    @property
    def directory(self) -> Path:
        return self.output / self.source / "train"


@dataclass(frozen=True)
class TeacherTask:
    """One unit of work: the samples of one shard."""

    job: Teaching
    predictions: Predictions
    number: int
    shards: int
    samples: range

    @property
    def prefix(self) -> Path:
        return self.job.directory / TEACHER_FOLDER / f"shard_{self.number:05d}"

    @property
    def bytes(self) -> int:
        return len(self.samples) * self.job.sequence_length * self.predictions.record.itemsize


def teach(job: Teaching, workers: int, share: tuple[int, int] = (0, 1)) -> dict:
    """Cache a teacher's predictions for the training tokens of a source; returns a row for the final table.

    `workers` processes do it; a `share` (rank, size) is every size-th shard, for one of several machines.
    Raises `ConfigError` where the teacher's tokenizer or vocabulary is not that of the tokens, and where there are
    predictions of another kind.
    """
    stream, predictions = _describe(job)
    rank, size = share
    tasks = _plan(job, predictions, stream.num_samples(job.sequence_length))
    width, size_in_bytes = predictions.record.itemsize, sum(task.bytes for task in tasks)
    tokens = size_in_bytes // width
    pending = [task for task in tasks[rank::size] if not _is_finished(task)]
    log(
        f"{job.source}: {width} bytes per token for the {job.teacher_top_k} most probable tokens of"
        f" {predictions.model}, {size_in_bytes / GIB:,.3f} GiB for {tokens:,} tokens;"
        f" {len(pending)} of {len(tasks)} shards to make"
    )
    expected = {task.prefix.with_suffix(".bin"): float(task.bytes) for task in pending}
    with ShardProgress(f"teacher {job.source}", expected, width).watching():
        for _ in _make_shards(pending, workers):
            pass
    if size == 1:
        for path in (job.directory / TEACHER_FOLDER).glob(".*.partial"):  # of killed processes
            path.unlink()
    return {
        "teacher": predictions.model,
        "top_k": job.teacher_top_k,
        "tokens": tokens,
        "bytes_per_token": width,
        "bytes": size_in_bytes,
        "shards": len(tasks),
    }


def default_workers() -> int:
    """One per GPU, else one per core."""
    return torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def _describe(job: Teaching) -> tuple[TokenStream, Predictions]:
    config = read_config(job.teacher / CONFIG_FILE)
    stream = open_streams(job.output, [job.source], "train", config.vocab_size, job.packing)[job.source]
    tokenizer = load_tokenizer(job.output)
    theirs = load_tokenizer(job.teacher)
    if theirs.sha256 != tokenizer.sha256:
        raise ConfigError(f"{theirs.path}: differs from {tokenizer.path}; expected a teacher with the same tokenizer")
    if job.sequence_length > config.max_position_embeddings:
        raise ConfigError(
            f"--sequence-length {job.sequence_length}: is beyond the {config.max_position_embeddings} positions of"
            f" {job.teacher}"
        )
    if job.teacher_top_k > tokenizer.vocab_size:
        raise ConfigError(f"--teacher-top-k {job.teacher_top_k}: expected {tokenizer.vocab_size} or less, all tokens")
    return stream, Predictions(
        model=job.teacher.resolve().name,
        model_sha256=_model_sha256(job.teacher),
        tokens_sha256=tokens_sha256(stream),
        sequence_length=job.sequence_length,
        document_mask=job.document_mask,
        top_k=job.teacher_top_k,
        vocab_size=tokenizer.vocab_size,
        packing=job.packing,
    )


def _model_sha256(folder: Path) -> str:
    files = sorted({folder / CONFIG_FILE, *find_tensors(folder, read_config(folder / CONFIG_FILE)).values()})
    return hashlib.sha256(json.dumps([(path.name, sha256_of(path)) for path in files]).encode()).hexdigest()


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _batch(sequence_length: int) -> int:
    return max(1, _BATCH_TOKENS[_device_type()] // sequence_length)


def _plan(job: Teaching, predictions: Predictions, samples: int) -> list[TeacherTask]:
    """Whole batches, about `_SHARD_BYTES` of them in a shard."""
    batch = _batch(job.sequence_length)
    step = batch * max(1, _SHARD_BYTES // (batch * job.sequence_length * predictions.record.itemsize))
    parts = [range(first, min(first + step, samples)) for first in range(0, samples, step)]
    return [TeacherTask(job, predictions, number, len(parts), part) for number, part in enumerate(parts)]


def _is_finished(task: TeacherTask) -> bool:
    """Whether the shard is complete; raises `ConfigError` for one of other predictions."""
    path, data = task.prefix.with_suffix(".json"), task.prefix.with_suffix(".bin")
    if not path.is_file():
        return False
    found = TeacherManifest.read(path)
    if found.predictions != task.predictions or found.samples != len(task.samples):
        there, now = asdict(found.predictions), asdict(task.predictions)
        key = next((key for key in now if there[key] != now[key]), "samples")
        raise ConfigError(
            f"{path}: has {key} {json.dumps(there.get(key, found.samples))}, not"
            f" {json.dumps(now.get(key, len(task.samples)))}; remove {path.parent} to make it again"
        )
    return data.is_file() and data.stat().st_size == task.bytes


def _make_shards(tasks: list[TeacherTask], workers: int) -> Iterator[TeacherManifest]:
    if not tasks:
        return
    (tasks[0].prefix.parent).mkdir(exist_ok=True)
    if workers == 1:
        yield from map(make_shard, tasks)
    else:
        yield from results_of(open_pool(workers), make_shard, tasks)


def make_shard(task: TeacherTask) -> TeacherManifest:
    """Predict the samples of one task and commit its shard."""
    job = task.job
    stream, data = open_stream(job.directory, job.packing), PartialFile(task.prefix.with_suffix(".bin"))
    sha256 = hashlib.sha256()
    try:
        with _one_thread():
            for records in _predict(_load(job.teacher, job.document_mask), stream, task):
                sha256.update(records.tobytes())
                data.write(records.tobytes())
        data.commit()
    except OSError as error:
        raise ConfigError(f"{task.prefix}.bin: the shard cannot be written ({error})") from error
    finally:
        data.abandon()
    width = task.predictions.record.itemsize
    place = (task.number, task.shards, task.samples.start, len(task.samples))
    environment = {"torch": torch.__version__, "device": _device_type()}
    manifest = TeacherManifest(task.predictions, width, *place, sha256.hexdigest(), environment)
    write_object(task.prefix.with_suffix(".json"), asdict(manifest))
    return manifest


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, operators on the CPU use one thread: the order of their sums depends on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _load(folder: Path, document_mask: bool) -> LlamaForCausalLM:
    """The teacher on this worker's device, in the dtype of its weights; on a CPU these are the mapped files."""
    config = read_config(folder / CONFIG_FILE)
    device = _worker_device()
    weights = dict(read_parameters(find_tensors(folder, config), config))
    is_16_bit = next(iter(weights.values())).dtype != torch.float32
    demands = Demands(is_16_bit, document_mask)
    attention = resolve_attention_backend("auto", Device(device.type, capability_of(device)), demands)
    with torch.device("meta"):
        model = LlamaForCausalLM(config, attention.backend)
    assign_weights(model, weights)
    return model.to(device).eval()


def _worker_device() -> torch.device:
    """The CPU, or the GPU that falls to this worker of a pool by its number, which ends its name."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = multiprocessing.current_process().name.rpartition("-")[2]
    return torch.device("cuda", int(number) % torch.cuda.device_count() if number.isdecimal() else 0)


@torch.no_grad()
def _predict(model: LlamaForCausalLM, stream: TokenStream, task: TeacherTask) -> Iterator[np.ndarray]:
    """The records of a task's samples, batch by batch; the last batch is filled up by repeating its last sample."""
    T, k, record = task.job.sequence_length, task.predictions.top_k, task.predictions.record
    device, batch = model.lm_head.weight.device, _batch(T)
    head = model.lm_head.weight[: task.predictions.vocab_size]  # without padding
    step = max(1, MAX_CHUNK_LOGITS[device.type] // len(head))
    for first in range(0, len(task.samples), batch):
        chosen = task.samples[first : first + batch]
        samples = [*chosen, *[chosen[-1]] * (batch - len(chosen))]
        tokens = np.stack([stream.sample(sample, T)[:T].astype(np.int64) for sample in samples])
        documents = None
        if task.job.document_mask:
            documents = torch.from_numpy(np.stack([stream.document_ids(sample, T) for sample in samples]))
        rows = model.model(torch.from_numpy(tokens).to(device), documents).flatten(0, 1)
        records = np.empty(len(chosen) * T, dtype=record)
        for start in range(0, len(records), step):
            chunk = slice(start, min(start + step, len(records)))
            ids, log_probs = top_log_probs(rows[chunk] @ head.t(), k)
            records["ids"][chunk] = ids.cpu().numpy().astype(token_dtype(task.predictions.vocab_size))
            records["log_probs"][chunk] = log_probs.to(torch.float16).cpu().numpy()
        yield records
