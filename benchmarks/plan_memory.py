"""The plan's model states next to what CPU ranks hold, and its peak next to theirs, layout by layout.

    python benchmarks/plan_memory.py --ranks 1 2 4 --json benchmarks/results/plan_memory.json

States are compared before the optimizer's step, when gradients are there; the peak with what PyTorch's CPU allocator
held at most. CPU ranks have no CUDA context and no caching allocator, so those rows are skipped.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path

from plan_launching import deepspeed_config, run_ranks
from tinyllama_ds.commands.arguments import RANKS, Parser, output_file
from tinyllama_ds.model.config import MAX_CHUNK_LOGITS, LlamaConfig
from tinyllama_ds.planning.activations import Work
from tinyllama_ds.planning.layout import read_layout
from tinyllama_ds.planning.memory import Memory, memory_of

MODEL = LlamaConfig(4096, 256, 704, 4, 4, 2, 512)  # 5.0M parameters
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


def main(words: Sequence[str] | None = None) -> None:
    """Print a row per layout and number of ranks, and write the JSON."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=RANKS, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--json", type=output_file)
    options = parser.parse_args(words)
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
