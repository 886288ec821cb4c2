"""A real Slurm of one node for a test: munged, slurmctld and slurmd of this machine, ended by their process ids."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from launching import TIMEOUT, wait_until

from tinyllama_ds.distributed.network import free_port

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
    first = free_port()
    ports = (first, next(port for port in iter(free_port, None) if port != first))
    config.write_text(_CONFIG.format(host=host, ports=ports, folder=folder, cores=os.cpu_count()))
    environment = os.environ | {"SLURM_CONF": str(config)}
    try:
        _start_munged(folder)
        for daemon in ("slurmctld", "slurmd"):
            subprocess.run([daemon], env=environment, check=True, capture_output=True, timeout=TIMEOUT)
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
    subprocess.run(["munged", "--force", *arguments], check=True, capture_output=True, timeout=TIMEOUT)


def _wait_until_idle(environment: dict[str, str]) -> None:
    def is_idle() -> bool:
        command = ["sinfo", "-h", "-o", "%T"]
        state = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return state.stdout.strip() == "idle"

    wait_until(is_idle, "Slurm's node does not become idle")


def _end(pid_file: Path) -> None:
    with suppress(FileNotFoundError, psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(pid_file.read_text()))
        process.kill()
        process.wait(TIMEOUT)
