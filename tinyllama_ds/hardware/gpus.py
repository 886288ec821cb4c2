"""GPUs and networks by name, with the numbers of their spec sheets."""

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tinyllama_ds.errors import ConfigError

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU, as `gpus.toml` has it: bytes, FLOP/s, and bytes/s of its memory and of its link to the others."""

    name: str
    devices: tuple[str, ...]
    memory_bytes: int
    peak_flops: float
    memory_bandwidth: float
    link_bandwidth: float


@cache
def known_gpus() -> dict[str, Gpu]:
    """All GPUs by name."""
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {
        name: Gpu(
            name,
            tuple(row["devices"]),
            row["memory_mib"] * MIB,
            row["tflops"] * 1e12,
            row["memory_gb_s"] * 1e9,
            row["link_gb_s"] * 1e9,
        )
        for name, row in rows.items()
    }


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU behind a name such as `NVIDIA A100-SXM4-40GB`; None for one that is not in the table.

    The whole name counts: one word more is a different chip, a slower board or a slice of the GPU (`MIG 3g.40gb`).
    """
    name = " ".join(device_name.removeprefix("NVIDIA ").split())
    return next((gpu for gpu in known_gpus().values() if name in gpu.devices), None)


def gpu_named(name: str) -> Gpu:
    """The GPU of a name; raises `ConfigError` that lists the known ones."""
    known = known_gpus()
    if name.lower() not in known:
        raise ConfigError(
            f"--gpu {name!r} is unknown; expected {', '.join(known)}, or --gpu-memory and --peak-tflops for any other"
        )
    return known[name.lower()]


def custom_gpu(memory: str, peak_tflops: float, based_on: Gpu) -> Gpu:
    """A GPU of any size, with the bandwidths of another; `memory` is a number with GiB or GB, such as '40GiB'."""
    number = float(memory.lower().rstrip("gib "))
    size = int(number * (GIB if memory.lower().endswith("gib") else 10**9))
    name = f"{memory} GPU"
    return replace(based_on, name=name, devices=(name,), memory_bytes=size, peak_flops=peak_tflops * 1e12)


@dataclass(frozen=True)
class Network:
    """Interconnect: bandwidths in bytes/s as collectives reach them, and latencies in seconds."""

    node_bandwidth: float  # out of one host, in one direction
    link_bandwidth: float  # out of one GPU to the others of its host, in one direction
    node_latency: float
    link_latency: float

    @property
    def description(self) -> str:
        return (
            f"{self.node_bandwidth * 8 / 1e9:,.4g} Gbit/s between hosts and {self.link_bandwidth / 1e9:,.4g} GB/s"
            " inside, as collectives reach them"
        )


# NCCL's rings reach about four fifths of a link (nccl-tests: 230-240 of A100's 300 GB/s, 80-90 % of an InfiniBand
# port). Latencies are of the order that nccl-tests shows for the smallest messages, per hop.
LINK_SHARE = 0.8
NODE_LATENCY, LINK_LATENCY = 8e-6, 2e-6


def network_of(gpu: Gpu, node_gbit: float) -> Network:
    """A cluster of that GPU with so many Gbit/s out of each host, all ports together."""
    return Network(node_gbit / 8 * 1e9 * LINK_SHARE, gpu.link_bandwidth * LINK_SHARE, NODE_LATENCY, LINK_LATENCY)
