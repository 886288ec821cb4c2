"""This process among all ranks, by the variables of its launcher: deepspeed, torchrun, mpirun or srun."""

import os
import re
import signal
import time
from dataclasses import dataclass

import torch

from tinyllama_ds.distributed.network import interface_towards
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hardware.devices import (
    VISIBLE,
    VISIBLE_HERE_VARIABLE,
    detect_gpus,
    device_index,
    device_type_of,
    reject_unsupported_devices,
)

# Variables for rank, local rank and number of ranks; the first launcher of which all are set has started this process.
_LAUNCHERS = {
    "deepspeed, torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "OpenMPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    # Set for the tasks of srun alone; SLURM_NTASKS is there in the batch script too, which is not a rank.
    "Slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
}
# The number of ranks on this host: of deepspeed, torchrun, OpenMPI and MPICH.
_LOCAL_SIZES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_LOOPBACK = ("127.0.0.1", "localhost")
_DEFAULT_PORT = "29500"
TURN_SECONDS = 30  # by which rank 0 may be later than the others


@dataclass(frozen=True)
class DistributedInfo:
    """This process among all others."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int | None = None  # ranks on this host, where the launcher sets it
    sequence_parallel: int = 1  # ranks that share each sequence; they are neighbours

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """The number of data-parallel ranks: ranks, or groups that share sequences, with samples of their own."""
        return self.size // self.sequence_parallel

    @property
    def data_rank(self) -> int:
        """The data-parallel rank, which is the same in a group that shares sequences."""
        return self.rank // self.sequence_parallel

    @property
    def sequence_rank(self) -> int:
        """This rank's place in the group that shares sequences."""
        return self.rank % self.sequence_parallel

    def own_tokens(self, sequence_length: int) -> slice:
        """The part of each sequence that this rank computes."""
        share = sequence_length // self.sequence_parallel
        return slice(self.sequence_rank * share, (self.sequence_rank + 1) * share)

    @property
    def is_on_one_host(self) -> bool:
        """Whether all ranks are on this host for certain: by their number, or because no other could reach rank 0."""
        return self.local_size == self.size or os.environ["MASTER_ADDR"] in _LOOPBACK


def read_world() -> DistributedInfo:
    """Rank, local rank and world size, alone without a launcher; sets the variables that torch and DeepSpeed read.

    Raises `ConfigError` where a launcher started several ranks and the host of rank 0 is not known, and where this
    host's GPUs cannot be used as they are.
    """
    rank, local_rank, size = _ranks()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(size)}
    if size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    else:
        os.environ.setdefault("MASTER_ADDR", _first_slurm_host())
        os.environ.setdefault("MASTER_PORT", _DEFAULT_PORT)
    if not os.environ["MASTER_ADDR"]:
        raise ConfigError(
            "MASTER_ADDR is not set; expected the host of rank 0, which mpirun hands on with -x MASTER_ADDR"
        )
    local_size = _local_size(size)
    return DistributedInfo(rank, local_rank, size, _choose_device(local_rank, local_size), local_size)


def _choose_device(local_rank: int, local_size: int | None) -> torch.device:
    """This rank's GPU, made the current one, or the CPU."""
    if VISIBLE_HERE_VARIABLE in os.environ:
        os.environ[VISIBLE] = os.environ[VISIBLE_HERE_VARIABLE]
    gpus = detect_gpus()
    if device_type_of(gpus) == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", device_index(gpus, local_rank, local_size))
    torch.cuda.set_device(device)  # before CUDA is asked, which would open the first device in every rank
    reject_unsupported_devices(gpus, [device.index])
    os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed chooses its device
    return device


def _local_size(size: int) -> int | None:
    if size == 1:
        return 1
    found = next((os.environ[name] for name in _LOCAL_SIZES if name in os.environ), None)
    if found is None and os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        return size
    return None if found is None else int(found)


def _ranks() -> tuple[int, int, int]:
    for names in _LAUNCHERS.values():
        if all(name in os.environ for name in names):
            rank, local_rank, size = (int(os.environ[name]) for name in names)
            return rank, local_rank, size
    return 0, 0, 1


def _first_slurm_host() -> str:
    """The host of rank 0 in lists such as `node[03-07,9]-ib,login1`."""
    names = os.environ.get("SLURM_STEP_NODELIST", "")
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", names)
    return "".join(part or "" for part in match.groups()) if match else ""


def choose_interface(world: DistributedInfo) -> str | None:
    """Let gloo use the network interface that leads to the other ranks, unless the user has chosen; returns its name.

    Left to itself it takes the one that this host's own name resolves to. NCCL is left alone: it finds all interfaces,
    uses several, and never takes the loopback for another host.
    """
    if world.size == 1:
        return None
    interface = interface_towards(os.environ["MASTER_ADDR"], may_be_loopback=world.is_on_one_host)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return interface


def wait_for_turn(world: DistributedInfo) -> None:
    """Let rank 0 log first, whose exit makes the launcher end the others; a rank that survives has its own error."""
    if not world.is_rank0:
        wait_for_termination(TURN_SECONDS)


def wait_for_termination(seconds: float) -> None:
    """Give the launcher time to end this rank, as it does when a different one has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)
