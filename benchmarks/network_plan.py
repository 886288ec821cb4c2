"""The plan's bytes and seconds next to real ones: ranks on network namespaces, one thread each, links throttled by tc.

    python benchmarks/network_plan.py bytes --json benchmarks/results/network_bytes.json
    python benchmarks/network_plan.py time --json benchmarks/results/network_time.json

Needs root and Debian's iproute2. `bytes` compares the interface counters with the formula for 2 and 4 hosts; `time`
measures a step on free links and predicts it on throttled ones.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from plan_launching import deepspeed_config, namespaces, run_ranks, throttle
from tinyllama_ds.commands.arguments import Number, Parser, WholeNumber, output_file
from tinyllama_ds.hardware.gpus import Network
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.planning.communication import Hosts, collectives_of, traffic_of
from tinyllama_ds.planning.layout import Layout, read_layout
from tinyllama_ds.planning.timing import exposed_seconds

MODEL = LlamaConfig(2048, 256, 704, 4, 4, 2, 256)  # 4.0M parameters
T, MICRO_BATCH, ACCUMULATION = 64, 2, 2
# ZeRO-3 as on a model that is much larger than what may be gathered at once; `keep` and hpZ as shipped.
LEAN = {"stage3_max_live_parameters": 700_000, "stage3_max_reuse_distance": 100_000,
        "stage3_prefetch_bucket_size": 300_000, "stage3_param_persistence_threshold": 1000}  # fmt: skip
LAYOUTS = {"zero0": {}, "zero1": {}, "zero2": {}, "zero3": LEAN, "zero3_keep": {},
           "zero3_hpz": LEAN | {"zero_hpz_partition_size": 2}}  # fmt: skip
# A full Ethernet frame: 14 bytes of Ethernet, 20 of IPv4 and 32 of TCP with time stamps around 1,448 bytes of payload;
# and a host that receives as much as it sends acknowledges every second frame with one of 66 bytes.
PAYLOAD_SHARE = 1448 / (1514 + 66 / 2)
LATENCY = 1e-4


def setting(name: str, accumulation: int, steps: int) -> dict:
    """What plan_probe.py is told."""
    return {
        "config": deepspeed_config(name, MICRO_BATCH, accumulation, **LAYOUTS[name]),
        "model": MODEL.to_dict(), "attention": "sdpa", "sequence": T, "micro_batch": MICRO_BATCH,
        "accumulation": accumulation, "steps": steps, "profile": False, "recompute": 0, "compile": False,
        "interface": "e0",
    }  # fmt: skip


def layout_of(name: str, accumulation: int, ranks: int) -> Layout:
    """The layout that the plan reads from the same config."""
    return read_layout(deepspeed_config(name, MICRO_BATCH, accumulation, **LAYOUTS[name]), name, ranks)


def planned_bytes(name: str, ranks: int, accumulation: int = ACCUMULATION) -> float:
    """Payload that each rank sends per step: gloo's algorithms, every rank a host of its own."""
    layout = layout_of(name, accumulation, ranks)
    found = collectives_of(MODEL, layout, ranks, accumulation, layout.hpz)
    return sum(part.sent_per_rank(layout.hpz if part.is_in_node else ranks, "gloo") for part in found)


def compare_bytes(folder: Path, layouts: Sequence[str], hosts: Sequence[int]) -> list[dict]:
    """A row per layout and number of hosts."""
    rows = []
    for ranks in hosts:
        with namespaces(ranks):
            for name in layouts:
                found = run_ranks(setting(name, ACCUMULATION, 2), ranks, folder / f"{name}_{ranks}", True)
                measured = sum(rank["sent"] for rank in found) / ranks
                planned = planned_bytes(name, ranks)
                rows.append({"layout": name, "ranks": ranks, "planned": planned, "measured": measured})
                print(f"{name:<12} {ranks} ranks  planned {planned:>12,.0f}  sent {measured:>12,.0f}"
                      f"  {measured / planned - 1:+.2%}", flush=True)  # fmt: skip
    return rows


def predicted_seconds(name: str, mbit: float, free: dict) -> float:
    """The step on links of so many Mbit/s, from the seconds of a step on free links."""
    layout = layout_of(name, 1, 2)
    rate = mbit / 8 * 1e6 * PAYLOAD_SHARE
    network = Network(rate, rate, LATENCY, LATENCY)
    traffic = tuple(
        traffic_of(part, Hosts(2, 1), network, algorithm="gloo") for part in collectives_of(MODEL, layout, 2, 1)
    )
    return free["fastest"] + exposed_seconds(traffic, {"forward": 0.0, "backward": 0.0})


def compare_seconds(folder: Path, layouts: Sequence[str], rates: Sequence[float]) -> list[dict]:
    """A row per layout and link; two hosts, accumulation 1. CPU ranks are taken to hide nothing."""
    rows = []
    for name in layouts:
        with namespaces(2):
            (free, _) = run_ranks(setting(name, 1, 5), 2, folder / name, True)
            for mbit in rates:
                throttle(2, mbit)
                steps = 1 if mbit < 50 else 3
                (found, _) = run_ranks(setting(name, 1, steps), 2, folder / f"{name}_{mbit:g}", True)
                planned, measured = predicted_seconds(name, mbit, free), found["fastest"]
                row = {"layout": name, "mbit": mbit, "free": free["fastest"], "sent": free["sent"]}
                rows.append(row | {"planned": planned, "measured": measured})
                print(f"{name:<12} {mbit:>6g} Mbit/s  free {free['fastest']:.3f}  planned {planned:.3f}"
                      f"  measured {measured:.3f}  {planned / measured - 1:+.1%}", flush=True)  # fmt: skip
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Print a row per measurement, and write the JSON."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("bytes", "time"))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: all; of time zero1 and zero3")
    parser.add_argument(
        "--hosts", type=WholeNumber(2, 64), nargs="+", default=[2, 4], help="of bytes (default: %(default)s)"
    )
    parser.add_argument(
        "--mbit", type=Number(most=1e6), nargs="+", default=[1000, 100, 10], help="of time (default: %(default)s)"
    )
    parser.add_argument("--json", type=output_file)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "bytes":
            results = compare_bytes(Path(folder), options.layouts or list(LAYOUTS), options.hosts)
        else:
            results = compare_seconds(Path(folder), options.layouts or ["zero1", "zero3"], options.mbit)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
