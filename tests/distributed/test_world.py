"""The rank of this process under every launcher."""

import os
import subprocess
import sys

import pytest
import torch

from tinyllama_ds.distributed.world import choose_interface, read_world
from tinyllama_ds.errors import ConfigError

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
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "SLURM_STEP_NODELIST",
        *(n for names in LAUNCHERS.values() for n in names),
    ):
        monkeypatch.setenv(name, "")  # so that what read_world sets is taken back, too
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_every_launcher_are_read(launcher: str, no_launcher: pytest.MonkeyPatch) -> None:
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


def test_several_ranks_without_a_master_are_rejected(no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHERS["OpenMPI"], ("1", "0", "2"), strict=True):
        no_launcher.setenv(name, value)
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        read_world()


@pytest.mark.parametrize(
    ("variables", "is_on_one_host"),
    [
        ({"LOCAL_SIZE": "2"}, True),  # deepspeed
        ({"LOCAL_WORLD_SIZE": "1"}, False),  # torchrun on two hosts
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),
        ({"SLURM_STEP_NUM_NODES": "1"}, True),
        ({"SLURM_STEP_NUM_NODES": "2"}, False),
        ({}, False),  # nothing is known, and so nothing risked
        ({"MASTER_ADDR": "127.0.0.1"}, True),
    ],
)
def test_several_hosts_are_expected_unless_all_ranks_are_here(
    variables: dict[str, str], is_on_one_host: bool, no_launcher: pytest.MonkeyPatch
) -> None:
    ranks = dict(zip(LAUNCHERS["deepspeed, torchrun"], ("1", "0", "2"), strict=True))
    for name, value in ({"MASTER_ADDR": "node1"} | ranks | variables).items():
        no_launcher.setenv(name, value)
    assert read_world().is_on_one_host == is_on_one_host


def test_the_loopback_is_for_one_host_and_nccl_is_left_alone(no_launcher: pytest.MonkeyPatch) -> None:
    ranks = dict(zip(LAUNCHERS["deepspeed, torchrun"], ("0", "0", "2"), strict=True))
    for name, value in (ranks | {"MASTER_ADDR": "127.0.0.1", "LOCAL_SIZE": "2"}).items():
        no_launcher.setenv(name, value)
    assert choose_interface(read_world()) == "lo"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_the_users_interface_stays(no_launcher: pytest.MonkeyPatch) -> None:
    ranks = dict(zip(LAUNCHERS["deepspeed, torchrun"], ("0", "0", "2"), strict=True))
    for name, value in (ranks | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"}).items():
        no_launcher.setenv(name, value)
    choose_interface(read_world())
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.fixture
def one_visible_gpu(no_launcher: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """PyTorch as it answers in the fourth task of `srun --gpus-per-task=1` on a host of H100s."""
    answers: dict[str, object] = {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_80", "sm_90"],
    }
    for name, answer in answers.items():
        no_launcher.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    no_launcher.setattr(torch.version, "cuda", "13.0")
    variables = dict(zip(LAUNCHERS["Slurm"], ("3", "3", "8"), strict=True))
    variables |= {"SLURM_STEP_NODELIST": "node1", "SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "3"}
    for name, value in variables.items():
        no_launcher.setenv(name, value)
    return no_launcher


def test_a_rank_that_sees_one_gpu_takes_it(one_visible_gpu: pytest.MonkeyPatch) -> None:
    world = read_world()
    assert (world.local_rank, world.device) == (3, torch.device("cuda", 0))
    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed takes the device of this number"


def test_a_gpu_that_torch_was_not_built_for_is_rejected(one_visible_gpu: pytest.MonkeyPatch) -> None:
    one_visible_gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    with pytest.raises(
        ConfigError, match="NVIDIA H100 80GB HBM3 has compute capability 7.0, and torch .* is built for"
    ):
        read_world()


def test_ranks_that_share_one_gpu_are_rejected(one_visible_gpu: pytest.MonkeyPatch) -> None:
    """All eight see the same device, which nothing has masked."""
    one_visible_gpu.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError, match="8 ranks on this host, and PyTorch sees 1 GPUs"):
        read_world()
