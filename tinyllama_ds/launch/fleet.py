"""The hosts of one run, from start to start: looked at before each, waited for or left out when they are gone."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tinyllama_ds.distributed.network import free_port
from tinyllama_ds.distributed.ssh import ssh_command
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import SECRETS_FILE, remove
from tinyllama_ds.launch.doctor import DoctorReport, check_hosts, table
from tinyllama_ds.launch.environment import forward_secrets, named_secrets
from tinyllama_ds.launch.hostfile import Host, write_filter
from tinyllama_ds.launch.launcher import Placement, start_launcher
from tinyllama_ds.launch.supervisor import Job

_WAIT_SECONDS = 600  # for a host to come back
_KILL_SECONDS = 15


class Fleet:
    """Starts the launcher on the hosts that are ready."""

    def __init__(
        self,
        placement: Placement,
        arguments: list[str],
        data: Path,
        run_dir: Path,
        *,
        check_first: bool,
        allow_shrink: bool,
        check: Callable[[Placement], object],
    ) -> None:
        """`check_first`: ask the doctor before the first start; `check` raises `ConfigError` for hosts that do not
        fit.
        """
        self._placement = placement
        self._arguments = arguments
        self._data, self._run_dir = data, run_dir
        self._look_first, self._may_shrink = check_first, allow_shrink
        self._check = check
        self._is_first = True
        self._waiting_since: float | None = None

    def start(self, variables: dict[str, str], directory: Path) -> Job | None:
        """Start the launcher, or None where hosts are missing that may come back; raises `ConfigError` where they may
        not.

        Without ssh, and through Slurm, the hosts are taken as they are.
        """
        placement = self._placement
        if placement.is_remote and placement.launcher != "slurm" and (self._look_first or not self._is_first):
            examined = check_hosts(placement, self._data, self._run_dir)
            left = self._choose_hosts(examined)
            if left is None:
                return None
            placement = replace(placement, hosts=left)
            port = examined.reports.get(left[0].name, {}).get("free_port")
            interface = examined.reports.get(left[0].name, {}).get("interface")
        else:
            port, interface = None, None
        placement = replace(placement, master_port=placement.master_port or port or free_port())
        self._is_first = False
        if placement.spans_hosts:
            way = f", network interface {interface}" if interface else ""
            _log(f"rank 0 on {placement.master_address}, port {placement.master_port}{way}; {_count(placement)}")
        if placement.is_remote:
            forward_secrets(self._run_dir / SECRETS_FILE, named_secrets(os.environ, placement.forward))
        process = start_launcher(placement, self._arguments, variables, directory)
        here = socket.gethostname()
        hosts = [placement.host_of(rank) if placement.hosts else here for rank in range(placement.world_size)]
        return Job(process, hosts, self._kill)

    def remove_secrets(self) -> None:
        """When no rank is to be started any more."""
        remove(self._run_dir / SECRETS_FILE)

    def _kill(self, host: str, group: int) -> None:
        """For ranks that do not end by themselves, because they are stopped, say."""
        if not self._placement.is_remote or self._placement.launcher == "slurm":
            return
        command = ssh_command(host, ["sh", "-c", f"kill -9 -{group}"], self._placement.ssh_port)
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=_KILL_SECONDS, check=False)

    def _choose_hosts(self, examined: DoctorReport) -> list[Host] | None:
        """The hosts to start on; None to wait for those that are ill."""
        if examined.passed:
            self._waiting_since = None
            return self._placement.hosts
        red = DoctorReport([finding for finding in examined.findings if not finding.passed])
        _log(f"not all hosts are ready:\n{table(red, sys.stderr.isatty())}")
        left = examined.healthy(self._placement.hosts)
        if self._is_first:
            raise ConfigError(
                "the hosts named above are not ready; mend them, or leave them out, by --exclude or of --include"
            )
        if self._may_shrink and left:
            self._check_subset(left)
            return left
        self._waiting_since = self._waiting_since or time.monotonic()
        if time.monotonic() - self._waiting_since > _WAIT_SECONDS:
            raise ConfigError(
                f"the hosts named above have been away for {_WAIT_SECONDS} s; start again without them,"
                " by --exclude or in --include, or with --allow-shrink"
            )
        return None

    def _check_subset(self, left: list[Host]) -> None:
        names = ", ".join(host.name for host in left)
        try:
            self._check(replace(self._placement, hosts=left))
        except ConfigError as error:
            works = self._largest_valid_subset(left)
            way = f"these would do: --include {write_filter(works)}" if works else "no part of them would do either"
            raise ConfigError(f"only {names} are left, and {error}; {way}") from error
        _log(f"going on with {names}")

    def _largest_valid_subset(self, left: list[Host]) -> list[Host] | None:
        for count in range(len(left) - 1, 0, -1):
            try:
                self._check(replace(self._placement, hosts=left[:count]))
            except ConfigError:
                continue
            return left[:count]
        return None


def _count(placement: Placement) -> str:
    through = f" through {placement.launcher}" if placement.is_remote else ""
    return f"{placement.world_size} ranks on {len(placement.hosts)} hosts{through}"


def _log(text: str) -> None:
    print(f"tinyllama-ds: {text}", file=sys.stderr, flush=True)
