"""Tokens per second from .jsonl.zst to committed shards, ours beside what others do per document, on the same files.

    python benchmarks/data_prepare.py --tokenizer tokenizer.model --json benchmarks/results/data_prepare.json

The corpus is the Python sources of this installation, each once. Every contender runs alone, in turn, round after
round; the best round counts, because whatever else runs on the machine can only slow one down. `per core` is tokens per
second of CPU time, workers included. `net` leaves out the start: the seconds that the same contender takes for two
lines, which a corpus of more than minutes does not feel. The peers are what their scripts do for each document, cited
at each function, with the same library (sentencepiece, tokenizers) and without their process pools, so that one core
meets one.
"""

import json
import os
import platform
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import zstandard

from installed import of_installed
from tinyllama_ds.commands.arguments import Number, Parser, WholeNumber, output_file
from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import SourceFormat
from tinyllama_ds.data.shards import token_dtype
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer

FILES = 32  # and as many shards
META = {"redpajama_set_name": "RedPajamaC4"}


def make_corpus(root: Path, max_bytes: int) -> int:
    """Python sources as SlimPajama lies on disk; returns the bytes of text."""
    writers = [zstandard.open(root / f"{number}.jsonl.zst", "wt", encoding="utf-8") for number in range(FILES)]
    paths = sysconfig.get_paths()
    sources = sorted({*Path(paths["purelib"]).rglob("*.py"), *Path(paths["stdlib"]).rglob("*.py")})
    total = documents = 0
    for path in sources:
        text = path.read_bytes().decode(errors="ignore")
        if text and total < max_bytes:
            writers[documents % FILES].write(json.dumps({"text": text, "meta": META}) + "\n")
            total, documents = total + len(text.encode()), documents + 1
    for writer in writers:
        writer.close()
    return total


# --- contenders: (corpus, tokenizer, output) to the number of tokens --------------------------------------------------

Contender = Callable[[Path, Tokenizer, Path], int]


def ours(encoder: str | None, workers: int = 1) -> Contender:
    """`tinyllama-ds prepare`, with the tokenizer's own library where no encoder is named."""

    def run(corpus: Path, tokenizer: Tokenizer, output: Path) -> int:
        chosen = encoder or tokenizer.library
        job = Preparation("x", corpus, SourceFormat(), tokenizer.path, output, chosen, shard_bytes=1)
        return sum(manifest.tokens for manifest in prepare(job, workers))

    return run


def rows(corpus: Path) -> Iterator[str]:
    for path in sorted(corpus.glob("*.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            yield from file


def tinyllama(corpus: Path, tokenizer: Tokenizer, output: Path) -> int:
    """TinyLlama, scripts/prepare_slimpajama.py and lit_gpt/packed_dataset.py: JSON twice, a tensor per document."""
    import torch

    output.mkdir()
    chunk, used, tokens, chunks = np.full(2049 * 1024, 1, np.uint16), 0, 0, 0
    for row in rows(corpus):
        if json.loads(row)["meta"]["redpajama_set_name"] == "RedPajamaGithub":
            continue
        ids = torch.tensor([*tokenizer.encode(json.loads(row)["text"]), tokenizer.eos_id], dtype=torch.int)
        array = np.array(ids, dtype=np.uint16)
        tokens += len(array)
        while used + len(array) > len(chunk):
            part = len(chunk) - used
            chunk[used:], array, used, chunks = array[:part], array[part:], 0, chunks + 1
            (output / f"{chunks:010d}.bin").write_bytes(chunk.tobytes())
            chunk.fill(1)
        chunk[used : used + len(array)] = array
        used += len(array)
    return tokens


def litgpt(corpus: Path, tokenizer: Tokenizer, output: Path) -> int:
    """litgpt, litgpt/data/prepare_slimpajama.py under litdata's optimize: a tensor per document, four bytes per id."""
    import torch

    tokens = 0
    with output.open("wb") as file:
        for row in rows(corpus):
            if json.loads(row)["meta"]["redpajama_set_name"] == "RedPajamaGithub":
                continue
            ids = torch.tensor([*tokenizer.encode(json.loads(row)["text"]), tokenizer.eos_id], dtype=torch.int)
            file.write(ids.numpy().tobytes())
            tokens += len(ids)
    return tokens


def megatron(corpus: Path, tokenizer: Tokenizer, output: Path) -> int:
    """Megatron-LM, tools/preprocess_data.py with Llama2Tokenizer: a list and a write per document."""
    lengths = []
    with output.open("wb") as file:
        for row in rows(corpus):
            ids = [*tokenizer.encode(json.loads(row)["text"]), tokenizer.eos_id]
            file.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
            lengths.append(len(ids))
    return sum(lengths)


def datatrove_step(corpus: Path, tokenizer: Tokenizer, output: Path) -> int:
    """datatrove, pipeline/tokens/tokenizer.py: `tokenizers`, by batches of 10,000 documents, one thread."""
    fast = tokenizer.to_fast()
    tokens, texts = 0, [json.loads(row)["text"] for row in rows(corpus)]
    with output.open("wb") as file:
        for start in range(0, len(texts), 10_000):
            for encoding in fast.encode_batch(texts[start : start + 10_000]):
                file.write(np.array([*encoding.ids, tokenizer.eos_id], dtype=np.uint16).tobytes())
                tokens += len(encoding.ids) + 1
    return tokens


_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

corpus, tokenizer, eos, output = sys.argv[1:]
steps = [
    JsonlReader(corpus),
    DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, eos_token=eos, shuffle_documents=False),
]
LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=output + ".logs").run()
"""


def datatrove(python: Path) -> Contender:
    """datatrove itself, which needs an environment of its own: its pipeline from JSON lines to token files."""

    def run(corpus: Path, tokenizer: Tokenizer, output: Path) -> int:
        eos = tokenizer.to_fast().id_to_token(tokenizer.eos_id)
        command = [str(python), "-c", _DATATROVE, str(corpus), str(tokenizer.path), str(eos), str(output)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": ""})
        written = sum(path.stat().st_size for path in output.glob("*.ds"))
        if not written:
            raise SystemExit(f"{python}: datatrove wrote no tokens; does its environment have zstandard?")
        return written // token_dtype(tokenizer.vocab_size).itemsize

    return run


CONTENDERS: dict[str, Contender] = {
    "ours, gigatoken": ours("gigatoken"),
    "ours, gigatoken, 2 workers": ours("gigatoken", 2),
    "ours, own library": ours(None),
    "ours, own library, 2 workers": ours(None, 2),
    "TinyLlama's script": tinyllama,
    "litgpt's script": litgpt,
    "Megatron's script": megatron,
    "datatrove's step": datatrove_step,
}


def _package_of(name: str) -> str | None:
    """What a contender needs that an installation may lack: gigatoken has no wheels for some platforms."""
    if "gigatoken" in name:
        return "gigatoken"
    return {"litgpt's script": "torch", "datatrove's step": "tokenizers"}.get(name)


def measure(run: Contender, corpus: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """One run: tokens, seconds of the wall, and seconds of CPU with those of the workers."""
    with tempfile.TemporaryDirectory() as scratch:
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        tokens = run(corpus, tokenizer, Path(scratch) / "output")
        return {"tokens": tokens, "wall_s": time.perf_counter() - wall, "cpu_s": sum(os.times()[:4]) - cpu}


def measure_start(run: Contender, tokenizer: Tokenizer) -> float:
    """Seconds of the wall for two files of one line each; what a process makes once is made here."""
    with tempfile.TemporaryDirectory() as corpus:
        for number in range(2):
            with zstandard.open(Path(corpus) / f"{number}.jsonl.zst", "wt", encoding="utf-8") as file:
                file.write(json.dumps({"text": "one line", "meta": META}) + "\n")
        return measure(run, Path(corpus), tokenizer)["wall_s"]


def main() -> None:
    """Print a row per contender: million tokens per second, and our fastest single worker next to it."""
    parser = Parser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--megabytes", type=Number(most=1e6), default=120, help="of text")
    parser.add_argument("--rounds", type=WholeNumber(1, 1000), default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--datatrove", type=Path, metavar="PYTHON", help="measure the datatrove of this interpreter, too"
    )
    parser.add_argument("--json", type=output_file)
    options = parser.parse_args()
    names = of_installed({name: _package_of(name) for name in options.only})
    tokenizer = load_tokenizer(options.tokenizer)
    contenders = {name: CONTENDERS[name] for name in names}
    if options.datatrove is not None:
        contenders["datatrove"] = datatrove(options.datatrove.absolute())
    with tempfile.TemporaryDirectory() as directory:
        text_bytes = make_corpus(Path(directory), int(options.megabytes * 1e6))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, run in contenders.items():
                start = measure_start(run, tokenizer)
                found[name].append(measure(run, Path(directory), tokenizer) | {"start_s": start})
    report(found, options.json, text_bytes)


def report(found: dict[str, list[dict[str, float]]], path: Path | None, text_bytes: int) -> None:
    """The table, and the same as JSON."""
    rates = {
        name: {
            "wall": max(run["tokens"] / run["wall_s"] / 1e6 for run in runs),
            "net": max(run["tokens"] for run in runs)
            / (min(run["wall_s"] for run in runs) - min(run["start_s"] for run in runs))
            / 1e6,
            "per_core": max(run["tokens"] / run["cpu_s"] / 1e6 for run in runs),
        }
        for name, runs in found.items()
    }
    print(f"{'':<34}{'Mtok/s':>9}{'net':>7}{'per core':>10}")
    for name, rate in rates.items():
        print(f"{name:<34}{rate['wall']:>9.2f}{rate['net']:>7.2f}{rate['per_core']:>10.2f}")
    for encoder in ("gigatoken", "own library"):  # means something on a machine with two idle cores only
        one, two = f"ours, {encoder}", f"ours, {encoder}, 2 workers"
        if one in rates and two in rates:
            print(f"two workers over one, {encoder}, net: {rates[two]['net'] / rates[one]['net']:.2f}")
    versions: dict[str, str] = {}
    for name in ("sentencepiece", "gigatoken", "tokenizers", "pyarrow", "numpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),  # above one, `wall` and `net` tell of the neighbours
        "python": platform.python_version(),
        "versions": versions,
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "text_bytes": text_bytes, "million_tokens_per_second": rates, "runs": found}
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
