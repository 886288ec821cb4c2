"""A start from a machine that differs from its hosts: their hardware decides."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hosts import Finished, Host, start_hosts, why_not
from launching import write_deepspeed_config, write_recipe

from tinyllama_ds.errors import EXIT_CONFIG

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@dataclass(frozen=True)
class Cluster:
    """A head node and two hosts."""

    head: Host
    hosts: list[Host]
    arguments: tuple

    def dry_run(self, *more: object, **environment: str) -> Finished:
        return self.head.tinyllama_ds(*self.arguments, "--dry-run", *more, **environment)


@pytest.fixture
def cluster(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Iterator[Cluster]:
    recipe = write_recipe(tmp_path / "small.toml", 8, save_every=8)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=1, bf16={"enabled": "auto"})
    (tmp_path / "hostfile").write_text("node2 slots=2\nnode3 slots=2\n")
    arguments = ("pretrain", "--recipe", recipe, "--deepspeed-config", config, "--data", data_dir)
    arguments += ("--run-dir", tmp_path / "run", "--hostfile", tmp_path / "hostfile")
    with start_hosts(3, tmp_path_factory.mktemp("hosts")) as hosts:
        yield Cluster(hosts[0], hosts[1:], arguments)


# What a user's shell on the head node may hold; hosts.py forwards OMP_NUM_THREADS by the user's file.
SHELL = {"DS_ACCELERATOR": "cpu", "KMP_BLOCKTIME": "0", "MALLOC_ARENA_MAX": "1", "DS_ENV_FILE": ".deepspeed_env"}


def test_a_head_node_without_gpus_starts_ranks_on_gpus(cluster: Cluster) -> None:
    for host in cluster.hosts:
        host.give_gpus(2)
    finished = cluster.dry_run(**SHELL, OMP_PLACES="cores")
    assert finished.returncode == 0, finished.stderr
    for foreign in ("DS_ACCELERATOR=cpu", "OMP_", "KMP_BLOCKTIME=", "MALLOC_"):
        assert not [line for line in finished.stdout.splitlines() if line.startswith(foreign)]
    runner = shlex.split(finished.stdout.splitlines()[-1])
    assert "DS_ACCELERATOR=cuda" in runner
    assert "no host reported" not in finished.stderr


def test_a_head_node_without_gpus_accepts_a_kernel_for_gpus(cluster: Cluster) -> None:
    for host in cluster.hosts:
        host.give_gpus(2)
    finished = cluster.dry_run("--attention", "sdpa_cudnn")
    assert finished.returncode == 0, finished.stderr


def test_hosts_without_gpus_get_settings_for_cpus(cluster: Cluster) -> None:
    cluster.head.give_gpus(8)
    finished = cluster.dry_run(**SHELL)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    cores = int(cluster.hosts[0].run("nproc").stdout)
    assert {"DS_ACCELERATOR=cpu", f"OMP_NUM_THREADS={max(1, cores // 2)}", "MALLOC_MMAP_MAX_=0"} <= set(lines)
    assert not [line for line in lines if line.startswith(("KMP_BLOCKTIME=", "MALLOC_ARENA_MAX="))]


def test_hosts_of_two_kinds_are_rejected(cluster: Cluster, tmp_path: Path) -> None:
    cluster.hosts[0].give_gpus(2)
    finished = cluster.head.tinyllama_ds(*cluster.arguments)
    assert finished.returncode == EXIT_CONFIG
    assert finished.stderr.splitlines() == [
        f"tinyllama-ds: {tmp_path / 'hostfile'}: node2 has GPUs and node3 has none that nvidia-smi lists; expected"
        " GPUs on all hosts or none; exclude the others by --exclude node3 or --include"
    ]
    assert not (tmp_path / "run").exists()
    assert cluster.dry_run("--exclude", "node3").returncode == 0


def test_hosts_that_do_not_answer_are_assumed_to_equal_this_machine(cluster: Cluster) -> None:
    for host in cluster.hosts:
        host.stop_sshd()
    finished = cluster.dry_run()
    assert finished.returncode == 0, finished.stderr
    assert "tinyllama-ds: no host reported its hardware; assuming the CPU, as on this machine" in finished.stderr
    assert "DS_ACCELERATOR=cpu" in finished.stdout.splitlines()


def test_without_ssh_the_hardware_is_that_of_this_host(cluster: Cluster) -> None:
    """No host is queried: the command runs on each host, and this one has no GPU."""
    for host in cluster.hosts:
        host.give_gpus(2)
    finished = cluster.dry_run("--no-ssh", "--node-rank", 0)
    assert finished.returncode == 0, finished.stderr
    rejected = cluster.dry_run("--no-ssh", "--node-rank", 0, "--attention", "sdpa_cudnn")
    assert "attention backend 'sdpa_cudnn' needs a GPU" in rejected.stderr


def test_the_interface_is_never_the_loopback_of_debian(cluster: Cluster) -> None:
    """With a default route and without one."""
    cluster.head.name_is_loopback(*cluster.hosts)
    program = (
        "from tinyllama_ds.distributed.world import choose_interface, read_world; print(choose_interface(read_world()))"
    )
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node1"}
    for _ in range(2):
        finished = cluster.head.run("python", "-c", program, **ranks)
        assert finished.stdout == "e0\n", finished.stderr
        assert cluster.head.run("ip", "route", "replace", "default", "dev", "e0").returncode == 0
