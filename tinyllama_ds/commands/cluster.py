"""The command that checks machines before a run."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from tinyllama_ds.commands.arguments import add_shared
from tinyllama_ds.commands.placement import add_placement_arguments, lifeline_opener, read_placement
from tinyllama_ds.distributed.session import end_session, exiting_on_signals
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED
from tinyllama_ds.launch.doctor import HERE, Finding, check_hosts, table
from tinyllama_ds.launch.launcher import ALL_REDUCE, Placement, start_launcher
from tinyllama_ds.launch.lifeline import Lifeline
from tinyllama_ds.launch.machines import common_machine_of
from tinyllama_ds.layout import LIFELINE_VARIABLE

_BANDWIDTH_SECONDS = 180  # including imports on every host


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    add_placement_arguments(parser)
    add_shared(parser, "--data", required=False, help="data directory that all hosts need")
    add_shared(parser, "--run-dir", required=False, help="run directory, shared by all hosts")
    parser.add_argument("--quick", action="store_true", help="without measuring the network")
    add_shared(parser, "--json")


def _doctor(options: argparse.Namespace) -> int:
    """Check whether this machine, or all hosts of a hostfile, are ready for a run; each FAIL has a fix."""
    placement = read_placement(options)
    report = check_hosts(placement, options.data, options.run_dir)
    if report.passed and not options.quick and placement.world_size > 1:
        report.findings.append(_bandwidth(_as_found(placement, report.reports)))
    if options.json:
        # Other programs read these keys: "is_green" and "mend" are what they have been called since the first version.
        findings = [asdict(found) | {"is_green": found.passed, "mend": found.hint} for found in report.findings]
        print(json.dumps({"green": report.passed, "findings": findings, "hosts": report.reports}))
    else:
        print(table(report, sys.stdout.isatty()))
    return EXIT_FINISHED if report.passed else EXIT_CONFIG


def _as_found(placement: Placement, reports: dict[str, dict]) -> Placement:
    """The placement with a port that is free on the first host, and with the hosts' hardware."""
    if not placement.hosts:
        return placement
    port = placement.master_port or reports[placement.hosts[0].name]["free_port"]
    if not placement.is_remote:
        return replace(placement, master_port=port)
    machine = common_machine_of(placement, reports)
    return replace(placement, master_port=port, on_cpu=machine.device_type == "cpu", machine=machine)


def _bandwidth(placement: Placement) -> Finding:
    """Measure an all-reduce over all ranks, started like a run."""
    host = f"{len(placement.hosts)} hosts" if placement.hosts else HERE
    hint = f"start it by hand to see why: the command of pretrain --dry-run, with {ALL_REDUCE}"
    open_lifeline = lifeline_opener(placement, run_dir=None)
    with (
        exiting_on_signals(),
        tempfile.TemporaryDirectory(prefix="tinyllama-ds-") as name,
        tempfile.TemporaryFile("w+") as log,
    ):
        lifeline = open_lifeline(Path(name)) if open_lifeline else None
        variables = {LIFELINE_VARIABLE: lifeline.value} if lifeline else {}
        process = start_launcher(placement, [], variables, Path(name), ALL_REDUCE, output=log.fileno())
        try:
            failed = _wait(process, lifeline)
        finally:
            if lifeline is not None:
                lifeline.close()  # ends the ranks on other hosts
            end_session(process, gently=False)
        if failed is not None:
            return Finding("all-reduce", host, False, failed, hint)
        log.seek(0)
        lines = log.read().splitlines()
    answers = [line.partition("all-reduce: ")[2] for line in lines if "all-reduce: " in line]
    if not answers:
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        return Finding("all-reduce", host, False, f"the job exited with code {process.returncode}: {last}", hint)
    result = json.loads(answers[0])
    rate = result["bytes_per_second"] / 1e9
    return Finding("all-reduce", host, True, f"{rate:.2f} GB/s of bus bandwidth over {result['ranks']} ranks")


def _wait(process: subprocess.Popen, lifeline: Lifeline | None) -> str | None:
    """Wait for the end of the job; a sentence if a rank failed or the time is over."""
    deadline = time.monotonic() + _BANDWIDTH_SECONDS
    while process.poll() is None:
        failed = lifeline.poll() if lifeline is not None else None
        if failed is not None:
            return failed
        if time.monotonic() > deadline:
            return f"not finished within {_BANDWIDTH_SECONDS} s"
        time.sleep(0.2)
    return None


COMMANDS = (("doctor", _add_doctor, _doctor),)
