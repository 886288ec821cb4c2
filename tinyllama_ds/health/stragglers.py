"""How long each rank's own work takes, and which rank is slower than the others: collectives make all wait for it.

A step takes equally long on all ranks, so steps tell nothing. What is measured is the forward of the decoder blocks,
between the collectives even where ZeRO-3 gathers a block before it, plus the wait for data.
"""

import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tinyllama_ds.distributed.collectives import gather_from_ranks
from tinyllama_ds.distributed.world import DistributedInfo

SLOW = 1.2  # times the median of the other ranks
_IN_A_ROW = 3  # logged steps, so that one save or one hiccup is no news


class StragglerDetector:
    """Measures this rank and compares it with the others at logged steps."""

    def __init__(self, blocks: nn.ModuleList, world: DistributedInfo) -> None:
        self._world = world
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._slow_for = [0] * world.size
        timed = self._timed_on_gpu if world.device.type == "cuda" else self._timed
        if world.size > 1:
            for block in blocks:
                block.forward = timed(block.forward)

    def compare(self, data_seconds: float) -> tuple[dict[str, float], list[str]]:
        """Figures of all ranks since the last call, and a sentence about each that has become slow. Collective."""
        if self._world.size == 1:
            return {}, []
        rows = gather_from_ranks([self._read() + data_seconds, socket.gethostname()])
        seconds = [row[0] for row in rows]
        sentences = []
        for rank, excess in enumerate(slowdown_ratios(seconds)):
            self._slow_for[rank] = self._slow_for[rank] + 1 if excess > SLOW else 0
            if self._slow_for[rank] == _IN_A_ROW:
                sentences.append(
                    f"rank {rank} on {rows[rank][1]} is slow: its own work takes {excess:.1f} times as long as that of"
                    f" the others, for {_IN_A_ROW} logged steps in a row, and all wait for it"
                )
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        figures = {"Min": min(seconds), "Median": statistics.median(seconds), "Max": max(seconds), "Slowest": slowest}
        return {f"Ranks/{name}": float(value) for name, value in figures.items()}, sentences

    def _read(self) -> float:
        if self._events:
            self._events[-1][-1].synchronize()  # and with it all before
        for start, end in self._events:
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = forward(*arguments, **named)
            self._seconds += time.perf_counter() - started
            return result

        return timed

    def _timed_on_gpu(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = forward(*arguments, **named)
            end.record()
            self._events.append((start, end))
            return result

        return timed


def slowdown_ratios(seconds: list[float]) -> list[float]:
    """Each rank's time over the median of the others; at least two ranks."""
    return [
        own / max(statistics.median(seconds[:rank] + seconds[rank + 1 :]), 1e-9) for rank, own in enumerate(seconds)
    ]
