"""The hosts of one run: checked before each start, waited for or excluded when they are lost."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from tinyllama_ds.distributed.network import free_port
from tinyllama_ds.distributed.ssh import ssh_command
from tinyllama_ds.errors import ConfigError, log
from tinyllama_ds.files import SECRETS_FILE, remove
from tinyllama_ds.launch.doctor import DoctorReport, check_hosts, table
from tinyllama_ds.launch.environment import forward_secrets, named_secrets
from tinyllama_ds.launch.hostfile import Host, write_filter
from tinyllama_ds.launch.launcher import Placement, start_launcher
from tinyllama_ds.launch.supervisor import Job

_WAIT_SECONDS = 600  # for a host to come back
_KILL_SECONDS = 15


@dataclass
class Fleet:
    """Starts the launcher on the hosts that are ready."""

    placement: Placement
    arguments: list[str]  # of the ranks
    data: Path
    run_dir: Path
    check_first: bool  # run the doctor before the first start, too
    allow_shrink: bool  # continue without lost hosts
    check: Callable[[Placement], object]  # raises `ConfigError` for hosts that the run cannot use
    _is_first: bool = field(default=True, init=False)
    _waiting_since: float | None = field(default=None, init=False)

    def start(self, variables: dict[str, str], directory: Path) -> Job | None:
        """Start the launcher; None while hosts are missing. Raises `ConfigError` when they are given up.

        Without ssh, and through Slurm, the hosts are not checked.
        """
        placement = self.placement
        first: dict = {}  # report of the first host
        if placement.is_remote and placement.launcher != "slurm" and (self.check_first or not self._is_first):
            examined = check_hosts(placement, self.data, self.run_dir)
            left = self._choose_hosts(examined)
            if left is None:
                return None
            placement = replace(placement, hosts=left)
            first = examined.reports.get(left[0].name, {})
        placement = replace(placement, master_port=placement.master_port or first.get("free_port") or free_port())
        self._is_first = False
        if placement.spans_hosts:
            via = f", network interface {first['interface']}" if first.get("interface") else ""
            through = f" through {placement.launcher}" if placement.is_remote else ""
            log(
                f"rank 0 on {placement.master_address}, port {placement.master_port}{via};"
                f" {placement.world_size} ranks on {len(placement.hosts)} hosts{through}"
            )
        if placement.is_remote:
            forward_secrets(self.run_dir / SECRETS_FILE, named_secrets(os.environ, placement.forward))
        process = start_launcher(placement, self.arguments, variables, directory)
        return Job(process, placement.host_of_rank, self._kill)

    def remove_secrets(self) -> None:
        """To be called after the last start."""
        remove(self.run_dir / SECRETS_FILE)

    def _kill(self, host: str, group: int) -> None:
        """Kill a process group on a host whose ranks do not end by themselves, such as stopped ones."""
        if not self.placement.is_remote or self.placement.launcher == "slurm":
            return
        command = ssh_command(host, ["sh", "-c", f"kill -9 -{group}"], self.placement.ssh_port)
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=_KILL_SECONDS, check=False)

    def _choose_hosts(self, examined: DoctorReport) -> list[Host] | None:
        """The hosts to start on; None to wait for unhealthy ones."""
        if examined.passed:
            self._waiting_since = None
            return self.placement.hosts
        failed = DoctorReport([finding for finding in examined.findings if not finding.passed])
        log(f"not all hosts are ready:\n{table(failed, sys.stderr.isatty())}")
        left = examined.healthy(self.placement.hosts)
        if self._is_first:
            raise ConfigError(
                "the hosts named above are not ready; fix them, or exclude them by --exclude or --include"
            )
        if self.allow_shrink and left:
            self._check_subset(left)
            return left
        self._waiting_since = self._waiting_since or time.monotonic()
        if time.monotonic() - self._waiting_since > _WAIT_SECONDS:
            raise ConfigError(
                f"the hosts named above were unreachable for {_WAIT_SECONDS} s; restart without them, by --exclude or"
                " --include, or with --allow-shrink"
            )
        return None

    def _check_subset(self, left: list[Host]) -> None:
        names = ", ".join(host.name for host in left)
        try:
            self.check(replace(self.placement, hosts=left))
        except ConfigError as error:
            works = self._largest_valid_subset(left)
            way = f"valid subset: --include {write_filter(works)}" if works else "no subset of them is valid"
            raise ConfigError(f"only {names} are left, and {error}; {way}") from error
        log(f"continuing on {names}")

    def _largest_valid_subset(self, left: list[Host]) -> list[Host] | None:
        for count in range(len(left) - 1, 0, -1):
            with suppress(ConfigError):
                self.check(replace(self.placement, hosts=left[:count]))
                return left[:count]
        return None
