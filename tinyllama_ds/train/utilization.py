"""How fast and how full a device is: its peak FLOP/s, the share of it that is used, and peak memory."""

import resource
import time
from functools import cache

import torch

from tinyllama_ds.distributed.collectives import gather_from_ranks
from tinyllama_ds.hardware.gpus import GIB, gpu_of_device
from tinyllama_ds.model.config import dtype_name

_LEAST_SECONDS = 0.005  # of a matrix product whose rate is taken


@cache  # a matrix product takes a moment
def peak_flops(device: torch.device, dtype: torch.dtype, ranks: int = 1) -> tuple[float, str]:
    """(FLOP/s of one device, source): that of its spec sheet, else a matrix product measured now.

    With several ranks that is collective the first time, because they share a machine's cores, caches and clock: all
    measure at once, as they will compute, and the best is kept.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu = gpu_of_device(name)
        if gpu is not None and dtype == torch.bfloat16:
            return gpu.peak_flops, f"spec sheet of {name}"
    return measured_together(device, dtype, ranks), f"a measured {dtype_name(dtype)} matrix product"


def measured_together(device: torch.device, dtype: torch.dtype, ranks: int) -> float:
    """FLOP/s of a large matrix product while all ranks compute one, of the fastest. Collective with several ranks."""
    if ranks == 1:
        return measured_peak(device, dtype)
    gather_from_ranks(None)  # all begin at the same time
    return max(gather_from_ranks(measured_peak(device, dtype)))


def utilisation(flops: float, peak: float) -> float | None:
    """The share of the peak; None where it is above 1: then the peak was measured too low, and the share is unknown."""
    return flops / peak if flops <= peak else None


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of several: size 8,192 on a GPU, elsewhere 1,024 or 2,048."""
    sizes, products = ((8192,), 10) if device.type == "cuda" else ((1024, 2048), 1)
    for size in sizes:
        seconds = _product_seconds(size, products, device, dtype)
        if seconds > _LEAST_SECONDS:
            break
    return 2 * size**3 / seconds


def _product_seconds(size: int, products: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / products

    seconds()  # loads the kernel
    return min(seconds() for _ in range(4))


def memory_bytes(device: torch.device) -> int:
    """Peak memory: what the allocator held on a GPU, the resident size of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory(device: torch.device) -> str:
    """Peak memory as text, for a GPU with its total memory."""
    held = f"{memory_bytes(device) / GIB:.1f} GiB"
    if device.type == "cuda":
        held += f" of {torch.cuda.get_device_properties(device).total_memory / GIB:.1f} GiB"
    return held
