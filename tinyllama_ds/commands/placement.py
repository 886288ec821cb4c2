"""The arguments that place ranks on machines, and the placement made of them."""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tinyllama_ds.commands.arguments import COUNT, PORT, add_shared
from tinyllama_ds.distributed.network import local_address_towards
from tinyllama_ds.errors import ConfigError, log
from tinyllama_ds.hardware.devices import VISIBLE, detect_gpus, device_type_of, hidden_gpus, reject_unsupported_devices
from tinyllama_ds.launch.hostfile import filter_hosts, is_host, read_hostfile
from tinyllama_ds.launch.launcher import DEFAULT_PORT, LAUNCHERS, Placement, is_this_machine
from tinyllama_ds.launch.lifeline import Lifeline, lifeline_value
from tinyllama_ds.launch.machines import query_hosts
from tinyllama_ds.layout import LIFELINE_KEY_FILE


def add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for this machine, or for a hostfile and how its hosts are reached."""
    add_shared(parser.add_mutually_exclusive_group(), "--hostfile", "--num-gpus")
    hosts = parser.add_argument_group("with a hostfile")
    some = hosts.add_mutually_exclusive_group()
    some.add_argument("--include", metavar="HOSTS", help="only these, as 'node1@node2:0,2' (node2: slots 0 and 2)")
    some.add_argument("--exclude", metavar="HOSTS", help="all but these")
    add = hosts.add_argument
    add("--launcher", choices=LAUNCHERS, default="pdsh", help="how DeepSpeed reaches the hosts")
    add("--launcher-args", default="", metavar="ARGS", help="further arguments of pdsh, mpirun or srun")
    add("--ssh-port", type=PORT, metavar="PORT", help="of sshd on the hosts (default: as ssh is configured)")
    add("--no-ssh", action="store_true", help="start only this host's ranks; every host gets its own command")
    index = "with --no-ssh: the index of this host in the hostfile, from 0"
    add("--node-rank", type=COUNT, metavar="N", help=index)
    add("--master-addr", metavar="HOST", help="host of rank 0 (default: the first host)")
    add("--master-port", type=PORT, metavar="PORT", help="its port (default: a free one)")
    forward = "forward this variable to the ranks; secrets go through a private file"
    add("--forward-env", action="append", default=[], metavar="NAME", help=forward)


def read_placement(options: argparse.Namespace) -> Placement:
    """Where the ranks run; raises `ConfigError` for hosts, slots or GPUs that do not exist.

    The hardware of other hosts is not known yet: `query_machines` adds it.
    """
    if options.hostfile is not None:
        return _on_hosts(options)
    for name in ("include", "exclude", "no_ssh", "node_rank", "ssh_port"):
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')}: requires --hostfile")
    return local_placement(options.num_gpus)


def local_placement(ranks: int | None) -> Placement:
    """Ranks on this machine: the given number, else one per GPU, else two on the CPU."""
    on_cpu, available = _local_devices()
    wanted = available if ranks is None else ranks
    if wanted < 1 or (not on_cpu and wanted > available):
        raise ConfigError(f"--num-gpus {wanted}: this machine has {available}")
    return Placement(None, [], wanted, on_cpu)


def _local_devices() -> tuple[bool, int]:
    """Whether ranks of this machine compute on the CPU, and the default number of ranks."""
    gpus = detect_gpus()
    if device_type_of(gpus) == "cpu":
        return True, min(2, os.cpu_count() or 1)
    reject_unsupported_devices(gpus, range(gpus.count))
    return False, gpus.count


def warn_of_hidden_gpus(placement: Placement) -> None:
    """Warn on stderr if local ranks compute on the CPU because the environment hides the GPUs."""
    sentence = hidden_gpus(detect_gpus()) if placement.on_cpu and not placement.is_remote else None
    if sentence is not None:
        log(sentence)


def query_machines(placement: Placement) -> Placement:
    """The placement with the hardware of its hosts; unchanged if they are this machine."""
    if not placement.is_remote:
        return placement
    known = query_hosts(placement)
    if known is not None:
        return known
    on_cpu, _ = _local_devices()
    kind = "the CPU" if on_cpu else "GPUs"
    log(f"no host reported its hardware; assuming {kind}, as on this machine")
    return replace(placement, on_cpu=on_cpu)


def _on_hosts(options: argparse.Namespace) -> Placement:
    hosts = filter_hosts(read_hostfile(options.hostfile), options.include, options.exclude)
    if options.no_ssh != (options.node_rank is not None):
        raise ConfigError("--no-ssh and --node-rank require each other: host N of the hostfile gets --node-rank N")
    if options.no_ssh and not 0 <= options.node_rank < len(hosts):
        raise ConfigError(f"--node-rank {options.node_rank}: {options.hostfile} has hosts 0 to {len(hosts) - 1}")
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


def _on_this_host(placement: Placement) -> Placement:
    """The placement with the hardware of this machine: the only host, or the one that this command is for."""
    on_cpu, available = _local_devices()
    host = placement.hosts[placement.node_rank or 0]
    last = max(host.devices or range(host.slots))
    if not on_cpu and last >= available and VISIBLE not in os.environ:  # which DeepSpeed ignores in a hostfile
        raise ConfigError(
            f"{placement.hostfile}: {host.name} has no GPU for slot {last}; this machine has {available} GPUs"
        )
    return replace(placement, on_cpu=on_cpu)


def lifeline_opener(placement: Placement, run_dir: Path | None) -> Callable[[Path], Lifeline] | None:
    """How the supervisor opens the lifeline; None if all ranks are local, or another host's supervisor opens it.

    Its key is in the run directory; without one it has no key.
    """
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


def lifeline_to_first(placement: Placement) -> str:
    """Without ssh: the lifeline of the first host's supervisor, which may start minutes later than this one."""
    return lifeline_value(placement.master_address, _lifeline_port(placement), patience=600)


def _lifeline_port(placement: Placement) -> int:
    assert placement.master_port is not None
    return placement.master_port + 1
