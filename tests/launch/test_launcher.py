"""The launcher's command line."""

from pathlib import Path

from tinyllama_ds.launch.hostfile import Host
from tinyllama_ds.launch.launcher import Placement, launcher_command


def test_local_command() -> None:
    command = launcher_command(Placement(None, [], 2, on_cpu=True), ["--recipe", "demo"])
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_gpus") + 1] == "2"
    assert command[-2:] == ["--recipe", "demo"]


def test_hostfile_command_names_the_first_host_as_master() -> None:
    hosts = [Host("node1", 8), Host("node2", 8)]
    placement = Placement(Path("hostfiles/a100_2x8"), hosts, 0, on_cpu=False)
    command = launcher_command(placement, [])
    assert command[command.index("--hostfile") + 1] == "hostfiles/a100_2x8"
    assert command[command.index("--master_addr") + 1] == "node1"
    assert placement.world_size == 16
