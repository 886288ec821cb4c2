"""Straggler detection: the time that each rank computes, without the time that it waits for the others.

Collectives make a step equally long on all ranks. So what is measured is the forward of the decoder blocks, between the
collectives with which ZeRO-3 gathers and releases a block, plus the wait for data.
"""

import socket
import statistics
import time
from collections.abc import Iterable

import torch
from torch import nn

from tinyllama_ds.distributed.collectives import gather_from_ranks
from tinyllama_ds.distributed.world import DistributedInfo

SLOW = 1.2  # times the median of the other ranks
_IN_A_ROW = 3  # logged steps, so that a single delay is not reported


class StragglerDetector:
    """Measures this rank and compares it with the others at logged steps."""

    def __init__(self, blocks: Iterable[nn.Module], world: DistributedInfo) -> None:
        """`blocks` are the engine's: DeepSpeed's hooks, which gather and release weights, are not measured."""
        self._world = world
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._slow_for = [0] * world.size
        self._on_gpu = world.device.type == "cuda"
        if world.size > 1:
            for block in blocks:
                block.register_forward_pre_hook(self._begin)
                block.register_forward_hook(self._end, prepend=True)

    def compare(self, data_seconds: float) -> tuple[dict[str, float], list[str]]:
        """Metrics of all ranks since the last call, and a line about each new straggler. Collective."""
        if self._world.size == 1:
            return {}, []
        rows = gather_from_ranks([self._read() + data_seconds, socket.gethostname()])
        seconds = [row[0] for row in rows]
        lines = []
        for rank, ratio in enumerate(slowdown_ratios(seconds)):
            self._slow_for[rank] = self._slow_for[rank] + 1 if ratio > SLOW else 0
            if self._slow_for[rank] == _IN_A_ROW:
                lines.append(
                    f"straggler: rank {rank} ({rows[rank][1]}) is {ratio:.1f}x slower than the median of the other"
                    f" ranks, for {_IN_A_ROW} logged steps in a row"
                )
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        metrics = {"Min": min(seconds), "Median": statistics.median(seconds), "Max": max(seconds), "Slowest": slowest}
        return {f"Ranks/{name}": float(value) for name, value in metrics.items()}, lines

    def _begin(self, *_: object) -> None:
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._events.append((start, end))
        else:
            self._started = time.perf_counter()

    def _end(self, *_: object) -> None:
        if self._on_gpu:
            self._events[-1][-1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def _read(self) -> float:
        if self._events:
            self._events[-1][-1].synchronize()  # and with it all before
        for start, end in self._events:
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def slowdown_ratios(seconds: list[float]) -> list[float]:
    """Each rank's time over the median of the others; at least two ranks."""
    return [
        own / max(statistics.median(seconds[:rank] + seconds[rank + 1 :]), 1e-9) for rank, own in enumerate(seconds)
    ]
