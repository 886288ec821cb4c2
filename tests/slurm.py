"""A real Slurm of one node for a test: munged, slurmctld and slurmd of this machine, ended by their process ids."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What is missing for a Slurm here."""
    if os.geteuid() != 0:
        return "needs root, for munged and slurmd"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs {', '.join(missing)} (Debian's slurm-wlm and munge)" if missing else None


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start it in `folder`; gives the environment in which srun finds it."""
    folder.chmod(0o755)  # munged refuses a socket that it cannot reach
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(host=host, ports=_free_ports(2), folder=folder, cores=os.cpu_count()))
    environment = os.environ | {"SLURM_CONF": str(config)}
    try:
        _start_munged(folder)
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon], env=environment, check=True, capture_output=True, timeout=60)
        _wait_until_idle(environment)
        yield environment
    finally:
        for name in ("slurmd", "slurmctld", "munged"):
            _end(folder / f"{name}.pid")


def _start_munged(folder: Path) -> None:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    options = {"key-file": key, "socket": folder / "munge.socket", "seed-file": folder / "munge.seed"}
    options |= {"pid-file": folder / "munged.pid", "log-file": folder / "munged.log"}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(["munged", "--force", *arguments], check=True, capture_output=True, timeout=60)


def _wait_until_idle(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        state = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
        )
        if state.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    raise TimeoutError(f"Slurm's node did not become idle: {state.stdout}{state.stderr}")


def _end(pid_file: Path) -> None:
    with suppress(FileNotFoundError, psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(pid_file.read_text()))
        process.kill()
        process.wait(10)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports
