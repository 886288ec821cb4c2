"""Which rank this process is, under every launcher."""

import subprocess
import sys

import pytest

from tinyllama_ds.errors import Refusal
from tinyllama_ds.training.world import read_world

LAUNCHERS = {
    "deepspeed, torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "OpenMPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_STEP_NODELIST",
        *(n for names in LAUNCHERS.values() for n in names),
    ):
        monkeypatch.setenv(name, "")  # so that what read_world sets is taken back, too
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_understood(launcher: str, no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHERS[launcher], ("5", "1", "8"), strict=True):
        no_launcher.setenv(name, value)
    no_launcher.setenv("MASTER_ADDR", "node1")
    world = read_world()
    assert (world.rank, world.local_rank, world.size) == (5, 1, 8)


def test_alone_without_a_launcher_and_in_a_batch_script(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("SLURM_PROCID", "0")
    no_launcher.setenv("SLURM_NTASKS", "16")
    assert read_world().size == 1


@pytest.mark.parametrize(
    ("names", "first"),
    [("node1", "node1"), ("node[03-07,9]", "node03"), ("gpu[2]-ib,login", "gpu2-ib"), ("a7,b[1-2]", "a7")],
)
def test_rank_0_of_slurm_is_on_the_first_host(names: str, first: str, no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHERS["Slurm"], ("1", "0", "2"), strict=True):
        no_launcher.setenv(name, value)
    no_launcher.setenv("SLURM_STEP_NODELIST", names)
    read_world()
    program = "import os; print(os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == f"{first} 29500\n"


def test_several_ranks_and_no_master_are_refused(no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHERS["OpenMPI"], ("1", "0", "2"), strict=True):
        no_launcher.setenv(name, value)
    with pytest.raises(Refusal, match="MASTER_ADDR is not set"):
        read_world()
