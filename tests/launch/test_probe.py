"""The checks of doctor on this machine alone, without root and without ssh."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from forked import tinyllama_ds

from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.launch.doctor import Finding, check_hosts
from tinyllama_ds.launch.hostfile import filter_hosts, read_hostfile
from tinyllama_ds.launch.launcher import Placement
from tinyllama_ds.launch.probe import code_digest, data_digest, nccl_packages


def test_this_machine_alone_passes(tmp_path: Path) -> None:
    finished = tinyllama_ds("doctor", "--quick", "--json", "--run-dir", tmp_path / "run")
    result = json.loads(finished.stdout)
    assert finished.returncode == 0, result
    assert {finding["host"] for finding in result["findings"]} == {"this machine"}
    assert result["hosts"]["this machine"]["code"] == code_digest()


def test_a_missing_data_directory_fails(tmp_path: Path) -> None:
    finished = tinyllama_ds("doctor", "--quick", "--data", tmp_path / "nothing")
    assert finished.returncode == EXIT_CONFIG
    lines = [line.split(maxsplit=2) for line in finished.stdout.splitlines()]
    assert ["FAIL", "data", f"this machine: {tmp_path / 'nothing'} is missing"] in lines


def test_the_digest_covers_every_manifest_and_size(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"shard{suffix}").write_text("{}")
    digests = [data_digest(tmp_path)]
    (tmp_path / "shard.bin").write_text("{} ")
    digests.append(data_digest(tmp_path))
    (tmp_path / "shard.json").write_text("[]")
    digests.append(data_digest(tmp_path))
    assert len({digest["digest"] for digest in digests}) == 3
    (tmp_path / "shard.idx").unlink()
    assert "or its .idx is missing" in data_digest(tmp_path)["error"]


def put_gpus(directory: Path, *used_mib: int) -> None:
    """A program in place of nvidia-smi."""
    lines = "".join(f"NVIDIA A100-SXM4-40GB, 40960, {used}, 550.54, 8.0\n" for used in used_mib)
    (directory / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{lines}END\n")
    (directory / "nvidia-smi").chmod(0o755)


def gpus_of(placement: Placement) -> Finding:
    return next(finding for finding in check_hosts(placement, None, None).findings if finding.check == "GPUs")


def test_a_busy_gpu_can_be_excluded_by_the_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpus(tmp_path, 9000, 0, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("localhost slots=3\n")
    hosts = read_hostfile(tmp_path / "hosts")
    placement = Placement(tmp_path / "hosts", hosts, 0, on_cpu=False)
    found = gpus_of(placement)
    assert (found.passed, found.found) == (False, "GPU 0 already holds 9000 MiB")
    assert found.hint.endswith("--exclude localhost:0")
    assert gpus_of(replace(placement, hosts=filter_hosts(hosts, None, "localhost:0"))).passed
    others = gpus_of(replace(placement, hosts=filter_hosts(hosts, "localhost:0,2", None)))
    assert others.found == "GPU 0 already holds 9000 MiB"
    assert others.hint.endswith("or exclude that GPU with --include localhost:2 alone")
    assert gpus_of(replace(placement, hosts=filter_hosts(hosts, "localhost:2", None))).passed
    alone = gpus_of(replace(placement, hosts=filter_hosts(hosts, "localhost:0", None)))
    assert alone.hint == "end the processes that use it"
    by_slurm = gpus_of(replace(placement, hosts=hosts, launcher="slurm"))
    assert by_slurm.hint == "end the processes that use it", "Slurm cannot select some of a host's GPUs"


def test_without_a_hostfile_the_visible_gpus_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpus(tmp_path, 9000, 0, 0)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert gpus_of(Placement(None, [], 2, on_cpu=False)).passed
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert gpus_of(Placement(None, [], 2, on_cpu=False)).found == "GPU 0 already holds 9000 MiB"


@pytest.mark.parametrize(
    ("requirement", "package"),
    [
        ('nvidia-nccl-cu12==2.27.5; platform_system == "Linux" and platform_machine == "x86_64"', ["nvidia-nccl-cu12"]),
        ('nvidia-nccl-cu13==2.28.9; platform_system == "Linux"', ["nvidia-nccl-cu13"]),
        ("filelock", []),
    ],
)
def test_nccl_is_the_package_that_torch_requires(requirement: str, package: list[str]) -> None:
    assert nccl_packages(["jinja2", requirement, "nvidia-cublas==13.1.0.3"]) == package
