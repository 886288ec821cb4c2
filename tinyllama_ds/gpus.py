"""GPUs and networks by name, with the numbers of their spec sheets."""

from dataclasses import dataclass, replace

from tinyllama_ds.errors import ConfigError

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory as nvidia-smi shows it, dense bf16 rate with fp32 accumulation, memory and link bandwidth."""

    name: str
    devices: tuple[str, ...]  # every name that CUDA gives it, without the maker's
    memory_bytes: int
    peak_flops: float
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s to the other GPUs of its host, in one direction: NVLink, or PCIe where it has none


def _gpu(name: str, devices: str, memory_mib: int, peak_tflops: float, memory_gb_s: float, link_gb_s: float) -> Gpu:
    names = tuple(devices.split(", "))
    return Gpu(name, names, memory_mib * MIB, peak_tflops * 1e12, memory_gb_s * 1e9, link_gb_s * 1e9)


# NVIDIA's spec sheets: A100 (2021), H100 (2022), H100 NVL (2023), H200 (2023), HGX B200 (2024), L4, L40, L40S, A10,
# A10G, RTX A6000; for GeForce the whitepapers of the GA102 and Ada architectures. Sparsity is never counted.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", "A100-SXM4-40GB, A100-PCIE-40GB", 40_960, 312, 1555, 300),
        _gpu("a100-80g", "A100-SXM4-80GB, A100 80GB PCIe", 81_920, 312, 2039, 300),
        _gpu("h100", "H100 80GB HBM3", 81_559, 989, 3350, 450),
        _gpu("h100-pcie", "H100 PCIe", 81_559, 756, 2000, 64),
        _gpu("h100-nvl", "H100 NVL", 95_830, 835, 3900, 300),
        _gpu("h200", "H200", 143_771, 989, 4800, 450),
        _gpu("b200", "B200", 183_359, 2250, 8000, 900),
        _gpu("rtx-3090", "GeForce RTX 3090", 24_576, 71, 936, 32),
        _gpu("rtx-4090", "GeForce RTX 4090", 24_564, 165, 1008, 32),
        _gpu("rtx-a6000", "RTX A6000", 49_140, 155, 768, 32),
        _gpu("l40s", "L40S", 46_068, 362, 864, 32),
        _gpu("l40", "L40", 46_068, 181, 864, 32),
        _gpu("a10", "A10", 23_028, 125, 600, 32),
        _gpu("a10g", "A10G", 23_028, 70, 600, 32),
        _gpu("l4", "L4", 23_034, 121, 300, 32),
    )
}


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU behind a name such as `NVIDIA A100-SXM4-40GB`; None for one that is not in the table.

    The whole name counts: one word more is another chip, a slower board or a slice of the GPU (`MIG 3g.40gb`).
    """
    name = " ".join(device_name.removeprefix("NVIDIA ").split())
    return next((gpu for gpu in GPUS.values() if name in gpu.devices), None)


def gpu_named(name: str) -> Gpu:
    """The GPU of a name; raises `ConfigError` that lists the known ones."""
    if name.lower() not in GPUS:
        raise ConfigError(
            f"--gpu {name!r} is unknown; expected {', '.join(GPUS)}, or --gpu-memory and --peak-tflops for any other"
        )
    return GPUS[name.lower()]


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
