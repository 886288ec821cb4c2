"""What lies in the environment stays there, and what a run writes is closed to others: seen on a real run."""

import os
import secrets
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from launching import pretrain_command, write_deepspeed_config, write_recipe

from tinyllama_ds.files import SECRETS_FILE
from tinyllama_ds.launch.environment import forward_secrets
from tinyllama_ds.layout import LIFELINE_VARIABLE
from tinyllama_ds.train.pretrain import read_secrets

NAMES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "NCCL_SECRET", "PYTHON_PASSWORD", "DATABASE_URL")


def test_secrets_in_the_environment_stay_there(data_dir: Path, tmp_path: Path) -> None:
    """Not in the run directory, TensorBoard and checkpoints included, not in the output, not in any command line."""
    canary = f"canary-{secrets.token_hex(8)}"
    recipe = write_recipe(tmp_path / "small.toml", 6, save_every=3)
    sinks = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}}
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=4, **sinks)
    command = pretrain_command(recipe, config, data_dir, tmp_path / "run", 2)
    environment = os.environ | {name: f"{canary}-{name}" for name in NAMES}
    command_lines: set[bytes] = set()
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            command_lines |= set(read_command_lines())
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)  # between two looks: its processors are wanted
    assert process.returncode == 0, (tmp_path / "output").read_text()
    assert sum(b"tinyllama_ds.rank.pretrain" in line for line in command_lines) >= 3, "launcher and ranks were seen"
    assert [line for line in command_lines if canary.encode() in line] == []
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"run.json", "metrics.jsonl", "status.json", "manifest.json", "output"} <= names
    assert any("tfevents" in name for name in names)
    assert any(name.endswith(".csv") for name in names)
    assert [path for path in written if canary.encode() in path.read_bytes()] == []
    assert_closed_to_others(tmp_path / "run")


def test_ranks_of_a_supervisor_on_another_host_take_secrets_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_secrets(tmp_path / SECRETS_FILE, {"WANDB_API_KEY": "x"})
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    read_secrets(tmp_path)
    assert "WANDB_API_KEY" not in os.environ
    monkeypatch.setenv(LIFELINE_VARIABLE, "node1:1:30:120")
    read_secrets(tmp_path)
    assert os.environ["WANDB_API_KEY"] == "x"
    forward_secrets(tmp_path / SECRETS_FILE, {})
    read_secrets(tmp_path)


def assert_closed_to_others(run_dir: Path) -> None:
    """0750 or less for the directory; under it nothing that others can read or the group can write."""
    assert run_dir.stat().st_mode & 0o777 == 0o750
    assert [path for path in run_dir.rglob("*") if path.stat().st_mode & 0o027] == []


def read_command_lines() -> list[bytes]:
    """Of all processes of this machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_bytes())
        except OSError:  # it has ended
            continue
    return found
