"""Whether ranks compute on GPUs or on the CPU, by PyTorch, nvidia-smi and the environment; installed packages.

The decisions take plain values; `detect_gpus` asks this machine for them.
"""

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tinyllama_ds.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# DeepSpeed's runner forgets CUDA_VISIBLE_DEVICES of this shell; in this one it arrives at the ranks of this machine.
VISIBLE_HERE_VARIABLE = "TINYLLAMA_DS_VISIBLE_DEVICES"
# That affect a result.
PACKAGES = ("torch", "deepspeed", "numpy", "transformers", "sentencepiece", "tokenizers", "flash-attn")
_HIDING = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs on purpose
_NAME = re.compile(r"(GPU|MIG)-\S+")
_FIRST_WITH_BF16 = (8, 0)
_CPU_WITH_BF16 = re.compile(r"^flags\s*:.*\b(amx_tile|avx512_bf16)\b", re.MULTILINE)
_FIELDS = "name,memory.total,memory.used,driver_version"
_SMI_SECONDS = 20
_HIDE = f'or hide the GPUs with {VISIBLE}="" to train on the CPU'


@dataclass(frozen=True)
class VisibleGpus:
    """The GPUs that one process sees."""

    accelerator: str | None  # DS_ACCELERATOR, by which a user chooses the CPU
    visible: str | None  # CUDA_VISIBLE_DEVICES; None where it is not set
    count: int  # of devices that PyTorch sees
    torch: str  # its version
    cuda: str | None  # the version that it is built for; None for a build without
    warning: str = ""  # PyTorch's warning when it detected devices
    listed: tuple[dict, ...] = ()  # by nvidia-smi; asked where PyTorch sees fewer than expected


@dataclass(frozen=True)
class Machine:
    """The hardware that the machines of a run have in common."""

    device_type: str  # cuda or cpu
    bf16: bool  # whether matrix products in bf16 have hardware
    cores: int
    capability: tuple[int, int] | None = None  # of its GPUs: the lowest compute capability


def detect_gpus() -> VisibleGpus:
    """Query PyTorch; also nvidia-smi if PyTorch sees no GPU or fewer than the environment names."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get(VISIBLE)
    is_complete = count > 0 and (visible is None or len(visible.split(",")) == count)
    return VisibleGpus(
        accelerator=os.environ.get("DS_ACCELERATOR"),
        visible=visible,
        count=count,
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        warning=str(caught[0].message) if caught else "",
        listed=() if is_complete else tuple(list_gpus()),
    )


def device_type_of(gpus: VisibleGpus) -> str:
    """`cuda` or `cpu`. Raises `ConfigError` if existing GPUs would be idle without the user having asked for it."""
    if gpus.accelerator == "cpu":
        return "cpu"
    _reject_wrong_ids(gpus)
    if gpus.count:
        return "cuda"
    if gpus.visible in _HIDING or not (gpus.listed or gpus.warning):
        return "cpu"
    what = f"{len(gpus.listed)} x {gpus.listed[0]['name']}" if gpus.listed else "GPUs"
    if gpus.cuda is None:
        raise ConfigError(
            f"torch {gpus.torch} is built without CUDA, and this machine has {what}; install a torch with CUDA, {_HIDE}"
        )
    driver = f" with driver {gpus.listed[0]['driver']}" if gpus.listed else ""
    reason = gpus.warning.removeprefix("CUDA initialization: ")
    reason = re.split(r"\. (?=[A-Z])| \(Triggered", reason)[0]
    raise ConfigError(
        f"torch {gpus.torch} for CUDA {gpus.cuda} cannot use {what} of this machine{driver}"
        f"{f' ({reason})' if reason else ''}; update the driver, install a torch for it, {_HIDE}"
    )


def _reject_wrong_ids(gpus: VisibleGpus) -> None:
    """CUDA silently ignores all devices from the first invalid entry on."""
    if gpus.visible is None or gpus.visible in _HIDING:
        return
    entries = [entry.strip() for entry in gpus.visible.split(",")]
    wrong = next((entry for entry in entries if not (entry.isdecimal() or _NAME.fullmatch(entry))), None)
    if wrong is not None:
        raise ConfigError(
            f"{VISIBLE} is {gpus.visible!r}: {wrong!r} is not a GPU; CUDA ignores all entries from it on; expected"
            " numbers separated by commas"
        )
    twice = next((entry for entry in entries if entries.count(entry) > 1), None)
    if twice is not None:
        raise ConfigError(f"{VISIBLE} is {gpus.visible!r}: lists GPU {twice} twice; expected each once")
    beyond = [entry for entry in entries if entry.isdecimal() and int(entry) >= len(gpus.listed)]
    if gpus.listed and gpus.count < len(entries) and beyond:
        raise ConfigError(
            f"{VISIBLE} is {gpus.visible!r}: there is no GPU {beyond[0]}; expected 0 to {len(gpus.listed) - 1} on this"
            f" machine, in a hostfile {len(gpus.listed)} slots at most"
        )


def hidden_gpus(gpus: VisibleGpus) -> str | None:
    """A sentence if the environment hides the GPUs of this machine."""
    if gpus.visible not in _HIDING or gpus.accelerator == "cpu" or not gpus.listed:
        return None
    return f"{VISIBLE} is {gpus.visible!r}, which hides this machine's {len(gpus.listed)} GPUs; computing on the CPU"


def device_index(gpus: VisibleGpus, local_rank: int, local_size: int | None) -> int:
    """The index of a rank's device among the visible ones.

    A launcher that masks devices (`srun --gpus-per-task=1`) shows each rank only its own, with index 0.
    Raises `ConfigError` if ranks would share a device.
    """
    is_masked = gpus.visible is not None and gpus.count == len(gpus.visible.split(",")) == 1
    if is_masked:
        return 0
    ranks = max(local_rank + 1, local_size or 0)
    if ranks > gpus.count:
        raise ConfigError(f"{ranks} ranks on this host, and PyTorch sees {gpus.count} GPUs; expected one GPU per rank")
    return local_rank


def reject_unsupported(name: str, capability: tuple[int, int], architectures: list[str], torch: str) -> None:
    """Raises `ConfigError` for a GPU that this build of PyTorch has no kernels for."""
    major, minor = capability
    for architecture in architectures:  # such as sm_90, sm_90a, or compute_120: code that the driver compiles
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        kind, built, suffix = match[1], (int(match[2]), int(match[3])), match[4]
        if kind == "compute" and not suffix and built <= capability:
            return
        if built[0] == major and (built[1] == minor if suffix == "a" else built[1] <= minor):
            return
    raise ConfigError(
        f"{name} has compute capability {major}.{minor}, and torch {torch} is built for {', '.join(architectures)};"
        " install a torch for it"
    )


def reject_unsupported_devices(gpus: VisibleGpus, indices: Iterable[int]) -> None:
    """The same for devices of this machine."""
    import torch

    if gpus.cuda is None:  # ROCm names its architectures otherwise
        return
    for index in indices:
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        reject_unsupported(name, capability, torch.cuda.get_arch_list(), gpus.torch)


def bf16_of_gpu(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has hardware for bf16 matrix products."""
    return capability >= _FIRST_WITH_BF16


def cpu_has_bf16(cpuinfo: str | None = None) -> bool:
    """The same of this machine's CPU, without PyTorch: AMX or AVX-512 BF16 in `/proc/cpuinfo`."""
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    return _CPU_WITH_BF16.search(text) is not None


def list_gpus() -> list[dict]:
    """Name, memory in MiB, memory in use, driver and compute capability of every NVIDIA GPU, as nvidia-smi lists them.

    The capability is None for drivers before 510.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    lines = _query_smi(f"{_FIELDS},compute_cap") or _query_smi(_FIELDS)
    rows = [[part.strip() for part in line.split(",")] for line in lines]
    return [
        {"name": row[0], "mib": row[1], "used_mib": row[2], "driver": row[3], "capability": _capability(row[4:])}
        for row in rows
        if len(row) in (4, 5)
    ]


def _query_smi(fields: str) -> list[str]:
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        ).stdout.splitlines()
    except (subprocess.SubprocessError, OSError):
        return []


def _capability(rest: list[str]) -> list[int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", "".join(rest))
    return [int(match[1]), int(match[2])] if match else None


def machine_of(report: dict) -> Machine:
    """The `Machine` of a host's report (`gpus`, `cores`, `bf16` of its CPU).

    An unknown capability is assumed to be that of an A100, the first GPU with bf16.
    """
    if not report["gpus"]:
        return Machine("cpu", report["bf16"], report["cores"])
    capability = min(tuple(gpu["capability"] or _FIRST_WITH_BF16) for gpu in report["gpus"])
    return Machine("cuda", bf16_of_gpu(capability), report["cores"], capability)


def common_machine(machines: Mapping[str, Machine]) -> Machine:
    """The common capabilities of all hosts. Raises `ConfigError` if only some of them have GPUs."""
    without = [host for host, machine in machines.items() if machine.device_type == "cpu"]
    with_gpus = [host for host in machines if host not in without]
    if without and with_gpus:
        raise ConfigError(
            f"{with_gpus[0]} has GPUs and {without[0]} has none that nvidia-smi lists; expected GPUs on all hosts or"
            f" none; exclude the others by --exclude {'@'.join(without)} or --include"
        )
    everyone = machines.values()
    capabilities = [machine.capability for machine in everyone if machine.capability is not None]
    return Machine(
        device_type="cpu" if without else "cuda",
        bf16=all(machine.bf16 for machine in everyone),
        cores=min(machine.cores for machine in everyone),
        capability=min(capabilities, default=None),
    )


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package that is installed on this machine."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
