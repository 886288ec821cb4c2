"""Seconds by phase, the peak of a device, and the share of it that is used."""

import json
import os
import sys
import time

import torch
from forked import on_ranks

from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.train import utilization
from tinyllama_ds.train.engine import start_process_group
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.utilization import peak_flops, utilisation

CPU = torch.device("cpu")


def test_clock_adds_up_phases_and_starts_again() -> None:
    clock, started = PhaseClock(CPU), time.perf_counter()
    for _ in range(3):
        with clock.phase("forward"):
            time.sleep(0.01)
    assert 0.03 <= clock.read()["forward"] <= time.perf_counter() - started
    assert clock.read() == {}


def test_no_share_of_a_peak_is_above_it() -> None:
    assert utilisation(1e12, 2e12) == 0.5
    assert utilisation(2e12, 2e12) == 1
    assert utilisation(2.04e12, 2e12) is None


def print_peak() -> None:
    """On every rank, the second later than the first."""
    rank = int(os.environ["RANK"])
    start_process_group(read_world())
    measured: list[float] = []
    whole = utilization.measured_peak

    def measure(*arguments: object) -> float:
        measured.append(whole(*arguments))
        return measured[-1]

    utilization.measured_peak = measure
    peak, _ = peak_flops(CPU, torch.float32, 2)
    again, _ = peak_flops(CPU, torch.float32, 2)
    row = json.dumps({"rank": rank, "peak": peak, "again": again, "measured": measured})
    os.write(sys.stdout.fileno(), f"{row}\n".encode())  # at once, beside the other rank's
    os._exit(0)  # gloo's threads can abort at the interpreter's end


def test_ranks_measure_once_together_and_keep_the_best() -> None:
    finished = on_ranks(print_peak, ranks=2)
    found = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2, finished.stderr
    best = max(row["measured"][0] for row in found)
    assert [len(row["measured"]) for row in found] == [1, 1]
    assert {row["peak"] for row in found} | {row["again"] for row in found} == {best}


def test_unknown_device_is_measured_and_named() -> None:
    peak, origin = peak_flops(CPU, torch.float32)
    assert 1e9 < peak < 1e14
    assert origin == "a measured float32 matrix product"
