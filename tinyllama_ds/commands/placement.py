"""The arguments that say where ranks run and how they get there, and what pretrain does with them."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import COUNT, PORT, RANKS, hostfile
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch.launcher import LAUNCHERS

if TYPE_CHECKING:
    from tinyllama_ds.launch.launcher import Placement
    from tinyllama_ds.launch.lifeline import Lifeline


def add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    """This machine, or a hostfile and the way to its hosts."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--hostfile", type=hostfile, metavar="H", help="machines, lines of 'host slots=N'; or a shipped one by name"
    )
    where.add_argument("--num-gpus", type=RANKS, metavar="N", help="ranks on this machine (default: its GPUs, else 2)")
    hosts = parser.add_argument_group("with a hostfile")
    some = hosts.add_mutually_exclusive_group()
    some.add_argument("--include", metavar="HOSTS", help="only these, as 'node1@node2:0,2' (node2: slots 0 and 2)")
    some.add_argument("--exclude", metavar="HOSTS", help="all but these")
    hosts.add_argument(
        "--launcher", choices=LAUNCHERS, default="pdsh", help="how DeepSpeed reaches the hosts (default: %(default)s)"
    )
    hosts.add_argument("--launcher-args", default="", metavar="ARGS", help="further arguments of pdsh, mpirun or srun")
    hosts.add_argument(
        "--ssh-port", type=PORT, metavar="PORT", help="of sshd on the hosts (default: as ssh is configured)"
    )
    hosts.add_argument(
        "--no-ssh", action="store_true", help="start this host's ranks only; give each host its own command"
    )
    hosts.add_argument(
        "--node-rank", type=COUNT, metavar="N", help="with --no-ssh: the line of this host, counted from 0"
    )
    hosts.add_argument("--master-addr", metavar="HOST", help="where rank 0 listens (default: the first host)")
    hosts.add_argument("--master-port", type=PORT, metavar="PORT", help="its port (default: a free one)")
    hosts.add_argument(
        "--forward-env",
        action="append",
        default=[],
        metavar="NAME",
        help="hand this variable to the ranks; a secret goes through a file that nobody else can read",
    )


def read_placement(options: argparse.Namespace) -> "Placement":
    """Where the ranks run; raises `ConfigError` for hosts, slots or GPUs that are not there.

    What hosts over the network have is still unknown: `query_machines` asks them.
    """
    if options.hostfile is not None:
        return _on_hosts(options)
    for name in ("include", "exclude", "no_ssh", "node_rank", "ssh_port"):
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')}: is for several hosts; expected --hostfile with it")
    return local_placement(options.num_gpus)


def local_placement(ranks: int | None) -> "Placement":
    """Ranks on this machine: as many as it has GPUs, two without, or the number given."""
    from tinyllama_ds.launch.launcher import Placement

    on_cpu, available = _local_devices()
    wanted = available if ranks is None else ranks
    if wanted < 1 or (not on_cpu and wanted > available):
        raise ConfigError(f"--num-gpus {wanted}: this machine has {available}")
    return Placement(None, [], wanted, on_cpu)


def _local_devices() -> tuple[bool, int]:
    """Whether ranks of this machine compute on the CPU, and how many there are without a wish."""
    from tinyllama_ds.devices import device_type_of, look, reject_unsupported_devices

    seen = look()
    if device_type_of(seen) == "cpu":
        return True, min(2, os.cpu_count() or 1)
    reject_unsupported_devices(seen, range(seen.count))
    return False, seen.count


def warn_of_hidden_gpus(placement: "Placement") -> None:
    """On stderr, where ranks of this machine compute on the CPU because the environment hides its GPUs."""
    from tinyllama_ds.devices import hidden_gpus, look

    sentence = hidden_gpus(look()) if placement.on_cpu and not placement.is_remote else None
    if sentence is not None:
        print(f"tinyllama-ds: {sentence}", file=sys.stderr, flush=True)


def query_machines(placement: "Placement") -> "Placement":
    """The placement with what its hosts have, however this machine is made; unchanged where they are this machine."""
    from tinyllama_ds.launch.machines import query_hosts

    if not placement.is_remote:
        return placement
    known = query_hosts(placement)
    if known is not None:
        return known
    on_cpu, _ = _local_devices()
    kind = "the CPU" if on_cpu else "GPUs"
    print(f"tinyllama-ds: no host says what it has; expecting {kind}, as on this machine", file=sys.stderr, flush=True)
    return replace(placement, on_cpu=on_cpu)


def _on_hosts(options: argparse.Namespace) -> "Placement":
    from tinyllama_ds.launch.hostfile import filter_hosts, is_host, read_hostfile
    from tinyllama_ds.launch.launcher import DEFAULT_PORT, Placement

    hosts = filter_hosts(read_hostfile(options.hostfile), options.include, options.exclude)
    if options.no_ssh != (options.node_rank is not None):
        raise ConfigError("--no-ssh and --node-rank belong together: the command of host N in the hostfile says N")
    if options.no_ssh and not 0 <= options.node_rank < len(hosts):
        raise ConfigError(f"--node-rank {options.node_rank}: {options.hostfile} leaves hosts 0 to {len(hosts) - 1}")
    if options.master_addr is not None and not is_host(options.master_addr):
        raise ConfigError(f"--master-addr {options.master_addr}: is neither a host name nor an IPv4 address")
    placement = Placement(
        hostfile=options.hostfile.absolute(),
        hosts=hosts,
        num_local=0,
        on_cpu=False,
        launcher=options.launcher,
        launcher_args=options.launcher_args,
        ssh_port=options.ssh_port,
        node_rank=options.node_rank,
        master=options.master_addr,
        master_port=options.master_port or (DEFAULT_PORT if options.no_ssh else None),
        forward=tuple(options.forward_env),
    )
    return placement if placement.is_remote else _on_this_host(placement)


def _on_this_host(placement: "Placement") -> "Placement":
    """With what this machine has, which is the only host, or the one whose command this is."""
    from tinyllama_ds.devices import VISIBLE

    on_cpu, available = _local_devices()
    host = placement.hosts[placement.node_rank or 0]
    last = max(host.devices or range(host.slots))
    if not on_cpu and last >= available and VISIBLE not in os.environ:  # DeepSpeed counts slots without regard to it
        raise ConfigError(
            f"{placement.hostfile}: {host.name} has no GPU for slot {last}; this machine has {available} GPUs"
        )
    return replace(placement, on_cpu=on_cpu)


def lifeline_opener(placement: "Placement", run_dir: Path | None) -> "Callable[[Path], Lifeline] | None":
    """How the supervisor opens its line to the ranks, where there are some on other hosts and it is theirs.

    Its key lies in the run directory; without one the line has no key.
    """
    from tinyllama_ds.distributed.network import local_address_towards
    from tinyllama_ds.launch.launcher import is_this_machine
    from tinyllama_ds.launch.lifeline import Lifeline
    from tinyllama_ds.layout import LIFELINE_KEY_FILE

    if not placement.spans_hosts or placement.node_rank:
        return None
    key_file = None if run_dir is None else run_dir / LIFELINE_KEY_FILE
    if placement.node_rank == 0:
        port = _lifeline_port(placement)
        return lambda directory: Lifeline(directory, placement.master_address, port, key_file)
    others = [host.name for host in placement.hosts if not is_this_machine(host.name)]
    address = local_address_towards((others or [placement.hosts[0].name])[0])
    if address is None:
        raise ConfigError(f"{placement.hostfile}: {others[0]} cannot be resolved or reached from this machine")
    return lambda directory: Lifeline(directory, address, key_file=key_file)


def lifeline_to_first(placement: "Placement") -> str:
    """Without ssh: the line of the first host's supervisor, which may start minutes later than this one."""
    from tinyllama_ds.launch.lifeline import lifeline_value

    return lifeline_value(placement.master_address, _lifeline_port(placement), patience=600)


def _lifeline_port(placement: "Placement") -> int:
    assert placement.master_port is not None
    return placement.master_port + 1
