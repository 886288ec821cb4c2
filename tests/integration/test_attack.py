"""Whoever knows all that `ps` shows, and all files of a run that others can read, kills nothing and ends no run."""

import json
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, start_hosts, why_not
from launching import TIMEOUT, read_series, read_series_so_far, wait_until, write_deepspeed_config, write_recipe
from test_secrets import read_command_lines

from tinyllama_ds.fault_injection import FAULT_VARIABLE
from tinyllama_ds.files import SECRETS_FILE, read_secret
from tinyllama_ds.layout import LIFELINE_VARIABLE

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
STEPS = 6
_WORD = re.compile(rb"[\w.+/-]{6,128}")


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with start_hosts(2, tmp_path_factory.mktemp("hosts")) as started:
        yield started


def test_what_others_can_see_ends_no_run(data_dir: Path, hosts: list[Host], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=3)
    config = write_deepspeed_config(tmp_path / "ds.json", 1, micro_batch=4)
    hostfile, run_dir = tmp_path / "hostfile", tmp_path / "run"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    files = ("--recipe", recipe, "--deepspeed-config", config, "--data", data_dir, "--run-dir", run_dir)
    command = (sys.executable, "-m", "tinyllama_ds.cli", "pretrain", *files, "--hostfile", hostfile)
    bystander = hosts[1].start("setsid", "--wait", "sh", "-c", "echo $$; exec sleep 3600")
    assert bystander.stdout is not None
    group = bystander.stdout.readline().strip()
    canary = f"canary-{secrets.token_hex(8)}"
    variables = {FAULT_VARIABLE: "step.begin:1:2:pause", "WANDB_API_KEY": canary}
    run = hosts[0].start(*command, "--forward-env", "WANDB_API_KEY", **variables)
    seen: set[bytes] = set()

    def has_two_steps() -> bool:
        assert run.poll() is None, run.communicate()
        seen.update(read_command_lines())
        return len(read_series_so_far(run_dir, "Train/Loss")) >= 2

    wait_until(has_two_steps, "two steps")
    ours = [words for words in seen if str(run_dir).encode() in words]  # other tests have runs, too
    (line,) = {found for words in ours for found in re.findall(rf"{LIFELINE_VARIABLE}=([\d.:]+)".encode(), words)}
    assert read_secret(run_dir / SECRETS_FILE) == json.dumps({"WANDB_API_KEY": canary}).encode(), "for the ranks"
    assert [words for words in seen if canary.encode() in words] == []
    address, port, *_ = line.decode().split(":")
    known = [*seen, *(path.read_bytes() for path in run_dir.rglob("*") if others_can_read(path))]
    words = {word.decode() for text in known for word in _WORD.findall(text)}
    assert len(words) > 100
    (tmp_path / "words").write_text("\n".join(sorted(words)))
    program = Path(__file__).with_name("attacker.py")
    attack = hosts[1].run(sys.executable, program, address, port, group, tmp_path / "words")
    output, errors = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 0, errors
    assert "resumed" not in output + errors
    assert len(read_series(run_dir, "Train/Loss")) == STEPS
    found = json.loads(attack.stdout)
    assert found["tried"] >= 100
    assert found["let in"] == 0
    assert bystander.poll() is None, "killed"
    assert [path for path in run_dir.rglob("*") if path.is_file() and canary.encode() in path.read_bytes()] == []
    hosts[1].kill_processes()
    bystander.wait(TIMEOUT)


def others_can_read(path: Path) -> bool:
    return path.is_file() and bool(path.stat().st_mode & 0o044)
