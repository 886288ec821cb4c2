"""The engine's dry start: what DeepSpeed does not accept is refused before a launch, in one sentence."""

import os
import signal
from pathlib import Path

import pytest
from forked import on_ranks

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.train import dry_start
from tinyllama_ds.train.dry_start import check_engine_start

CONFIG = {
    "train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8},
}  # fmt: skip
BOTH = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "fused": True, "foreach": True}}


def check_all() -> None:
    """In a process of its own, because a fork inherits what its parent has imported."""
    check_engine_start(CONFIG, Path("ds.json"), "cpu")
    print("starts")
    muon = {"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "torch_adam": True}}}
    for change in (
        {"optimizer": BOTH},
        muon,
        {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["Blok"]}}},
    ):
        try:
            check_engine_start(CONFIG | change, Path("ds.json"), "cpu")
        except ConfigError as error:
            print(error)
    dry_start._start = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)
    try:
        check_engine_start(CONFIG, Path("ds.json"), "cpu")
    except ConfigError as error:
        print(error)


@pytest.fixture(scope="module")
def said() -> list[str]:
    finished = on_ranks(check_all, ranks=1)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def test_a_config_for_many_ranks_starts_on_one(said: list[str]) -> None:
    assert said[0] == "starts"


def test_deepspeeds_reason_is_one_sentence(said: list[str]) -> None:
    start = "ds.json: DeepSpeed cannot start with this config: "
    assert said[1].startswith(f"{start}RuntimeError: `fused` and `foreach` cannot be `True` together")
    assert said[2].startswith(f"{start}ValueError: Muon and reduce scatter cannot be used together")
    assert said[3].startswith(f"{start}zero_optimization.leaf_module.classes names no module of the model")
    assert len(said) == 5


def test_a_crash_is_told_by_its_signal(said: list[str]) -> None:
    assert said[4].endswith("its process was ended by SIGSEGV")
