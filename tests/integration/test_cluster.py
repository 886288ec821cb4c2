"""Runs over several hosts equal the run on one machine: through pdsh, mpirun, torchrun and without ssh.

Hosts are namespaces of this machine with a network and an sshd of their own (`tests/hosts.py`).
The fast part runs by default, all of it with `--hosts`.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import slurm
from forked import pretrain
from hosts import Finished, Host, start_hosts, why_not
from launching import (
    TIMEOUT,
    read_series,
    read_series_so_far,
    run,
    wait_until,
    write_deepspeed_config,
    write_recipe,
)
from made_up import made_up_text

from tinyllama_ds.checkpoint.format import Progress, find_checkpoints, read_manifest
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.fault_injection import FAULT_VARIABLE
from tinyllama_ds.launch.launcher import PRETRAIN

STEPS, SAVE_EVERY = 6, 2
COLLECTIVE_SECONDS = 600  # after which a collective gives up by itself
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

    def assert_all_finish(self, processes: list, run_dir: Path) -> None:
        """Every process of a run ends well, and the run as it does on one machine."""
        for process in processes:
            finished = finish(process)
            assert finished.returncode == 0, explain(finished)
        self.assert_same_end(run_dir)

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


@pytest.fixture
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with start_hosts(4, tmp_path_factory.mktemp("hosts")) as started:
        yield started


def write_hostfile(path: Path, hosts: list[Host], slots: int = 1) -> Path:
    path.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
    return path


def explain(finished: Finished) -> str:
    return f"{finished.stdout}\n{finished.stderr}"


@pytest.mark.parametrize("launcher", [pytest.param("pdsh", marks=slow), "openmpi"])
def test_two_hosts_equal_one_machine(launcher: str, setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    more = ("--hostfile", hostfile, "--launcher", launcher)
    finished = hosts[0].tinyllama_ds(*setup.arguments(tmp_path / "run", *more))
    assert finished.returncode == 0, explain(finished)
    assert "rank 0 on node1, port" in finished.stderr
    assert "network interface e0" in finished.stderr
    setup.assert_same_end(tmp_path / "run")
    assert_nothing_is_left(hosts)


def assert_nothing_is_left(hosts: list[Host]) -> None:
    """A daemon of mpirun on another host ends a moment after mpirun itself."""
    _, left = psutil.wait_procs([process for host in hosts for process in host.processes()], timeout=TIMEOUT)
    assert left == [], "orphans"


def start_and_hold(setup: Setup, hosts: list[Host], tmp_path: Path, *more: object) -> subprocess.Popen:
    """A run whose last rank stays in the middle of its fifth step, alive, while the others wait for it.

    Checkpoint 2 is committed by then, because the save after step 4 waits for it; and that save cannot end.
    """
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    fault = {FAULT_VARIABLE: f"step.before_optimizer:{len(hosts) - 1}:4:spin"}
    command = setup.arguments(tmp_path / "run", "--hostfile", hostfile, *more)
    process = hosts[0].start(sys.executable, "-m", "tinyllama_ds.cli", *command, **fault)

    def is_held() -> bool:
        assert process.poll() is None, process.communicate()
        is_trained = len(read_series_so_far(tmp_path / "run", "Train/Loss")) == 4
        return is_trained and bool(find_checkpoints(tmp_path / "run"))

    wait_until(is_held, "the fifth step")
    return process


def finish(process: subprocess.Popen, seconds: float = 2 * TIMEOUT) -> Finished:
    output, errors = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_killed_processes_of_a_host_cost_steps_and_nothing_else(
    setup: Setup, hosts: list[Host], tmp_path: Path
) -> None:
    process = start_and_hold(setup, hosts, tmp_path)
    before = [rank for host in hosts for rank in host.ranks()]
    assert len(before) == 2
    hosts[1].kill_processes()
    gone, left = psutil.wait_procs(before, timeout=COLLECTIVE_SECONDS / 2)
    assert left == [], "orphans"
    finished = finish(process)
    assert finished.returncode == 0, explain(finished)
    assert "rank 1 on node2 has died" in finished.stderr
    assert "resumed at step 2" in finished.stdout
    setup.assert_same_end(tmp_path / "run")
    assert "resumed at step 2" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert_nothing_is_left(hosts)


@slow
def test_a_cut_link_ends_both_sides_and_the_run_resumes(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    """Nobody hears anything any more: both sides notice by the silence, and end before a collective gives up."""
    process = start_and_hold(setup, hosts, tmp_path)
    before = [rank for host in hosts for rank in host.ranks()]
    hosts[1].cut()
    gone, left = psutil.wait_procs(before, timeout=COLLECTIVE_SECONDS / 2)
    assert left == [], "orphans"
    hosts[1].hint()
    finished = finish(process)
    assert finished.returncode == 0, explain(finished)
    assert (
        "rank 1 on node2 has not responded for 30 s: it is stopped, or its host or the network is down"
        in finished.stderr
    )
    setup.assert_same_end(tmp_path / "run")


@slow
def test_a_stopped_rank_is_killed_on_its_host(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    process = start_and_hold(setup, hosts, tmp_path)
    before = [rank for host in hosts for rank in host.ranks()]
    for found in hosts[1].processes():
        if found in before:
            found.suspend()
    gone, left = psutil.wait_procs(before, timeout=COLLECTIVE_SECONDS / 2)
    assert left == [], "orphans"
    finished = finish(process)
    assert finished.returncode == 0, explain(finished)
    setup.assert_same_end(tmp_path / "run")


@slow
def test_a_killed_supervisor_leaves_nobody_behind(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    process = start_and_hold(setup, hosts, tmp_path)
    before = [found for host in hosts for found in host.processes()]
    supervisor = [found for found in before if "pretrain" in found.cmdline() and "tinyllama_ds.cli" in found.cmdline()]
    supervisor[0].kill()
    gone, left = psutil.wait_procs(before, timeout=COLLECTIVE_SECONDS / 2)
    assert left == [], "orphans"
    finish(process)


@slow
def test_a_lost_host_is_left_out(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    """With --allow-shrink the run goes on with the hosts that are left: same batch, same samples."""
    process = start_and_hold(setup, hosts, tmp_path, "--allow-shrink")
    hosts[1].crash()
    finished = finish(process)
    assert finished.returncode == 0, explain(finished)
    assert "continuing on node1" in finished.stderr
    setup.assert_same_end(tmp_path / "run")


@slow
def test_a_first_error_is_shown_with_its_host(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    fault = {FAULT_VARIABLE: "step.begin:1:3:raise"}
    finished = hosts[0].tinyllama_ds(*setup.arguments(tmp_path / "run", "--hostfile", hostfile), **fault)
    assert finished.returncode == 0, explain(finished)
    assert "rank 1 on node2: OSError: injected at step.begin of step 3" in finished.stderr
    setup.assert_same_end(tmp_path / "run")


@slow
def test_a_slow_host_is_named(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    """node2 gets two fifths of the time."""
    recipe = write_recipe(tmp_path / "long.toml", 400, save_every=400, evaluate_every=400)
    recipe.write_text(recipe.read_text().replace("log_steps = 1", "log_steps = 20"))
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    arguments = replace(setup, recipe=recipe).arguments(tmp_path / "run", "--hostfile", hostfile)
    process = hosts[0].start(sys.executable, "-m", "tinyllama_ds.cli", *arguments)
    wait_until(lambda: read_series_so_far(tmp_path / "run", "Train/Loss"), "a logged step")
    (slow_rank,) = hosts[1].ranks()
    while process.poll() is None and slow_rank.is_running():
        with suppress(psutil.NoSuchProcess):
            slow_rank.suspend()
            time.sleep(0.03)
            slow_rank.resume()
            time.sleep(0.02)
    finished = finish(process)
    assert finished.returncode == 0, explain(finished)
    assert "straggler: rank 1 (node2) is " in finished.stdout
    assert max(read_series(tmp_path / "run", "Ranks/Max")) > 0


@slow
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_four_hosts_equal_one_machine(launcher: str, setup: Setup, four: list[Host], tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hostfile", four)
    more = ("--hostfile", hostfile, "--launcher", launcher)
    finished = four[0].tinyllama_ds(*setup.arguments(tmp_path / "run", *more))
    assert finished.returncode == 0, explain(finished)
    setup.assert_same_end(tmp_path / "run")


@slow
def test_hosts_that_are_left_but_do_not_fit_are_rejected(setup: Setup, four: list[Host], tmp_path: Path) -> None:
    process = start_and_hold(setup, four, tmp_path, "--allow-shrink")
    four[3].crash()
    finished = finish(process)
    assert finished.returncode == EXIT_CONFIG, explain(finished)
    assert "only node1, node2, node3 are left, and stage 'only': a global batch of 8" in finished.stderr
    assert "valid subset: --include node1@node2" in finished.stderr


@slow
def test_include_takes_what_it_names(setup: Setup, four: list[Host], tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hostfile", four, slots=2)
    more = ("--hostfile", hostfile, "--include", "node2:1@node4:0")
    finished = four[0].tinyllama_ds(*setup.arguments(tmp_path / "run", *more))
    assert finished.returncode == 0, explain(finished)
    assert "rank 0 on node2" in finished.stderr
    setup.assert_same_end(tmp_path / "run")


@slow
def test_every_host_starts_its_own_ranks_without_ssh(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    """A host's ranks die; all hosts start again and meet at the same port."""
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    for host in hosts:
        host.stop_sshd()
    fault = {FAULT_VARIABLE: "step.begin:1:3:kill"}
    processes = []
    for rank in (1, 0):
        more = ("--hostfile", hostfile, "--no-ssh", "--node-rank", rank)
        command = setup.arguments(tmp_path / "run", *more)
        processes.append(hosts[rank].start(sys.executable, "-m", "tinyllama_ds.cli", *command, **fault))
    setup.assert_all_finish(processes, tmp_path / "run")
    assert_nothing_is_left(hosts)


@slow
def test_torchrun_starts_the_script(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    where = ("--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "static", "--rdzv-endpoint", "node1:29400")
    processes = [
        host.start(
            *(sys.executable, "-m", "torch.distributed.run", *where, "--node-rank", rank),
            *("scripts/pretrain.py", *setup.arguments(tmp_path / "run")[1:]),
        )
        for rank, host in enumerate(hosts)
    ]
    setup.assert_all_finish(processes, tmp_path / "run")


@slow
@pytest.mark.skipif(slurm.why_not() is not None, reason=slurm.why_not() or "")
def test_slurm_starts_the_ranks(setup: Setup, tmp_path: Path) -> None:
    """Through DeepSpeed's runner and a real Slurm of one node."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "hostfile").write_text(f"{socket.gethostname()} slots=2\n")
    more = ("--hostfile", tmp_path / "hostfile", "--launcher", "slurm")
    arguments = map(str, setup.arguments(tmp_path / "run", *more))
    with slurm.slurm(tmp_path / "slurm") as environment:
        finished = run([sys.executable, "-m", "tinyllama_ds.cli", *arguments], **environment)
    assert finished.returncode == 0, explain(finished)
    assert "2 ranks on 1 hosts through slurm" in finished.stderr
    setup.assert_same_end(tmp_path / "run")


@slow
@pytest.mark.parametrize("own_name", ["address", "loopback"])
def test_srun_tasks_find_their_ranks(own_name: str, setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    """What srun sets for each task, and nothing else; rank 0's host may know itself by Debian's 127.0.1.1."""
    if own_name == "loopback":
        hosts[0].name_is_loopback(hosts[1])
    processes = [
        host.start(
            *(sys.executable, "-m", PRETRAIN, *setup.arguments(tmp_path / "run")[1:]),
            SLURM_PROCID=str(rank),
            SLURM_LOCALID="0",
            SLURM_STEP_NUM_TASKS="2",
            SLURM_STEP_NODELIST="node[1-2]",
        )
        for rank, host in enumerate(hosts)
    ]
    setup.assert_all_finish(processes, tmp_path / "run")


@slow
def test_an_ill_host_is_rejected_before_the_start(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    hosts[1].stop_sshd()
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    finished = hosts[0].tinyllama_ds(*setup.arguments(tmp_path / "run", "--hostfile", hostfile))
    assert finished.returncode == EXIT_CONFIG
    assert "FAIL  ssh  node2: " in finished.stderr
    assert not list((tmp_path / "run").glob("*"))


@slow
def test_hybrid_sharding_equals_zero3_and_sends_less(setup: Setup, hosts: list[Host], tmp_path: Path) -> None:
    """hpZ over two hosts of two ranks: ZeRO-3's curve, and fewer bytes between the hosts."""
    hostfile = write_hostfile(tmp_path / "hostfile", hosts, slots=2)
    sent, losses = {}, {}
    for name, changes in {"zero3": {}, "zero3_hpz": {"zero_hpz_partition_size": 2}}.items():
        config = write_deepspeed_config(tmp_path / f"{name}.json", 3, micro_batch=2)
        content = json.loads(config.read_text())
        content["zero_optimization"] |= changes
        config.write_text(json.dumps(content))
        before = [host.sent_bytes() for host in hosts]
        run_dir = tmp_path / name
        finished = hosts[0].tinyllama_ds(*replace(setup, config=config).arguments(run_dir, "--hostfile", hostfile))
        assert finished.returncode == 0, explain(finished)
        sent[name] = sum(host.sent_bytes() - earlier for host, earlier in zip(hosts, before, strict=True))
        losses[name] = read_series(run_dir, "Train/Loss")
    assert losses["zero3"] == pytest.approx(setup.losses, rel=1e-5)
    assert losses["zero3_hpz"] == pytest.approx(losses["zero3"], rel=1e-5)
    assert sent["zero3_hpz"] < sent["zero3"]


@slow
@pytest.mark.parametrize("way", ["ssh", "mpirun"])
def test_data_is_prepared_on_all_hosts_after_a_crash_too(
    way: str, hosts: list[Host], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The bytes of one process, although a host dies in the middle and the command is started again."""
    for number in range(9):
        lines = [json.dumps({"text": made_up_text(100 * number + index, 1500)}) for index in range(60)]
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{number}.jsonl").write_text("\n".join(lines))
    command = (
        *("prepare", "--source", "mine", "--input", tmp_path / "raw", "--tokenizer", tokenizer.path, "--workers", 1),
        *("--encoder", "sentencepiece", "--shard-bytes", 1, "--output"),
    )
    alone = hosts[0].tinyllama_ds(*command, tmp_path / "alone")
    assert alone.returncode == 0, explain(alone)
    python = (sys.executable, "-m")
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    if way == "ssh":
        line = (*python, "tinyllama_ds.cli", *command, tmp_path / "data", "--hostfile", hostfile)
    else:
        mpirun = ("mpirun", "--allow-run-as-root", "--hostfile", hostfile, "-n", 2, "-x", "PYTHONPATH")
        line = (
            *mpirun,
            *python,
            "mpi4py.futures",
            *python[1:],
            "tinyllama_ds.cli",
            *command,
            tmp_path / "data",
            "--mpi",
        )
    process = hosts[0].start(*line)
    wait_until(lambda: list((tmp_path / "data").rglob("*.json")), "the first shard")
    hosts[1].kill_processes()
    interrupted = finish(process)
    assert (interrupted.returncode == 0) == (way == "ssh"), explain(interrupted)  # the first host does the rest itself
    again = hosts[0].run(*line)
    assert again.returncode == 0, explain(again)
    assert contents(tmp_path / "data") == contents(tmp_path / "alone")


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
