"""The parts in order of value, and how the time is shared among them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The seconds that a part asks for."""

    name: str
    module: str
    on_gpu: float  # to be complete on an H100 with 16 cores, as estimated
    rehearsed: float  # the same on two cores of a CPU
    least: float  # below which it measures nothing and is skipped
    has_head_size_64: bool = True  # and no other


PARTS = (
    Share("machine", "gpu_parts.machine", 30, 15, 5),
    Share("lifecycle", "gpu_parts.lifecycle", 160, 90, 20),
    Share("training", "gpu_parts.training", 170, 50, 20),
    Share("peers", "gpu_parts.peers", 170, 50, 20),
    Share("long_context", "gpu_parts.long_context", 240, 25, 60),
    Share("attention", "gpu_parts.attention", 45, 15, 10),
    Share("tests", "gpu_parts.gpu_tests", 180, 45, 20, has_head_size_64=False),
    Share("full_size", "gpu_parts.full_size", 200, 60, 20),
)


def limit(wanted: Sequence[float], left: float) -> float:
    """Seconds of the first of some parts, of those that are left for all.

    Where there is enough for all, the surplus is shared in proportion; else the first ones get what they ask for.
    """
    total = sum(wanted)
    return left * wanted[0] / total if left >= total else min(wanted[0], left)
