"""The command line and environment of the deepspeed launcher."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from tinyllama_ds.distributed.network import free_port, interface_of
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hardware.devices import VISIBLE, VISIBLE_HERE_VARIABLE, Machine
from tinyllama_ds.launch.environment import check_argument, forwarded, runner_environment, write_private
from tinyllama_ds.launch.hostfile import Host, write_filter

# The modules that run on every rank.
PRETRAIN = "tinyllama_ds.rank.pretrain"
MEASURE = "tinyllama_ds.rank.measure"
SCORE = "tinyllama_ds.rank.score"
PREFER = "tinyllama_ds.rank.prefer"
ALL_REDUCE = "tinyllama_ds.rank.all_reduce"
DEFAULT_PORT = 29500  # torch's own
_ENVIRONMENT_FILE = "deepspeed_env"
_HOSTFILE = "hostfile"
_MPI = ("openmpi", "mpich")  # cannot exclude hosts, so they get a hostfile of our own
BY_COUNT = (*_MPI, "slurm")  # cannot select GPUs by number
LAUNCHERS = ("pdsh", *BY_COUNT)


@dataclass(frozen=True)
class Placement:
    """Where the ranks run: on the hosts of a hostfile, or `num_local` of them here.

    `machine` is the hardware of other hosts (`machines.query_hosts`); None for this machine.
    """

    hostfile: Path | None
    hosts: list[Host]
    num_local: int
    on_cpu: bool
    launcher: str = "pdsh"
    launcher_args: str = ""
    ssh_port: int | None = None
    node_rank: int | None = None  # without ssh: the index of this host
    master: str | None = None  # default: the first host
    master_port: int | None = None  # default: a free one
    forward: tuple[str, ...] = ()  # variables named by the user
    machine: Machine | None = None

    @property
    def world_size(self) -> int:
        return sum(host.ranks for host in self.hosts) if self.hosts else self.num_local

    @property
    def is_remote(self) -> bool:
        """Whether ranks are started on hosts over the network, or by Slurm."""
        is_elsewhere = self.launcher == "slurm" or not self._is_all_here
        return self.hostfile is not None and self.node_rank is None and is_elsewhere

    @property
    def spans_hosts(self) -> bool:
        """Whether some ranks are not children of this machine's launcher."""
        return self.is_remote or len(self.hosts) > 1

    @property
    def _is_all_here(self) -> bool:
        return len(self.hosts) == 1 and is_this_machine(self.hosts[0].name)

    @property
    def master_address(self) -> str:
        """The address of rank 0."""
        if self.master is not None:
            return self.master
        return self.hosts[0].name if self.hosts and not self._is_all_here else "127.0.0.1"

    @property
    def host_of_rank(self) -> list[str]:
        """The host of every rank; ranks are assigned in the order of the hostfile."""
        names = [host.name for host in self.hosts for _ in range(host.ranks)]
        return names or [socket.gethostname()] * self.num_local


def check_placement(placement: Placement, arguments: list[str]) -> None:
    """Raises `ConfigError` for what DeepSpeed's runner gets wrong or only detects on the other hosts."""
    if not placement.is_remote:
        return
    launcher = placement.launcher
    if launcher in BY_COUNT and not all(host.takes_first for host in placement.hosts):
        raise ConfigError(
            f"--include, --exclude: {launcher} cannot choose GPUs by number; name whole hosts, or use pdsh"
        )
    if launcher in ("mpich", "slurm") and len({host.ranks for host in placement.hosts}) > 1:
        counts = ", ".join(f"{host.name} {host.ranks}" for host in placement.hosts)
        raise ConfigError(
            f"{placement.hostfile}: {launcher} needs the same slots on every host, and these have {counts}"
        )
    for argument in arguments:
        check_argument(argument, launcher)
    check_argument(os.getcwd(), launcher)


def check_partition(placement: Placement, partition: int, name: str) -> None:
    """Raises `ConfigError` for groups of ranks that span hosts, where they cost more than they save: hpZ partitions, or
    ranks that share sequences. `name` is the option's.
    """
    ranks = {host.name: host.ranks for host in placement.hosts} or {"this machine": placement.num_local}
    for host, count in ranks.items():
        if count % partition:
            raise ConfigError(
                f"{name} {partition} does not divide the {count} ranks of {host}; expected groups of ranks of one host"
            )


def launcher_command(
    placement: Placement, arguments: list[str], module: str = PRETRAIN, directory: Path | None = None
) -> list[str]:
    """The deepspeed command line that starts a module on every rank.

    `directory` has a hostfile of our own, for launchers that cannot exclude hosts otherwise.
    """
    where = _on_hosts(placement, directory) if placement.hosts else ["--num_gpus", str(placement.num_local)]
    where += ["--master_addr", placement.master_address]
    where += ["--master_port", str(placement.master_port or free_port())]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    return [*launcher, *where, *_program(placement, module), *arguments]


def _program(placement: Placement, module: str) -> list[str]:
    if placement.launcher in ("mpich", "slurm") and placement.is_remote:
        # DeepSpeed 0.19.8 ignores --module for Slurm, and for MPICH also starts its own helper, a file, by `python -m`.
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        return [spec.origin]
    return ["--module", module]


def _on_hosts(placement: Placement, directory: Path | None) -> list[str]:
    ours = placement.launcher in _MPI and placement.is_remote and directory is not None
    where = ["--hostfile", str(directory / _HOSTFILE if ours and directory else placement.hostfile)]
    if not ours:
        where += ["--include", write_filter(placement.hosts)]
    if placement.node_rank is not None:
        return [*where, "--no_ssh", "--node_rank", str(placement.node_rank)]
    where.append("--no_ssh_check")  # doctor has checked it
    if placement.is_remote:
        where += ["--force_multi", "--launcher", placement.launcher]
        where += [f"--launcher_args={_launcher_args(placement)}"] if _launcher_args(placement) else []
    return where


def _launcher_args(placement: Placement) -> str:
    """Ours, then the user's. OpenMPI would bind ranks to cores and reject root; srun would keep other tasks running."""
    ours = []
    if placement.launcher == "slurm":
        ours = ["--kill-on-bad-exit=1", f"--ntasks-per-node={placement.hosts[0].ranks}"]
    if placement.launcher == "openmpi":
        ours = ["--bind-to", "none", "--map-by", "slot", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
        ours += ["--mca", "plm_rsh_args", f"'-p {placement.ssh_port}'"] if placement.ssh_port else []
    return " ".join([*ours, placement.launcher_args]).strip()


def is_this_machine(name: str) -> bool:
    """Whether a host's name or address is this machine's."""
    if name in ("localhost", socket.gethostname()):
        return True
    with suppress(OSError):
        return interface_of(socket.gethostbyname(name)) is not None
    return False


def start_launcher(
    placement: Placement,
    arguments: list[str],
    variables: dict[str, str],
    directory: Path,
    module: str = PRETRAIN,
    output: int | None = None,
) -> subprocess.Popen:
    """Start the launcher in its own session: a SIGTERM to the deepspeed command alone would orphan its ranks.

    `directory` is private to this start and outlives it; it gets the file of forwarded variables.
    """
    environment = launcher_environment(placement) | variables
    if placement.is_remote:
        for name, content in launch_files(placement, environment).items():
            write_private(directory / name, content.encode())
        environment = runner_environment(environment, placement.forward) | _runner_settings(placement, directory)
    command = launcher_command(placement, arguments, module, directory)
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=output, stderr=output)


def launch_files(placement: Placement, environment: Mapping[str, str]) -> dict[str, str]:
    """Name and content of the files that DeepSpeed's runner reads for a multi-host start."""
    variables = _cpu_settings(placement) | forwarded(environment, placement.forward, placement.launcher)
    # DeepSpeed leaves these to mpi4py.
    if placement.launcher in ("openmpi", "slurm"):
        variables["MASTER_PORT"] = str(placement.master_port)
    if placement.launcher == "openmpi":  # Slurm sets it
        variables["MASTER_ADDR"] = placement.master_address
    files = {_ENVIRONMENT_FILE: "".join(f"{name}={value}\n" for name, value in variables.items())}
    if placement.launcher in _MPI:
        files[_HOSTFILE] = "".join(f"{host.name} slots={host.ranks}\n" for host in placement.hosts)
    return files


def _runner_settings(placement: Placement, directory: Path) -> dict[str, str]:
    # Otherwise the runner detects the accelerator of this machine, which may have no GPU.
    variables = {"DS_ENV_FILE": str(directory / _ENVIRONMENT_FILE)}
    variables["DS_ACCELERATOR"] = "cpu" if placement.on_cpu else "cuda"
    if placement.launcher == "pdsh":
        port = ["-p", str(placement.ssh_port)] if placement.ssh_port else []
        ours = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=10", *port]
        variables["PDSH_SSH_ARGS_APPEND"] = " ".join([os.environ.get("PDSH_SSH_ARGS_APPEND", ""), *ours]).strip()
    return variables


def launcher_environment(placement: Placement) -> dict[str, str]:
    """The environment of a launch; for local ranks with defaults for this machine."""
    environment = dict(os.environ)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if placement.is_remote:
        return environment
    if placement.hostfile is None and VISIBLE in environment:
        environment[VISIBLE_HERE_VARIABLE] = environment[VISIBLE]
    return _cpu_settings(placement) | environment


def _cpu_settings(placement: Placement) -> dict[str, str]:
    """Variables of ranks on CPUs: the cores are divided among them."""
    if not placement.on_cpu:
        return {}
    ranks = max((host.ranks for host in placement.hosts), default=placement.num_local)
    cores = placement.machine.cores if placement.machine else len(os.sched_getaffinity(0))
    return {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, cores // max(1, ranks))),  # by default every rank would start a thread per core
        # glibc returns every large tensor to the kernel and faults its pages in again: 5 % of a step.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
    }


def describe_launch(placement: Placement, arguments: list[str], directory: Path) -> str:
    """The start as a shell script, without secrets."""
    lines = [f"# rank 0 on {placement.master_address} listens on port {placement.master_port}"]
    environment = launcher_environment(placement)
    if placement.node_rank is not None:
        lines.append("# on each host, with its environment variables:")
        for rank, host in enumerate(placement.hosts):
            command = launcher_command(replace(placement, node_rank=rank), arguments)
            lines += [f"# {host.name}", f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"]
        return "\n".join(lines)
    runner: dict[str, str] = {}
    if placement.is_remote:
        runner = _runner_settings(placement, directory)
        lines.append(f"mkdir -m 700 {shlex.quote(str(directory))}")
        for name, content in launch_files(placement, environment).items():
            lines += [f"cat >{shlex.quote(str(directory / name))} <<'END'", content.rstrip("\n"), "END"]
    hidden = environment.keys() - runner_environment(environment, placement.forward).keys() if runner else ()
    unset = ["env", *(part for name in sorted(hidden) for part in ("-u", name))] if hidden else []
    settings = [*unset, *(f"{name}={shlex.quote(value)}" for name, value in runner.items())]
    return "\n".join(
        [*lines, " ".join([*settings, shlex.join(launcher_command(placement, arguments, directory=directory))])]
    )
