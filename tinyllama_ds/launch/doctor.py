"""Preflight checks: is this machine, or every host of a hostfile, ready for a run? Each failed check has a fix."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama_ds.distributed.network import is_loopback, local_address_towards
from tinyllama_ds.distributed.ssh import ssh_command
from tinyllama_ds.hardware.devices import VISIBLE
from tinyllama_ds.launch.hostfile import Host, read_hostfile, write_filter
from tinyllama_ds.launch.launcher import BY_COUNT, Placement, is_this_machine
from tinyllama_ds.launch.probe import listen
from tinyllama_ds.text_table import text_table

ANSWER_SECONDS = 30  # timeout of one answer; all hosts are queried concurrently
_CLOSE_SECONDS = 30  # for all probes to remove their tokens and exit
_STDERR_SECONDS = 2  # to read the error of a failed probe
_CLOCK_SECONDS = 2.0  # tolerated difference
_LEAST_FREE_GIB = 1.0
_BUSY_MIB = 1024  # of GPU memory in use before the run starts
HERE = "this machine"


@dataclass(frozen=True)
class Finding:
    """The result of one check on one host; `hint` is how to fix a failed one."""

    check: str
    host: str
    passed: bool
    found: str
    hint: str = ""


@dataclass
class DoctorReport:
    """All findings, and the reports of the hosts by name."""

    findings: list[Finding] = field(default_factory=list)
    reports: dict[str, dict] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def healthy(self, hosts: Sequence[Host]) -> list[Host]:
        """The hosts without a failed check."""
        unhealthy = {finding.host for finding in self.findings if not finding.passed}
        return [host for host in hosts if host.name not in unhealthy]


class ProbeClient:
    """A probe process on one host over ssh, or on this machine."""

    def __init__(self, name: str, *, is_here: bool, ssh_port: int | None = None) -> None:
        self.name = name
        python = [sys.executable, "-m", "tinyllama_ds.launch.probe"]
        command = python if is_here else ssh_command(name, python, ssh_port)
        self._stderr = os.memfd_create("stderr")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._stderr, bufsize=1, text=True, errors="replace"
        )
        self._thread = ThreadPoolExecutor(1)  # reads the answers, so that waiting for one has a timeout

    def query(self, question: dict) -> dict | str:
        """The answer, or a sentence with the reason why there is none."""
        try:
            line = self._thread.submit(self._ask, json.dumps(question)).result(ANSWER_SECONDS)
            return json.loads(line) if line else self._last_error()
        except TimeoutError:
            return f"no answer in {ANSWER_SECONDS} s"
        except ValueError:
            return f"answered {line[:80]!r} instead of JSON"

    def close(self) -> None:
        """Close the probe's input, at which it removes its token and exits."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has exited
            self._process.stdin.close()

    def end(self, deadline: float) -> None:
        """Wait for the probe to exit; kill it at the deadline."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
        with self._process, self._thread:  # which wait for both and close the pipes
            os.close(self._stderr)

    def _ask(self, question: str) -> str:
        """The line with the answer; empty if the process has exited."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{question}\n")
        return self._process.stdout.readline()

    def _last_error(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STDERR_SECONDS)
        lines = os.pread(self._stderr, 1 << 16, 0).decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "the connection was closed")


def close_all(clients: Sequence[ProbeClient]) -> None:
    """Close all probes concurrently."""
    for client in clients:
        client.close()
    deadline = time.monotonic() + _CLOSE_SECONDS
    for client in clients:
        client.end(deadline)


def check_hosts(placement: Placement, data: Path | None, run_dir: Path | None) -> DoctorReport:
    """Check all hosts of a placement, or this machine if it has none, against this machine."""
    examined = DoctorReport()
    token = f".doctor-{secrets.token_hex(6)}"
    question = {"ask": "report", "data": data and str(data.absolute()), "run_dir": run_dir and str(run_dir.absolute())}
    with ExitStack() as stack:
        here = ProbeClient(HERE, is_here=True)
        clients = [open_probe(host, placement) for host in placement.hosts]
        stack.callback(close_all, [*clients, here])
        answers = query_all(
            [*clients, here], [question | {"token": f"{token}-{n}"} for n in (*range(len(clients)), "here")]
        )
        reference = answers.pop()
        if not isinstance(reference, dict):
            raise RuntimeError(f"the probe failed on this machine: {reference}")
        examined.reports[HERE] = reference
        if not clients or reference["run_dir_error"]:
            examined.findings += _compare(HERE, reference, reference)
        for host, answer in zip(placement.hosts, answers, strict=True):
            examined.findings.append(_ssh(host.name, answer))
            if isinstance(answer, dict):
                examined.reports[host.name] = answer
                examined.findings += _compare(host.name, answer, reference)
        examined.findings += _all_gpus(placement, examined.reports)
        there = [client for client in clients if client.name in examined.reports]
        shared = f"{token}-here" if run_dir and not reference["run_dir_error"] else None
        examined.findings += _check_connections(examined.reports, there, placement, run_dir, shared)
    return examined


def open_probe(host: Host, placement: Placement) -> ProbeClient:
    """A probe on a host, over ssh if the launcher uses it there: pdsh does even for this machine."""
    is_local = (placement.launcher != "pdsh" or not placement.is_remote) and is_this_machine(host.name)
    return ProbeClient(host.name, is_here=is_local, ssh_port=placement.ssh_port)


def query_all(clients: Sequence[ProbeClient], questions: Sequence[dict]) -> list[dict | str]:
    """The answer of each probe to its question, queried concurrently; a sentence in place of a missing one."""
    with ThreadPoolExecutor(max(1, len(clients))) as pool:
        return list(pool.map(ProbeClient.query, clients, questions))


def _check_connections(
    reports: dict[str, dict], clients: list[ProbeClient], placement: Placement, run_dir: Path | None, token: str | None
) -> list[Finding]:
    """Checks between hosts: ports, shared run directory, route to rank 0, clock."""
    shared = run_dir and str(run_dir.absolute())
    port, questions = listen() if clients else 0, []
    for client in clients:
        peers = {other.name: [other.name, reports[other.name]["port"]] for other in clients if other is not client}
        peers[HERE] = [local_address_towards(client.name) or socket.gethostname(), port]
        question = {"ask": "connections", "peers": peers, "master": placement.master_address}
        questions.append(question | {"run_dir": shared, "tokens": [token] if token else []})
    findings, unreached = [], []
    for client, view in zip(clients, query_all(clients, questions), strict=True):
        if not isinstance(view, dict):
            findings.append(_ssh(client.name, view))
            continue
        reports[client.name] |= {"address": view["address"], "interface": view["interface"]}
        findings.append(_interface(client.name, view, placement))
        findings.append(_clock(client))
        if token:
            found = f"{run_dir} is a different directory there" if view["unseen_tokens"] else "shared and writable"
            hint = "mount the same storage at the same path on all hosts"
            findings.append(Finding("run directory", client.name, not view["unseen_tokens"], found, hint))
        unreached += [(client.name, name, error) for name, error in view["unreached"].items()]
    return findings + _ports([client.name for client in clients], unreached)


def _ssh(host: str, answer: dict | str) -> Finding:
    if isinstance(answer, dict):
        return Finding("ssh", host, True, "answers")
    if "No module named" in answer or "No such file" in answer or "not found" in answer:
        return Finding("ssh", host, False, answer, f"install the same package and Python there: {sys.executable}")
    return Finding("ssh", host, False, answer, f"make 'ssh {host} true' work without a password")


def _compare(host: str, report: dict, reference: dict) -> list[Finding]:
    """Compare a host's report with this machine's."""
    hint = "use the same Python on all hosts, ideally one environment on shared storage"
    findings = [_equal("python", host, report["python"], reference["python"], hint)]
    for name in dict.fromkeys((*reference["packages"], *report["packages"])):
        found, wanted = report["packages"].get(name), reference["packages"].get(name)
        if found != wanted:
            there = f"{name} {found or 'is missing'}, here {wanted or 'not installed'}"
            findings.append(Finding("packages", host, False, there, f"install {name}=={wanted} there"))
    if not any(finding.check == "packages" for finding in findings):
        installed = ", ".join(f"{name} {number}" for name, number in report["packages"].items() if number)
        findings.append(Finding("packages", host, True, installed))
    hint = f"install the same version there; its revision is {report['revision']}, here {reference['revision']}"
    findings.append(_equal("code", host, report["code"], reference["code"], hint))
    for path, size in report["free"].items():
        hint = f"free disk space under {path}, for checkpoints or temporary files"
        is_enough = size / 2**30 >= _LEAST_FREE_GIB
        findings.append(Finding("free space", host, is_enough, f"{size / 2**30:.1f} GiB under {path}", hint))
    if report["data"] is not None:
        findings.append(_data(host, report["data"], reference["data"]))
    if report["run_dir_error"]:
        hint = "make it writable for this user, on storage that all hosts share"
        findings.append(Finding("run directory", host, False, report["run_dir_error"], hint))
    return findings


def _equal(check: str, host: str, found: str, wanted: str, hint: str) -> Finding:
    return Finding(check, host, found == wanted, found if found == wanted else f"{found}, here {wanted}", hint)


def _all_gpus(placement: Placement, reports: dict[str, dict]) -> list[Finding]:
    """Compare the GPUs of all hosts with each other: this machine may have none, or different ones."""
    hosts = [host for host in placement.hosts if host.name in reports] if placement.hosts else [_here(placement)]
    gpus = [gpu for host in hosts for gpu in reports[host.name]["gpus"]]
    if placement.on_cpu or not gpus:
        return [_no_gpus(host.name, reports[host.name]) for host in hosts]
    return [_gpus(host, reports[host.name]["gpus"], gpus[0], placement) for host in hosts]


def _here(placement: Placement) -> Host:
    visible = os.environ.get(VISIBLE, "").split(",")[: placement.num_local]
    numbers = tuple(int(entry) for entry in visible if entry.strip().isdecimal())
    return Host(HERE, placement.num_local, numbers if len(numbers) == placement.num_local else None)


def _no_gpus(host: str, report: dict) -> Finding:
    there = f"{len(report['gpus'])}, not used" if report["gpus"] else "none"
    return Finding("GPUs", host, True, f"{there}; {report['cores']} cores")


def _gpus(host: Host, gpus: list[dict], first: dict, placement: Placement) -> Finding:
    chosen = host.devices or range(host.slots)
    if max(chosen) >= len(gpus):
        hint = "set slots in the hostfile to the number of GPUs, or check nvidia-smi there"
        return Finding("GPUs", host.name, False, f"{len(gpus)} GPUs for {host.slots} slots", hint)
    what = f"{len(gpus)} x {gpus[0]['name']}, {int(gpus[0]['mib']) / 1024:.0f} GiB, driver {gpus[0]['driver']}"
    if any((gpu["name"], gpu["driver"]) != (first["name"], first["driver"]) for gpu in gpus):
        hint = "use the same GPUs and driver on all hosts: the slowest GPU determines the speed"
        return Finding("GPUs", host.name, False, f"{what}; different ones on this or another host", hint)
    busy = [number for number in chosen if int(gpus[number]["used_mib"]) > _BUSY_MIB]
    if busy:
        hint = f"end the processes that use it{_hint_without_gpu(host, busy[0], placement)}"
        return Finding("GPUs", host.name, False, f"GPU {busy[0]} already holds {gpus[busy[0]]['used_mib']} MiB", hint)
    return Finding("GPUs", host.name, True, what)


def _hint_without_gpu(host: Host, gpu: int, placement: Placement) -> str:
    """Options that exclude this GPU, compatible with those of the placement; empty if nothing would be left."""
    if host.name == HERE:
        return f", or exclude that GPU by {VISIBLE}"
    others = tuple(number for number in host.devices or range(host.slots) if number != gpu)
    smaller = [Host(host.name, host.slots, others)] if others and placement.launcher not in BY_COUNT else []
    rest = [left for each in placement.hosts for left in (smaller if each is host else [each])]
    if not rest or placement.hostfile is None:
        return ""
    if placement.hosts != read_hostfile(placement.hostfile):  # --include or --exclude is given, and stands alone
        return f", or exclude that GPU with --include {write_filter(rest)} alone"
    return f", or exclude that GPU with --exclude {host.name}{f':{gpu}' if smaller else ''}"


def _data(host: str, found: dict, wanted: dict) -> Finding:
    if "error" in found:
        return Finding("data", host, False, found["error"], "mount the data directory there at the same path")
    if found != wanted:
        hint = "use the same prepared data on all hosts, ideally on shared storage"
        other = wanted.get("digest") or wanted["error"]
        return Finding("data", host, False, f"manifests {found['digest']}, here {other}", hint)
    return Finding("data", host, True, f"{found['manifests']} manifests, {found['digest']}")


def _interface(host: str, view: dict, placement: Placement) -> Finding:
    address, interface, master = view["address"], view["interface"], placement.master_address
    if interface is None:
        hint = f"make {master} resolvable and reachable from {host}: /etc/hosts or DNS, and a route"
        return Finding("network", host, False, f"no route to {master}", hint)
    if is_loopback(address) and host != placement.hosts[0].name:
        hint = f"give {master} its own line with its real address in /etc/hosts of {host}"
        return Finding("network", host, False, f"{master} resolves to {address} there", hint)
    way = f"{interface}; {master} is this host" if is_loopback(address) else f"{interface} ({address}) to {master}"
    return Finding("network", host, True, way)


def _ports(hosts: list[str], unreached: list[tuple[str, str, str]]) -> list[Finding]:
    """Of the pairs that cannot connect, the hosts that explain most of them fail."""
    findings = {}
    while unreached:
        counts = Counter(name for source, target, _ in unreached for name in (source, target) if name != HERE)
        host = max(counts, key=lambda name: (counts[name], sum(target == name for _, target, _ in unreached)))
        source, target, error = next(pair for pair in unreached if host in pair[:2])
        unreached = [pair for pair in unreached if host not in pair[:2]]
        hint = f"open the ports between {source} and {target}, and check the network of {host}"
        findings[host] = Finding("ports", host, False, f"{source} cannot connect to {target}: {error}", hint)
    passed = [Finding("ports", host, True, "reached in both directions") for host in hosts if host not in findings]
    return [*findings.values(), *passed]


def _clock(client: ProbeClient) -> Finding:
    before = time.time()
    answer = client.query({"ask": "clock"})
    after = time.time()
    if not isinstance(answer, dict):
        return _ssh(client.name, answer)
    difference = answer["time"] - (before + after) / 2
    passed = abs(difference) - (after - before) / 2 <= _CLOCK_SECONDS
    hint = "start a time synchronization service there (chrony, systemd-timesyncd)"
    return Finding("clock", client.name, passed, f"{difference:+.3f} s", hint)


def table(report: DoctorReport, in_color: bool) -> str:
    """One line per check where all hosts agree, else one per host; below each failed check its fix."""
    rows: list[tuple[str, ...]] = []
    for check in dict.fromkeys(finding.check for finding in report.findings):
        of_check = [finding for finding in report.findings if finding.check == check]
        by_found: dict[str, list[str]] = {}
        for finding in filter(lambda finding: finding.passed, of_check):
            by_found.setdefault(finding.found, []).append(finding.host)
        rows += [("PASS", check, f"{_join_names(hosts)}: {found}") for found, hosts in by_found.items()]
        for finding in filter(lambda finding: not finding.passed, of_check):
            rows += [("FAIL", check, f"{finding.host}: {finding.found}"), ("", "", f"fix: {finding.hint}")]
    text = text_table(rows, words=range(3))
    for state, color in {"PASS": 32, "FAIL": 31}.items() if in_color else ():
        text = re.sub(f"^{state}", f"\033[{color}m{state}\033[0m", text, flags=re.MULTILINE)
    return text


def _join_names(hosts: list[str]) -> str:
    return ", ".join(hosts) if len(hosts) <= 4 else f"{len(hosts)} hosts"
