"""Where ranks of this machine run, on GPUs that stand for those of other machines."""

from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

from tinyllama_ds.commands.placement import add_placement_arguments, read_placement
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch.launcher import Placement


def placement_of(*arguments: object) -> Placement:
    parser = ArgumentParser()
    add_placement_arguments(parser)
    return read_placement(parser.parse_args(list(map(str, arguments))))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """PyTorch as it answers on a machine with two V100s, and a build for them."""
    answers: dict[str, object] = {
        "is_available": True,
        "device_count": 2,
        "get_device_name": "Tesla V100-SXM2-16GB",
        "get_device_capability": (7, 0),
        "get_arch_list": ["sm_70", "sm_80"],
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    return monkeypatch


def test_as_many_ranks_as_gpus(two_gpus: pytest.MonkeyPatch) -> None:
    placement = placement_of()
    assert (placement.on_cpu, placement.world_size) == (False, 2)
    assert placement_of("--num-gpus", 1).world_size == 1
    with pytest.raises(ConfigError, match="--num-gpus 3: this machine has 2"):
        placement_of("--num-gpus", 3)


def test_gpus_without_kernels_are_rejected_before_the_start(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    with pytest.raises(ConfigError, match="Tesla V100-SXM2-16GB has compute capability 7.0, and torch"):
        placement_of()


def test_slots_without_a_gpu_are_rejected(two_gpus: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=4\n")
    with pytest.raises(ConfigError, match="hosts: localhost has no GPU for slot 3; this machine has 2 GPUs"):
        placement_of("--hostfile", tmp_path / "hosts")
    assert not placement_of("--hostfile", tmp_path / "hosts", "--include", "localhost:1").on_cpu


def test_the_cpu_can_be_chosen(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setenv("DS_ACCELERATOR", "cpu")
    assert placement_of("--num-gpus", 4).on_cpu
