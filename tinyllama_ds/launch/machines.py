"""The hardware of the hosts that ranks will run on, queried there, as this machine may differ."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hardware.devices import Machine, common_machine, machine_of
from tinyllama_ds.launch.doctor import ANSWER_SECONDS, close_all, open_probe, query_all
from tinyllama_ds.launch.environment import named_variables
from tinyllama_ds.launch.launcher import Placement

_QUESTION = {"ask": "machine"}


def query_hosts(placement: Placement) -> Placement | None:
    """The placement with the hardware of its hosts; None if no host answers.

    Hosts are queried by the way ranks will be started: srun or ssh. Missing answers are left to the doctor.
    Raises `ConfigError` if some hosts have GPUs and others have none.
    """
    reports = _query_by_srun(placement) if placement.launcher == "slurm" else _query_by_ssh(placement)
    if not reports:
        return None
    if named_variables(os.environ, placement.forward).get("DS_ACCELERATOR") == "cpu":
        reports = {host: report | {"gpus": []} for host, report in reports.items()}
    try:
        machine = common_machine({host: machine_of(report) for host, report in reports.items()})
    except ConfigError as error:
        raise ConfigError(f"{placement.hostfile}: {error}") from error
    return replace(placement, on_cpu=machine.device_type == "cpu", machine=machine)


def common_machine_of(placement: Placement, reports: dict[str, dict]) -> Machine:
    """The common hardware of the hosts of a placement, by the doctor's reports."""
    return common_machine({host.name: machine_of(reports[host.name]) for host in placement.hosts})


def _query_by_ssh(placement: Placement) -> dict[str, dict]:
    clients = [open_probe(host, placement) for host in placement.hosts]
    try:
        answers = query_all(clients, [_QUESTION] * len(clients))
    finally:
        close_all(clients)
    return {client.name: answer for client, answer in zip(clients, answers, strict=True) if isinstance(answer, dict)}


def _query_by_srun(placement: Placement) -> dict[str, dict]:
    """One task per host; srun sends the question to all of them."""
    count = str(len(placement.hosts))
    where = ["--nodes", count, "--ntasks", count, "--nodelist", ",".join(host.name for host in placement.hosts)]
    command = ["srun", *shlex.split(placement.launcher_args), *where, sys.executable]
    command += ["-m", "tinyllama_ds.launch.probe"]
    question = json.dumps(_QUESTION) + "\n"
    try:
        done = subprocess.run(
            command, input=question, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        return {}
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {report["host"]: report for report in reports}
