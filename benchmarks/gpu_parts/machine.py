"""What the machine is and reaches: a large matrix product and a copy inside the device's memory."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch

from gpu_parts.common import Part, part_of_arguments

_PACKAGES = ("torch", "triton", "deepspeed", "transformers", "flash-attn", "numpy", "pydantic", "liger-kernel")
_TIMES = 7  # of which the median counts


def describe() -> dict:
    """Device, driver and versions; `device` is "cpu" where PyTorch sees no GPU."""
    found: dict[str, object] = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if not torch.cuda.is_available():
        return found | {"device": "cpu", "processor": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": "cuda",
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": _driver(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError):
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return said[0] if said else "unknown"
    return "unknown"


def seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one action: the median of several rounds of `repeats` each, without a wait between those of a round."""

    def one_round() -> float:
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            action()
        _wait(device)
        return (time.perf_counter() - started) / repeats

    one_round()  # loads the kernel
    return median(one_round() for _ in range(_TIMES))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: torch.device) -> tuple[int, float]:
    """(size, FLOP/s) of a bf16 matrix product of random numbers."""
    size, repeats = (8192, 10) if device.type == "cuda" else (1024, 1)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return size, 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device, repeats)


def copy_rate(device: torch.device) -> float:
    """Bytes per second inside the device's memory, those read and those written together."""
    size, repeats = (2 * 2**30, 5) if device.type == "cuda" else (64 * 2**20, 1)
    source = torch.randint(256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, repeats)


def main(part: Part) -> int:
    """Measure and store."""
    device, put = torch.device(part.device), part.figures.put
    found = describe()
    name = f"{found.get('gpu', 'CPU')}, driver {found.get('driver', '-')}, CUDA {found.get('cuda', '-')}"
    put("machine", found, f"{name}, compute capability {found.get('capability', '-')}")
    size, flops = matmul_flops(device)
    put("matmul_flops", flops, f"{size} x {size} bf16 matrix product: {flops / 1e12:,.2f} TFLOP/s, median of {_TIMES}")
    rate = copy_rate(device)
    put("copy_bytes_per_second", rate, f"copy inside the memory: {rate / 1e9:,.0f} GB/s, read and written")
    return part.figures.end()


if __name__ == "__main__":
    if sys.argv[1:] == ["--describe"]:
        print(json.dumps(describe()))
        sys.exit(0)
    sys.exit(main(part_of_arguments("machine")))
