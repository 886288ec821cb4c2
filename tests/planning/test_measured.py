"""The plan next to real ranks: what they hold and send. Whole tables: benchmarks/plan_memory.py and network_plan.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from launching import tinyllama_ds, write_deepspeed_config, write_recipe

import network_plan
import plan_memory
from plan_launching import host_name
from tinyllama_ds.model.config import model_config


def test_two_ranks_hold_the_planned_bytes(tmp_path: Path) -> None:
    plan_memory.main(["--ranks", "2", "--layouts", "zero3", "--json", str(tmp_path / "memory.json")])
    [row] = json.loads((tmp_path / "memory.json").read_text())
    assert row["planned_states"] == pytest.approx(row["measured_states"], rel=0.05)
    assert row["planned_peak"] == pytest.approx(row["measured_peak"], rel=0.10)


@pytest.mark.rehearsal
def test_two_ranks_share_the_activations_of_a_long_sequence(tmp_path: Path) -> None:
    """Small ones are measured less well than the 32,768 tokens of docs/planning.md."""
    plan_memory.main(["--long", "8192", "--json", str(tmp_path / "long.json")])
    alone, shared = json.loads((tmp_path / "long.json").read_text())["rows"]
    assert alone["planned_activations"] == pytest.approx(alone["measured_activations"], rel=0.15)
    assert shared["measured_activations"] == pytest.approx(alone["measured_activations"] / 2, rel=0.15)


def test_speed_can_be_measured_here(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", steps=100, save_every=10)
    config = write_deepspeed_config(tmp_path / "ds.json", 1, micro_batch=2)
    arguments = ("--recipe", recipe, "--deepspeed-config", config, "--num-gpus", 2, "--measure", "--json")
    finished = tinyllama_ds("plan", *arguments)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    (step,) = found["step_seconds"]
    flops = 2 * 2 * 32 * model_config("test").flops_per_token(32)  # accumulation 2, micro batch 2, 32 tokens
    assert 1e6 < flops / step["compute"] < 1e13  # this machine's, not a GPU's 175e12


def why_not_on_namespaces() -> str | None:
    """The reason for which hosts cannot be made here."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "needs Debian's iproute2 (ip, tc)"
    made = subprocess.run(["ip", "netns", "add", host_name(98)], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", host_name(98)], capture_output=True, check=False)
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


@pytest.mark.parametrize("name", ["zero3", pytest.param("zero1", marks=pytest.mark.hosts)])
def test_two_hosts_send_the_bytes_of_the_plan(name: str, tmp_path: Path) -> None:
    """By the counters of their interfaces. How long it takes is measured by the benchmark, on a machine at rest."""
    reason = why_not_on_namespaces()
    if reason:
        pytest.skip(reason)
    network_plan.main(["bytes", "--layouts", name, "--hosts", "2", "--json", str(tmp_path / "bytes.json")])
    [row] = json.loads((tmp_path / "bytes.json").read_text())
    assert row["measured"] == pytest.approx(row["planned"], rel=0.02)
