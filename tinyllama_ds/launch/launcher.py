"""Starting the deepspeed launcher, and ending it with everything it started."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.errors import EXIT_FINISHED, Refusal
from tinyllama_ds.launch.hostfile import Host

PRETRAIN_SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain.py"
MEASURE_SCRIPT = PRETRAIN_SCRIPT.with_name("measure.py")
_STOP_SECONDS = 35  # the deepspeed launcher gives its ranks 30 s


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


def launch(placement: Placement, arguments: list[str], status_file: Path) -> int:
    """Run the launcher to its end; returns the exit code.

    The launcher gets a process group of its own and is signalled as a group: a SIGTERM to the deepspeed command alone
    would orphan its ranks. Success is what `status_file` says, because the launcher exits 0 when it dies by a signal.
    """
    status_file.unlink(missing_ok=True)
    process = subprocess.Popen(
        launcher_command(placement, arguments), env=launcher_environment(placement), start_new_session=True
    )
    previous = {number: signal.signal(number, _forward_to(process)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end_group(process)
    if code == EXIT_FINISHED and not _is_finished(status_file):
        return 1
    return code if code >= 0 else 128 - code


def _forward_to(process: subprocess.Popen) -> Callable[[int, object], None]:
    def forward(number: int, _frame: object) -> None:
        os.killpg(process.pid, number)

    return forward


def _end_group(process: subprocess.Popen) -> None:
    """Nothing of the group outlives it."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_STOP_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        return


def _is_finished(status_file: Path) -> bool:
    try:
        return json.loads(status_file.read_text())["state"] == "finished"
    except (OSError, ValueError, KeyError):
        return False


def launcher_environment(placement: Placement) -> dict[str, str]:
    """The environment of a local launch: as many threads per rank as there are cores for it."""
    environment = dict(os.environ)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if placement.on_cpu:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        # Without a limit every rank starts a thread per core.
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, placement.num_local))
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment
