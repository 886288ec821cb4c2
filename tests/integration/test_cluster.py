"""Runs over several hosts equal the run on one machine: through pdsh, mpirun, torchrun and without ssh.

Hosts are namespaces of this machine with a network and an sshd of their own (`tests/hosts.py`).
The fast part runs by default, all of it with `--hosts`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hosts import Finished, Host, start_hosts, why_not
from launching import pretrain, read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.training.checkpoint import Progress, find_checkpoints, read_manifest

STEPS, SAVE_EVERY = 6, 2
REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
slow = pytest.mark.hosts


@dataclass(frozen=True)
class Setup:
    """A small run under ZeRO-3, and how it ends on one machine with two ranks."""

    recipe: Path
    config: Path
    data: Path
    progress: Progress
    losses: list[float]

    def arguments(self, run_dir: Path, *more: object) -> tuple:
        return (
            *("pretrain", "--recipe", self.recipe, "--deepspeed-config", self.config),
            *("--data", self.data, "--run-dir", run_dir, *more),
        )

    def assert_same_end(self, run_dir: Path) -> None:
        """The hash chain over all samples is the same, the loss to rounding."""
        assert read_manifest(find_checkpoints(run_dir)[-1]).progress == self.progress
        assert read_series(run_dir, "Train/Loss") == pytest.approx(self.losses, rel=1e-5)


@pytest.fixture(scope="module")
def setup(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    root = tmp_path_factory.mktemp("reference")
    recipe = write_recipe(root / "small.toml", STEPS, save_every=SAVE_EVERY)
    config = write_deepspeed_config(root / "ds.json", 3, micro_batch=2)
    finished = pretrain(recipe, config, data_dir, root / "run", 2)
    assert finished.returncode == 0, finished.stderr
    progress = read_manifest(find_checkpoints(root / "run")[-1]).progress
    return Setup(recipe, config, data_dir, progress, read_series(root / "run", "Train/Loss"))


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with start_hosts(2, tmp_path_factory.mktemp("hosts")) as started:
        yield started


def write_hostfile(path: Path, hosts: list[Host], slots: int = 1) -> Path:
    path.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
    return path


def explain(finished: Finished) -> str:
    return f"{finished.stdout}\n{finished.stderr}"


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_two_hosts_equal_one_machine(launcher: str, setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    more = ("--hostfile", hostfile, "--launcher", launcher)
    finished = hosts[0].tinyllama_ds(*setup.arguments(tmp_path / "run", *more))
    assert finished.returncode == 0, explain(finished)
    assert "rank 0 on node1, port" in finished.stderr
    assert "network interface e0" in finished.stderr
    setup.assert_same_end(tmp_path / "run")
    assert [process for host in hosts for process in host.processes()] == []
