"""The metrics of `bench` are those of the step, and not of what was measured after it."""

from types import SimpleNamespace

import pytest
import torch

from tinyllama_ds.benchmark import measure
from tinyllama_ds.distributed.world import DistributedInfo


def test_memory_is_read_before_the_matrix_products_take_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU they hold 0.4 GB and more; both functions do what they always do, and note when they were called."""
    called = []
    for name in ("memory_bytes", "measured_together", "peak_flops"):
        whole = getattr(measure, name)
        monkeypatch.setattr(measure, name, lambda *given, name=name, whole=whole: called.append(name) or whole(*given))
    engine = SimpleNamespace(module=torch.nn.Linear(2, 2))
    world = DistributedInfo(0, 0, 1, torch.device("cpu"))
    metrics = measure._metrics(engine, world, 128, 1e6, {"seconds": 1.0})
    assert called[0] == "memory_bytes"
    assert sorted(called) == ["measured_together", "memory_bytes", "peak_flops"]
    assert metrics["peak_gib"] > 0
