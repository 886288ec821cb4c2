"""The launcher's command line, and that nothing it started outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import write_deepspeed_config, write_recipe

from tinyllama_ds.launch.hostfile import Host
from tinyllama_ds.launch.launcher import Placement, launch, launcher_command


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


def test_a_launch_that_did_not_finish_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deepspeed launcher exits 0 when it dies by a signal; what counts is what rank 0 wrote."""
    monkeypatch.setattr("tinyllama_ds.launch.launcher.launcher_command", lambda *_: [sys.executable, "-c", ""])
    assert launch(Placement(None, [], 1, on_cpu=True), [], tmp_path / "status.json") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_process_of_the_run(number: int, data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "long.toml", 100_000, save_every=100_000)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4)
    arguments = ["--recipe", recipe, "--deepspeed-config", config, "--data", data_dir, "--run-dir", tmp_path / "run"]
    command = [sys.executable, "-m", "tinyllama_ds.cli", "pretrain", *map(str, arguments), "--num-gpus", "2"]
    supervisor = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), 60)
    family = psutil.Process(supervisor.pid).children(recursive=True)
    os.kill(supervisor.pid, number)
    code = supervisor.wait(60)
    assert started
    assert len(family) >= 4, "runner, launcher and two ranks"
    assert code != 0
    assert not psutil.wait_procs(family, timeout=5)[1]


def wait_for(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False
