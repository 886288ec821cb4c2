"""Host time that DeepSpeed adds to a block: its hooks are Python, and a GPU waits for the host where blocks are short.

    python benchmarks/layer_overhead.py

A model of TinyLlama's 22 blocks, so narrow that all of its time is the host's, makes micro-batches under each ZeRO file
of `ds_configs/` and as a plain module, in turn, on one CPU rank. What a file costs per block, forward and backward
together, is its processor time over the plain module's, divided by the blocks.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tinyllama_ds.commands.arguments import Parser, WholeNumber
from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.train.engine import start_process_group, wrap

NARROW = LlamaConfig(64, 32, 64, 22, 2, 1, 16)
CONFIGS = Path(__file__).parents[1] / "ds_configs"
FILES = ("zero1", "zero2", "zero3", "zero3_keep")
WARMUP = 5  # micro-batches
_context = multiprocessing.get_context("fork")  # each measurement in a process that no other has used


def plain() -> Callable[[], None]:
    """Forward and backward of the model alone."""
    model = build_model(NARROW, "sdpa", seed=1, dtype=torch.bfloat16)

    def micro_batch() -> None:
        model(*tokens()).backward()
        model.zero_grad()

    return micro_batch


def under_deepspeed(name: str) -> Callable[[], None]:
    """The same in DeepSpeed's engine, gradients accumulated as between two optimizer steps."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    keep = {key: config[key] for key in ("bf16", "data_types", "optimizer", "zero_optimization")}
    start_process_group(read_world())
    size = {"train_micro_batch_size_per_gpu": 1, "timers": {"throughput": {"enabled": False}}}
    engine = wrap(build_model(NARROW, "sdpa", seed=1), keep | size, 1.0)

    def micro_batch() -> None:
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(engine(*tokens()), scale_wrt_gas=False)

    return micro_batch


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.randint(NARROW.vocab_size, (1, 9))
    return row[:, :-1], row[:, 1:]


def measure(name: str, micro_batches: int) -> float:
    """Milliseconds of processor time of a micro-batch: the median of so many."""
    torch.set_num_threads(1)
    micro_batch = plain() if name == "plain" else under_deepspeed(name)
    seconds = []
    for _ in range(WARMUP + micro_batches):
        started = time.process_time()
        micro_batch()
        seconds.append(time.process_time() - started)
    return 1000 * statistics.median(seconds[WARMUP:])


def measure_in_a_process(name: str, micro_batches: int) -> float:
    """The same in a new process."""
    receiver, sender = _context.Pipe(duplex=False)
    process = _context.Process(target=_measure_and_send, args=(name, micro_batches, sender))
    process.start()
    sender.close()
    milliseconds = receiver.recv()  # EOFError where it has failed, and said why
    process.join()
    return milliseconds


def _measure_and_send(name: str, micro_batches: int, sender: Connection) -> None:
    sender.send(measure(name, micro_batches))
    sender.close()
    os._exit(0)  # gloo's threads can abort at the interpreter's end


def main() -> None:
    """Print a line per file."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=list(FILES), help="default: %(default)s")
    parser.add_argument(
        "--rounds", type=WholeNumber(1, 1000), default=3, help="processes of each (default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batches", type=WholeNumber(1, 100_000), default=40, help="of a process (default: %(default)s)"
    )
    options = parser.parse_args()
    rounds: dict[str, list[float]] = {name: [] for name in ("plain", *options.files)}
    for _ in range(options.rounds):
        for name, found in rounds.items():
            found.append(measure_in_a_process(name, options.micro_batches))
    alone = statistics.median(rounds["plain"])
    for name, found in rounds.items():
        whole = statistics.median(found)
        beyond = 1000 * (whole - alone) / NARROW.num_hidden_layers
        print(f"{name:12} {whole:7.2f} ms a micro-batch, {beyond:5.0f} us a block beyond the plain module's")


if __name__ == "__main__":
    main()
