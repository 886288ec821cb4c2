"""The launcher's command line, and that a dry run prints all of it."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launching import TIMEOUT

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch.hostfile import Host
from tinyllama_ds.launch.launcher import (
    LAUNCHERS,
    Placement,
    check_partition,
    check_placement,
    describe_launch,
    launcher_command,
    launcher_environment,
    start_launcher,
)

HOSTS = [Host("node1", 8), Host("node2", 8)]
REMOTE = Placement(Path("hostfiles/a100_2x8"), HOSTS, 0, on_cpu=False, master_port=12345)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_local_command() -> None:
    command = launcher_command(Placement(None, [], 2, on_cpu=True), ["--recipe", "demo"])
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert option(command, "--num_gpus") == "2"
    assert command[-2:] == ["--recipe", "demo"]


def test_hostfile_command_names_the_first_host_as_master() -> None:
    command = launcher_command(REMOTE, [])
    assert option(command, "--hostfile") == "hostfiles/a100_2x8"
    assert option(command, "--master_addr") == "node1"
    assert option(command, "--launcher") == "pdsh"
    assert option(command, "--include") == "node1@node2"
    assert REMOTE.world_size == 16
    assert [REMOTE.host_of_rank[rank] for rank in (0, 7, 8)] == ["node1", "node1", "node2"]


def test_a_single_host_that_is_not_this_one_is_reached_over_the_network() -> None:
    """DeepSpeed alone would train here, whatever the host's name."""
    command = launcher_command(Placement(Path("h"), [Host("node1", 8)], 0, on_cpu=False), [])
    assert "--force_multi" in command
    assert "--force_multi" not in launcher_command(Placement(Path("h"), [Host("localhost", 8)], 0, on_cpu=False), [])


def test_without_ssh_every_host_has_its_command() -> None:
    placement = Placement(Path("h"), HOSTS, 0, on_cpu=False, node_rank=1, master_port=12345)
    assert option(launcher_command(placement, []), "--node_rank") == "1"
    text = describe_launch(placement, [], Path("/tmp/x"))
    assert [line for line in text.splitlines() if line.startswith("# node")] == ["# node1", "# node2"]
    assert "--node_rank 0" in text
    assert "--node_rank 1" in text


@pytest.mark.parametrize(
    ("launcher", "hosts", "sentence"),
    [
        ("openmpi", [Host("node1", 8, (1, 2))], "openmpi cannot choose GPUs by number"),
        ("slurm", [Host("node1", 8), Host("node2", 4)], "slurm needs the same slots on every host"),
    ],
)
def test_unsupported_placements_are_rejected(launcher: str, hosts: list[Host], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_placement(Placement(Path("h"), hosts, 0, on_cpu=False, launcher=launcher), [])


def test_a_partition_must_stay_inside_a_host() -> None:
    check_partition(REMOTE, 4, "ds.json: zero_hpz_partition_size")
    uneven = Placement(Path("h"), [Host("node1", 8), Host("node2", 4)], 0, on_cpu=False)
    with pytest.raises(ConfigError, match="zero_hpz_partition_size 8 does not divide the 4 ranks of node2"):
        check_partition(uneven, 8, "ds.json: zero_hpz_partition_size")
    with pytest.raises(ConfigError, match="the 2 ranks of this machine"):
        check_partition(Placement(None, [], 2, on_cpu=True), 8, "--sequence-parallel")


def record_commands(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in place of the launchers that record their arguments."""
    for name in ("pdsh", "mpirun", "ompi_info", "srun", "sinfo"):
        (directory / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$0" "$@" > {directory}/called\n')
        (directory / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return directory / "called"


@pytest.mark.parametrize(
    "launcher", [name if name == "slurm" else pytest.param(name, marks=pytest.mark.hosts) for name in LAUNCHERS]
)
def test_deepspeeds_runner_is_called_with_hosts_and_environment(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What DeepSpeed makes of our arguments and files, up to the program that it would start; and so the dry run."""
    called = record_commands(tmp_path, monkeypatch)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "geheim")
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\nnode3 slots=8\n")
    placement = Placement(tmp_path / "hosts", HOSTS, 0, on_cpu=False, launcher=launcher, master_port=12345)
    process = start_launcher(placement, ["--recipe", "demo"], {"TINYLLAMA_DS_X": "1"}, tmp_path)
    assert process.wait(TIMEOUT) == 0
    words = called.read_text()
    assert "NCCL_DEBUG=WARN" in words
    assert "TINYLLAMA_DS_X=1" in words
    assert "geheim" not in words
    assert "node3" not in words
    assert words.endswith("--recipe\ndemo\n")
    assert "12345" in words
    real = words
    script = describe_launch(placement, ["--recipe", "demo"], tmp_path / "dry")
    assert "geheim" not in script
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    dry = called.read_text().replace("/dry/", "/")
    assert words_of(dry) - words_of(real) == set()
    assert {word.removeprefix("export ") for word in words_of(real) - words_of(dry)} == {"TINYLLAMA_DS_X=1"}
    assert shlex.split(script.splitlines()[-1])[-2:] == ["--recipe", "demo"]
    assert sys.executable in script


def test_slurm_gets_the_file_of_the_module() -> None:
    """DeepSpeed's runner for Slurm ignores `--module`, and srun would look for a file of the module's name."""
    command = launcher_command(replace(REMOTE, launcher="slurm"), ["--recipe", "demo"])
    assert "--module" not in command
    assert Path(command[-3]).is_file()


@pytest.mark.hosts
def test_mpichs_helper_of_deepspeed_starts_our_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would start the helper itself by `python -m` with `--module`: the module is given as a file."""
    called = record_commands(tmp_path, monkeypatch)
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    placement = Placement(tmp_path / "hosts", HOSTS, 0, on_cpu=True, launcher="mpich", master_port=12345)
    assert start_launcher(placement, ["--help"], {}, tmp_path).wait(TIMEOUT) == 0
    words = called.read_text().splitlines()
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("MPI_LOCALRANKID", "0")
    command = words[words.index(sys.executable) :]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert "--deepspeed-config" in done.stdout, done.stderr


def words_of(call: str) -> set[str]:
    return set(re.split(r"\n|; |,", call))


def test_the_gpus_that_this_shell_chose_are_those_of_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's runner drops the selection if the number of ranks is given, and uses the first GPUs."""
    (tmp_path / "say.py").write_text(
        "import os\nfrom tinyllama_ds.distributed.world import read_world\n"
        "print(read_world().rank, os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8932f937,1")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    placement = Placement(None, [], 2, on_cpu=True)
    with (tmp_path / "said").open("w") as said:
        process = start_launcher(placement, [], {"PYTHONPATH": path}, tmp_path, "say", output=said.fileno())
        assert process.wait(TIMEOUT) == 0
    lines = (tmp_path / "said").read_text().splitlines()
    assert {"0 3,GPU-8932f937,1", "1 3,GPU-8932f937,1"} <= set(lines)


def test_ranks_on_this_machine_keep_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    environment = launcher_environment(Placement(None, [], 2, on_cpu=True))
    assert (environment["OMP_NUM_THREADS"], environment["DS_ACCELERATOR"]) == ("7", "cpu")
    assert "DS_ACCELERATOR" not in launcher_environment(Placement(None, [], 2, on_cpu=False))
