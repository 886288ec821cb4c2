"""Broken hosts, each broken for real in its own namespaces: doctor names the host, the check and the fix."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import psutil
import pytest
from hosts import ROOT, Host, start_hosts, why_not
from launching import TIMEOUT

from tinyllama_ds.errors import EXIT_CONFIG

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
STDLIB = Path(os.__file__).parent


@dataclass(frozen=True)
class Cluster:
    """Two hosts with shared data and a shared run directory."""

    hosts: list[Host]
    hostfile: Path
    data: Path
    run_dir: Path

    def doctor(self, *more: object) -> tuple[int, list[dict]]:
        """Exit code and findings of a doctor on node1 that does not measure the network."""
        arguments = ("--hostfile", self.hostfile, "--data", self.data, "--run-dir", self.run_dir)
        finished = self.hosts[0].tinyllama_ds("doctor", "--quick", "--json", *arguments, *more)
        assert finished.stdout, finished.stderr
        result = json.loads(finished.stdout)
        assert result["green"] == (finished.returncode == 0)
        return finished.returncode, result["findings"]

    def replace(self, path: Path, content: str) -> None:
        """Replace a file on node2 alone."""
        other = self.hostfile.with_name(f"other_{path.name}")
        other.write_text(content)
        self.hosts[1].mount("--bind", other, path)


@pytest.fixture
def cluster(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    (tmp_path / "run").mkdir()
    (tmp_path / "data" / "web" / "train").mkdir(parents=True)
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / "data" / "web" / "train" / f"shard{suffix}").write_text("{}")
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    with start_hosts(2, tmp_path_factory.mktemp("hosts")) as hosts:
        yield Cluster(hosts, tmp_path / "hostfile", tmp_path / "data", tmp_path / "run")


def test_healthy_hosts_pass_and_stay_unchanged(cluster: Cluster) -> None:
    code, findings = cluster.doctor()
    assert code == 0, findings
    checks = {finding["check"] for finding in findings if finding["host"] == "node2"}
    assert checks == {"ssh", "python", "packages", "code", "GPUs", "free space", "data", "run directory", "network",
                      "ports", "clock"}  # fmt: skip
    assert psutil.wait_procs(cluster.hosts[1].processes(), timeout=TIMEOUT)[1] == [], "orphans"
    assert list(cluster.run_dir.iterdir()) == []


def test_the_table_for_people(cluster: Cluster) -> None:
    cluster.hosts[1].stop_sshd()
    finished = cluster.hosts[0].tinyllama_ds("doctor", "--quick", "--hostfile", cluster.hostfile)
    assert finished.returncode == EXIT_CONFIG
    lines = [line.split(maxsplit=2) for line in finished.stdout.splitlines()]
    assert ["PASS", "ssh", "node1: answers"] in lines
    assert ["FAIL", "ssh", "node2: ssh: connect to host node2 port 22: Connection refused"] in lines
    assert "fix: make 'ssh node2 true' work without a password" in finished.stdout
    assert "\033" not in finished.stdout


def close_ports(cluster: Cluster) -> None:
    """A firewall that lets ssh through and nothing else."""
    rules = (("10", "sport", "22", "lookup", "main"), ("20", "dport", "1024-65534", "blackhole"))
    for priority, side, port, *action in rules:
        done = cluster.hosts[1].run("ip", "rule", "add", "pref", priority, "ipproto", "tcp", side, port, *action)
        assert done.returncode == 0, done.stderr


def read_only(cluster: Cluster) -> None:
    cluster.hosts[1].mount("--bind", cluster.run_dir, cluster.run_dir)
    cluster.hosts[1].mount("-o", "remount,ro,bind", cluster.run_dir)


def other_version(cluster: Cluster) -> None:
    name = f"deepspeed-{distribution('deepspeed').version}.dist-info"
    metadata = Path(str(distribution("deepspeed").locate_file(name)), "METADATA")
    cluster.replace(metadata, metadata.read_text().replace("Version: 0", "Version: 9", 1))


def other_clock(cluster: Cluster) -> None:
    """There is no clock per namespace, so the Python of this host reads a wrong one."""
    module = STDLIB / "tempfile.py"
    wrong = "import time\nright = time.time\ntime.time = lambda: right() + 100.5\n"  # +100.0 to +100.999 for doctor
    cluster.replace(module, module.read_text() + wrong)


def own_name_is_loopback(cluster: Cluster) -> None:
    cluster.replace(Path("/etc/hosts"), "127.0.0.1 localhost\n127.0.1.1 node1\n10.77.0.2 node2\n")


def one_gpu(cluster: Cluster) -> None:
    cluster.hosts[1].give_gpus(1)
    cluster.hostfile.write_text("node1 slots=1\nnode2 slots=2\n")


SHARD = Path("web", "train")
BROKEN: dict[str, tuple[Callable[[Cluster], object], str, str]] = {
    "no sshd": (lambda c: c.hosts[1].stop_sshd(), "ssh", "Connection refused"),
    "wrong key": (lambda c: c.replace(c.hosts[1].root / "authorized_keys", "nobody\n"), "ssh", "Permission denied"),
    "sshd hangs": (lambda c: c.hosts[1].hang_sshd(), "ssh", "timed out"),
    "host is down": (lambda c: c.hosts[1].crash(), "ssh", "node2"),
    "no such host": (lambda c: c.hostfile.write_text("node1 slots=1\nnode7 slots=1\n"), "ssh", "node7"),
    "no Python": (
        lambda c: c.hosts[1].mount("-t", "tmpfs", "none", Path(sys.executable).parent), "ssh", "No such file"),
    "no checkout": (lambda c: c.hosts[1].mount("-t", "tmpfs", "none", ROOT / "tinyllama_ds"), "ssh", "No module named"),
    "other Python": (
        lambda c: c.replace(STDLIB / "platform.py", "def python_version(): return '3.9.1'\n"), "python", "3.9.1, here"),
    "other package": (other_version, "packages", "deepspeed 9"),
    "other code": (lambda c: c.replace(ROOT / "tinyllama_ds" / "config/run_plan.py", "# changed\n"), "code", "here"),
    "fewer GPUs than slots": (one_gpu, "GPUs", "1 GPUs for 2 slots"),
    "data missing": (lambda c: c.hosts[1].mount("-t", "tmpfs", "none", c.data), "data", "manifests"),
    "data under another path": (
        lambda c: c.hosts[1].mount("-t", "tmpfs", "none", c.data.parent), "data", "is missing"),
    "other manifest": (lambda c: c.replace(c.data / SHARD / "shard.json", "{'a': 1}"), "data", "here"),
    "other tokens": (lambda c: c.replace(c.data / SHARD / "shard.bin", "cut"), "data", "here"),
    "run directory not shared": (
        lambda c: c.hosts[1].mount("-t", "tmpfs", "none", c.run_dir), "run directory", "different directory"),
    "run directory read-only": (read_only, "run directory", "Read-only file system"),
    "no space": (
        lambda c: c.hosts[1].mount("-t", "tmpfs", "-o", "size=9m", "none", c.run_dir), "free space", "0.0 GiB"),
    "closed ports": (close_ports, "ports", "cannot connect"),
    "rank 0 by a loopback name": (own_name_is_loopback, "network", "node1 resolves to 127.0"),
    "wrong clock": (other_clock, "clock", "+100."),
}  # fmt: skip
FAST = ("wrong key", "other package", "run directory read-only", "closed ports")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in FAST else pytest.mark.hosts) for what in BROKEN]
)
def test_a_broken_host_is_named(what: str, cluster: Cluster) -> None:
    break_it, check, found = BROKEN[what]
    break_it(cluster)
    code, findings = cluster.doctor()
    assert code == EXIT_CONFIG
    failed = [finding for finding in findings if not finding["is_green"]]
    hit = [finding for finding in failed if finding["check"] == check and found in finding["found"]]
    assert hit, failed
    expected = "node7" if what == "no such host" else "node2"
    assert {finding["host"] for finding in hit} == {expected}, failed
    assert hit[0]["mend"]


def test_gpus_of_this_machine_may_differ_from_those_of_the_hosts(cluster: Cluster) -> None:
    cluster.hosts[1].give_gpus(2)
    cluster.hostfile.write_text("node2 slots=2\n")
    code, findings = cluster.doctor()
    assert code == 0, findings


def test_rank_0_may_resolve_its_own_name_to_the_loopback(cluster: Cluster) -> None:
    """As Debian's installer writes it: the others resolve its address, and gloo uses the interface that they reach."""
    cluster.hosts[0].name_is_loopback(cluster.hosts[1])
    code, findings = cluster.doctor()
    assert code == 0, findings
    assert "e0; node1 is this host" in {finding["found"] for finding in findings}
