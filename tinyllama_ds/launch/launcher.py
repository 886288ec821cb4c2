"""The command line and environment of the deepspeed launcher."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.errors import Refusal
from tinyllama_ds.launch.hostfile import Host

PRETRAIN_SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain.py"
MEASURE_SCRIPT = PRETRAIN_SCRIPT.with_name("measure.py")


@dataclass(frozen=True)
class Placement:
    """Where the ranks run: on the hosts of a hostfile, or `num_local` of them here."""

    hostfile: Path | None
    hosts: list[Host]
    num_local: int
    on_cpu: bool

    @property
    def world_size(self) -> int:
        return sum(host.slots for host in self.hosts) if self.hosts else self.num_local


def launcher_command(placement: Placement, arguments: list[str], script: Path = PRETRAIN_SCRIPT) -> list[str]:
    """The ordinary deepspeed command line that starts a script of ours on every rank."""
    if not script.is_file():
        raise Refusal(f"{script}: is missing; pretrain and bench need the checkout, install with pip install -e")
    if placement.hostfile is not None:
        where = ["--hostfile", str(placement.hostfile), "--master_addr", placement.hosts[0].name]
    else:
        where = ["--num_gpus", str(placement.num_local), "--master_addr", "127.0.0.1"]
    port = ["--master_port", str(free_port())]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--log_level",
        "error",
        *where,
        *port,
        str(script),
        *arguments,
    ]


def free_port() -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_launcher(placement: Placement, arguments: list[str], variables: dict[str, str]) -> subprocess.Popen:
    """Start the launcher in a session of its own: a SIGTERM to the deepspeed command alone would orphan its ranks."""
    return subprocess.Popen(
        launcher_command(placement, arguments), env=launcher_environment(placement) | variables, start_new_session=True
    )


def launcher_environment(placement: Placement) -> dict[str, str]:
    """The environment of a local launch: as many threads per rank as there are cores for it."""
    environment = dict(os.environ)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if placement.on_cpu:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        # Without a limit every rank starts a thread per core.
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, placement.num_local))
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        # glibc gives every large tensor back to the kernel and faults its pages in again: a twentieth of a step.
        environment.setdefault("MALLOC_MMAP_MAX_", "0")
        environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**40))
    return environment
