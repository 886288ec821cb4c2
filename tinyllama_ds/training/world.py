"""This process among all others, as whatever launcher started it says: deepspeed, torchrun, mpirun or srun."""

import os
import re
import signal
import time
from dataclasses import dataclass

import torch

from tinyllama_ds.errors import Refusal
from tinyllama_ds.network import interface_of, local_address_towards

# Variables for rank, local rank and number of ranks; the first launcher of which all are set has started this process.
_LAUNCHERS = {
    "deepspeed, torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "OpenMPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    # Set for the tasks of srun alone; SLURM_NTASKS is there in the batch script too, which is no rank.
    "Slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
}
_DEFAULT_PORT = "29500"
_TURN_SECONDS = 30  # by which rank 0 may be later than the others


@dataclass(frozen=True)
class World:
    """This process among all others."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_world() -> World:
    """Rank, local rank and world size, alone without a launcher; sets the variables that torch and DeepSpeed read.

    Raises `Refusal` where a launcher started several ranks and nothing says where rank 0 is.
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
        raise Refusal("MASTER_ADDR is not set; expected the host of rank 0, which mpirun hands on with -x MASTER_ADDR")
    if torch.cuda.is_available():
        return World(rank, local_rank, size, torch.device("cuda", local_rank))
    return World(rank, local_rank, size, torch.device("cpu"))


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


def choose_interface(world: World) -> str | None:
    """Let gloo and NCCL use the network interface that leads to rank 0, unless the user has chosen; returns its name.

    Left to themselves they take the first that is up, or the one that this host's own name resolves to.
    """
    if world.size == 1:
        return None
    interface = interface_of(local_address_towards(os.environ["MASTER_ADDR"]))
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
    return interface


def wait_for_turn(world: World) -> None:
    """Let rank 0 speak first, whose end makes the launcher end the others; one that lives on has a thing of its own."""
    if not world.is_main:
        wait_for_the_end(_TURN_SECONDS)


def wait_for_the_end(seconds: float) -> None:
    """Leave the launcher time to end this rank, which it does when another one has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)
