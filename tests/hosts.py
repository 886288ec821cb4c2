"""Several hosts on one machine: each has its own network, processes, mounts and name, and an sshd that knows one key.

A host is a process in namespaces of its own (no name of which is ever registered, so that nothing can collide or stay
behind): killing that process is a power failure. The hosts hang on a bridge in one more namespace, the switch. All
share the disk. Inside, `ssh node2` works without options. Needs root.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from launching import TIMEOUT, is_rank, wait_until

ROOT = Path(__file__).parents[1]
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
_PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "pdsh", "mpirun")
_NETWORK = "10.77.0"

Finished = subprocess.CompletedProcess[str]


def why_not() -> str | None:
    """Why this machine cannot play several hosts; None where it can."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None] + ([] if Path(SSHD).is_file() else ["sshd"])
    if missing:
        return f"needs {', '.join(missing)} (apt install iproute2 openssh-server openssh-client pdsh openmpi-bin)"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return None if probe.returncode == 0 else f"needs namespaces: {probe.stderr.decode().strip()}"


@dataclass(frozen=True)
class Host:
    """One host; `init` is the process that keeps it up, seen from outside."""

    name: str
    address: str
    init: int
    root: Path

    def command(self, *command: object) -> list[str]:
        """The command line that runs a command on this host."""
        namespaces = ["--net", "--mount", "--uts", "--pid"]
        return ["nsenter", "--target", str(self.init), *namespaces, f"--wd={ROOT}", "--", *map(str, command)]

    def start(self, *command: object, **environment: str) -> subprocess.Popen:
        """Start a command on this host, with its output captured."""
        return subprocess.Popen(
            self.command(*command),
            env=self._environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def run(self, *command: object, timeout: float = 2 * TIMEOUT, **environment: str) -> Finished:
        """Run a command on this host to its end; on a time-out everything that it started here is killed."""
        process = self.start(*command, **environment)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill_processes()
            output, errors = process.communicate()
            errors += f"\n{command} took more than {timeout} s"
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def tinyllama_ds(self, *arguments: object, timeout: float = 2 * TIMEOUT, **environment: str) -> Finished:
        """Any command of the toolkit, as a user starts it on this host."""
        return self.run(sys.executable, "-m", "tinyllama_ds.cli", *arguments, timeout=timeout, **environment)

    def processes(self) -> list[psutil.Process]:
        """What runs on this host, but its init and the sshd that listens."""
        ours = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for process in psutil.process_iter(["status", "cmdline", "pid"]):
            with suppress(OSError):
                belongs = os.readlink(f"/proc/{process.pid}/ns/pid") == ours and process.pid != self.init
                if belongs and process.info["status"] != psutil.STATUS_ZOMBIE and not _is_keeper(process):
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The training processes of this host."""
        return [process for process in self.processes() if is_rank(process.info["cmdline"] or [])]

    def kill_processes(self) -> None:
        """Kill -9 for all that was started on this host; sshd stays."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def crash(self) -> None:
        """Power failure: all processes are gone at once, and so is the network card."""
        os.kill(self.init, signal.SIGKILL)

    def cut(self) -> None:
        """Pull the network cable."""
        self.run("ip", "link", "set", "e0", "down")

    def hint(self) -> None:
        """Put the cable back."""
        self.run("ip", "link", "set", "e0", "up")

    def sent_bytes(self) -> int:
        """What this host has sent to others since it was started."""
        return int(self.run("cat", "/proc/self/net/dev").stdout.split("e0:")[1].split()[8])

    def mount(self, *arguments: object) -> None:
        """A mount that this host alone sees."""
        finished = self.run("mount", *arguments)
        assert finished.returncode == 0, finished.stderr

    def stop_sshd(self) -> None:
        """Nobody can log in any more."""
        sshd = self._sshd()
        sshd.kill()
        sshd.wait(TIMEOUT)

    def hang_sshd(self) -> None:
        """The port is open and nobody speaks, as on a host whose disk hangs."""
        self._sshd().suspend()

    def _sshd(self) -> psutil.Process:
        mark = f"PidFile={self.root}/{self.name}.pid"
        return next(p for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or []))

    def give_gpus(self, count: int, capability: str = "8.0") -> None:
        """A program in the place of nvidia-smi that lists A100s, for what is decided by that list."""
        directory = self.root / f"{self.name}_bin"
        directory.mkdir()
        lines = f"NVIDIA A100-SXM4-40GB, 40960, 3, 550.54, {capability}\n" * count
        (directory / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{lines}END\n")
        (directory / "nvidia-smi").chmod(0o755)
        for place in ("/usr/local/sbin", "/usr/local/bin"):
            self.mount("--bind", directory, place)

    def name_is_loopback(self, *others: "Host") -> None:
        """The names as Debian's installer writes them: this host's own is the loopback."""
        names = self.root / f"{self.name}_hosts"
        lines = [f"{other.address} {other.name}" for other in others]
        names.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {self.name}", *lines]) + "\n")
        self.mount("--bind", names, "/etc/hosts")

    def _environment(self) -> dict[str, str]:
        """One thread per rank, wherever it runs: all hosts share this machine's cores."""
        return os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ENV_FILE": str(self.root / "deepspeed_env"),
        }


def _is_keeper(process: psutil.Process) -> bool:
    line = " ".join(process.info["cmdline"] or [])
    return line == "sleep 86400" or (SSHD in line and "[listener]" in line)


@contextmanager
def start_hosts(count: int, root: Path) -> Iterator[list[Host]]:
    """`count` hosts `node1`, `node2` ...; all that ran on them ends with the context."""
    root.chmod(0o700)
    _write_ssh_files(root, count)
    keepers = [_keep("--net")]
    try:
        switch = ["nsenter", "--target", str(keepers[0].pid), "--net", "--", "ip"]
        _do([*switch, "link", "add", "switch", "type", "bridge"])
        _do([*switch, "link", "set", "switch", "up"])
        hosts = []
        for number in range(1, count + 1):
            keepers.append(_keep("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"))
            init = _init_of(keepers[-1].pid)
            assert init is not None
            hosts.append(_plug_in(number, init, switch, root))
        yield hosts
    finally:
        for keeper in reversed(keepers):
            os.killpg(keeper.pid, signal.SIGKILL)
            keeper.wait()


def _write_ssh_files(root: Path, count: int) -> None:
    (root / "client").mkdir()
    for name in ("key", "hostkey"):
        _do(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)])
    shutil.copy(root / "key.pub", root / "authorized_keys")
    (root / "client" / "hosts.conf").write_text(
        f"Host *\n  IdentityFile {root}/key\n  User root\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    (root / "deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    names = "".join(f"{_NETWORK}.{number} node{number}\n" for number in range(1, count + 1))
    (root / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    Path("/run/sshd").mkdir(exist_ok=True)


def _keep(*namespaces: str) -> subprocess.Popen:
    """A process that keeps namespaces alive, and reaps what is orphaned in them."""
    forever = "while :; do sleep 86400 & wait $!; done"
    keeper = subprocess.Popen(
        ["unshare", *namespaces, "bash", "-c", forever], start_new_session=True, stdin=subprocess.DEVNULL
    )
    wait_until(lambda: _init_of(keeper.pid) is not None, "no namespaces")
    return keeper


def _init_of(unshare: int) -> int | None:
    """The process in the new namespaces, once it is there: unshare has become bash, or started it."""
    process = psutil.Process(unshare)
    for candidate in (process, *process.children()):
        with suppress(psutil.NoSuchProcess):
            if candidate.cmdline()[:1] == ["bash"]:
                return candidate.pid
    return None


def _plug_in(number: int, init: int, switch: list[str], root: Path) -> Host:
    host = Host(f"node{number}", f"{_NETWORK}.{number}", init, root)
    _do([*switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "e0", "netns", str(init)])
    _do([*switch, "link", "set", f"port{number}", "master", "switch", "up"])
    sshd = [SSHD, "-h", root / "hostkey"]
    options = {"AuthorizedKeysFile": root / "authorized_keys", "PidFile": root / f"{host.name}.pid"}
    options |= {"StrictModes": "no", "UsePAM": "no", "PasswordAuthentication": "no", "PermitRootLogin": "yes"}
    sshd += [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    for command in (
        ("hostname", host.name),
        ("mount", "--bind", root / "hosts", "/etc/hosts"),
        ("mount", "--bind", root / "client", "/etc/ssh/ssh_config.d"),
        ("ip", "addr", "add", f"{host.address}/24", "dev", "e0"),
        ("ip", "link", "set", "e0", "up"),
        ("ip", "link", "set", "lo", "up"),
        sshd,
    ):
        _do(host.command(*command))
    wait_until((root / f"{host.name}.pid").exists, "no sshd")  # sshd is a daemon before it listens
    return host


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
