"""The plan's model states next to what CPU ranks hold, and its peak next to theirs, layout by layout.

    python benchmarks/plan_memory.py --ranks 1 2 4 --json benchmarks/results/plan_memory.json
    python benchmarks/plan_memory.py --long 32768 --json benchmarks/results/plan_memory_long.json

States are compared before the optimizer's step, when gradients are there; the peak with what PyTorch's CPU allocator
held at most. CPU ranks have no CUDA context and no caching allocator, so those rows are skipped.

With --long it is one long sequence on one rank and shared by two, all blocks recomputed. The peak is what the process
held between steps, and how much its resident memory grew in one: after steps on short sequences, which load and
allocate what the length does not decide. (The allocator's own count misses what gloo's threads free.) Large tensors are
mapped one by one (MALLOC_MMAP_THRESHOLD_), so that freed memory is not resident.
"""

import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

from plan_launching import deepspeed_config, run_ranks
from tinyllama_ds.commands.arguments import RANKS, Parser, WholeNumber, output_file
from tinyllama_ds.hardware.devices import installed_versions
from tinyllama_ds.model.config import MAX_CHUNK_LOGITS, LlamaConfig
from tinyllama_ds.planning.activations import Work
from tinyllama_ds.planning.layout import read_layout
from tinyllama_ds.planning.memory import Memory, memory_of

MODEL = LlamaConfig(4096, 256, 704, 4, 4, 2, 512)  # 5.0M parameters
LONG_MODEL = LlamaConfig(512, 256, 704, 12, 4, 2, 32_768, head_dim=32)  # 7.9M parameters
T, MICRO_BATCH, ACCUMULATION = 256, 2, 2
STATES = ("weights", "gradients", "optimizer", "gathered weights, persistent")  # rows of a plan
LAYOUTS = ("zero0", "zero1", "zero2", "zero3", "zero3_keep", "zero3_hpz", "zero3_offload")


def planned(name: str, ranks: int) -> tuple[Memory, int]:
    """The plan's rows for a rank of the measurement, and what it puts into host memory."""
    layout = read_layout(deepspeed_config(name, MICRO_BATCH, ACCUMULATION, **hpz(name, ranks)), name, ranks)
    work = replace(Work(MICRO_BATCH, T), chunk_logits=MAX_CHUNK_LOGITS["cpu"])
    offloaded = (2 * layout.master_bytes + layout.moment_bytes) if layout.offload_optimizer else 0  # and its gradients
    return memory_of(MODEL, layout, work, ranks), offloaded * ceil(MODEL.num_parameters / ranks)


def hpz(name: str, ranks: int) -> dict[str, int]:
    """Nodes of two ranks, or of one where there is but one."""
    return {"zero_hpz_partition_size": min(2, ranks)} if name == "zero3_hpz" else {}


def compare(name: str, ranks: int, folder: Path) -> dict:
    """One layout: model states and peak, planned and measured, in bytes of one rank."""
    setting = {
        "config": deepspeed_config(name, MICRO_BATCH, ACCUMULATION, **hpz(name, ranks)),
        "model": MODEL.to_dict(), "attention": "sdpa", "sequence": T, "micro_batch": MICRO_BATCH,
        "accumulation": ACCUMULATION, "steps": 1, "profile": True, "recompute": 0, "compile": False,
    }  # fmt: skip
    found = run_ranks(setting, ranks, folder / f"{name}_{ranks}")[0]
    memory, on_host = planned(name, ranks)
    held = found["before_step"]
    kinds = ("weights", "gradients", "optimizer")
    return {
        "layout": name,
        "ranks": ranks,
        "planned_states": sum(row.bytes for row in memory.rows if row.name in STATES) + on_host,
        "measured_states": sum(held[kind] for kind in kinds) + (held["other"] if on_host else 0),
        "planned_peak": memory.allocated + on_host,
        "measured_peak": max(found["peak"].values()),
        "measured": {kind: held[kind] for kind in (*kinds, "buckets", "other")},
    }


def compare_long(length: int, shared: int, folder: Path) -> dict:
    """One sequence on `shared` ranks: peak and activations of a rank, planned and measured, in bytes."""
    model = replace(LONG_MODEL, max_position_embeddings=length)
    config = deepspeed_config("zero2", 1, 1)
    setting = {
        "config": config, "model": model.to_dict(), "attention": "sdpa", "sequence": length,
        "warmup_sequence": min(2048, length), "micro_batch": 1, "accumulation": 1, "steps": 1, "profile": False,
        "recompute": 1, "compile": False, "sequence_parallel": shared,
    }  # fmt: skip
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    found = run_ranks(setting, shared, folder / f"long_{shared}")[0]
    held, before_step = (sum(found[when].values()) for when in ("between_steps", "before_step"))
    work = Work(1, length, recompute_every=1, chunk_logits=MAX_CHUNK_LOGITS["cpu"], sequence_parallel=shared)
    memory = memory_of(model, read_layout(config, "zero2", shared), work, shared)
    return {
        "tokens": length,
        "sequence_parallel": shared,
        "planned_peak": memory.allocated,
        "measured_peak": held + found["resident_growth"],
        "planned_activations": max(memory.peaks.values()),
        "measured_activations": found["resident_growth"] - (before_step - held),
        "seconds": found["fastest"],
        "rows": {row.name: row.bytes for row in memory.rows},
    }


def measure_long(length: int, folder: Path) -> list[dict]:
    """One rank, and two that share the sequence; prints a row for each."""
    rows = [compare_long(length, shared, folder) for shared in (1, 2)]
    for row in rows:
        print(f"{length:,} tokens, shared by {row['sequence_parallel']}", *(
            f"  {name} {row[f'planned_{name}']:>12,} planned {row[f'measured_{name}']:>12,} measured"
            f" {row[f'planned_{name}'] / row[f'measured_{name}'] - 1:+.1%}" for name in ("peak", "activations")
        ), flush=True)  # fmt: skip
    planned, measured = (rows[1][name] / rows[0][name] for name in ("planned_activations", "measured_activations"))
    print(f"activations of one of two ranks: {planned:.3f} planned, {measured:.3f} measured")
    return rows


def machine() -> dict:
    """Where it was measured, and with what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "processor": next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine()),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": installed_versions(("torch", "deepspeed")),
        "command": shlex.join(sys.argv),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Print a row per layout and number of ranks, and write the JSON."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=RANKS, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--long", type=WholeNumber(64, 10_000_000), metavar="TOKENS", help="one sequence of so many")
    parser.add_argument("--json", type=output_file)
    options = parser.parse_args(words)
    if options.long:
        with tempfile.TemporaryDirectory() as folder:
            measured = {"rows": measure_long(options.long, Path(folder)), "machine": machine()}
        if options.json:
            options.json.write_text(json.dumps(measured, indent=1) + "\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            for name in options.layouts:
                row = compare(name, ranks, Path(folder))
                rows.append(row)
                states, peak = (row[f"planned_{k}"] / row[f"measured_{k}"] - 1 for k in ("states", "peak"))
                print(f"{name:<14} {ranks} ranks  states {row['planned_states']:>11,} planned"
                      f" {row['measured_states']:>11,} held {states:+.1%}   peak {row['planned_peak']:>11,} planned"
                      f" {row['measured_peak']:>11,} held {peak:+.1%}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
