"""Order and loader: samples per second, the price of a seek to sample 5 x 10^11, and what a batch costs of a step.

python benchmarks/data_order.py --json benchmarks/results/data_order.json
"""

import json
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinyllama_ds.commands.arguments import Parser, WholeNumber, output_file
from tinyllama_ds.data.loader import SampleReader
from tinyllama_ds.data.order import MixtureStage, SampleOrder
from tinyllama_ds.data.shards import ShardName, ShardWriter
from tinyllama_ds.data.stream import TokenStream

FAR = 5 * 10**11
T = 2048
WEIGHTS = {"slimpajama": 0.75, "starcoderdata": 0.15, "proof-pile-2": 0.1}


def order_of(samples: int) -> SampleOrder:
    """Three sources, and a ramp in the second stage, where every figure marked so is measured."""
    stages = [MixtureStage(FAR, {"slimpajama": 1.0}), MixtureStage(10**12, WEIGHTS, ramp_samples=3_000_000)]
    return SampleOrder(3407, dict.fromkeys(WEIGHTS, samples), stages)


def write_shards(root: Path, shards: int, tokens: int) -> dict[str, TokenStream]:
    """Sources of random tokens in shards of a realistic number."""
    rng = np.random.default_rng(0)
    for source in WEIGHTS:
        for number in range(shards):
            writer = ShardWriter(ShardName(root, source, "train", number, shards), 32_000)
            ids = rng.integers(0, 32_000, tokens)
            writer.add(ids, np.full(tokens // 1000, 1000))
            writer.commit("", "", {}, [])
    return {source: TokenStream(root / source / "train") for source in WEIGHTS}


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The median of several runs."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    """Print a table of figures next to their bars."""
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=WholeNumber(1, 1000), default=5)
    parser.add_argument("--shards", type=WholeNumber(1, 10_000), default=20, help="of a source (default: %(default)s)")
    parser.add_argument("--shard-tokens", type=WholeNumber(1, 10**10), default=2_000_000, help="default: %(default)s")
    parser.add_argument("--json", type=output_file)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        streams = write_shards(Path(directory), options.shards, options.shard_tokens)
        samples = streams["slimpajama"].num_samples(T)

        def seek() -> SampleReader:
            reader = SampleReader(streams, order_of(samples), T, 32_000)
            assert reader.read(np.arange(FAR, FAR + 64)).shape == (64, T + 1)
            return reader

        seek_ms = seconds(seek, 1) * 1000
        tracemalloc.start()
        reader = seek()
        seek_mib = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        rank_batch = seconds(lambda: reader.read(np.arange(FAR + 4096, FAR + 4096 + 64)), options.rounds)
        document_ids = seconds(lambda: reader.read_document_ids(np.arange(FAR + 4096, FAR + 4096 + 64)), options.rounds)
    order = order_of(300_000_000)
    million = np.arange(10**6)
    constant = seconds(lambda: order.locate(million), options.rounds)
    ramp = seconds(lambda: order.locate(million + FAR), options.rounds)
    figures = {
        "seek to sample 5e11 and a batch of 64 (ms, bar 50)": seek_ms,
        "more memory for it (MiB, bar 50)": seek_mib,
        "order, one mixture (M samples/s, bar 1)": 1 / constant,
        "order, in a ramp of three sources (M samples/s, bar 1)": 1 / ramp,
        "a rank's 64 samples of a step (ms)": rank_batch * 1000,
        "their share of a 5 s step (%, bar 1)": rank_batch / 5 * 100,
        "their document borders for a mask (ms)": document_ids * 1000,
    }
    for name, figure in figures.items():
        print(f"{name:<58}{figure:>10.3f}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
