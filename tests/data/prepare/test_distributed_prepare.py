"""Preparation over MPI ranks and over ssh: the bytes of one process, also after a rank was killed."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import stopping
from corpora import made_up_text, write_jsonl
from launching import TIMEOUT, wait_until
from slurm import slurm, why_not

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.distributed.network import free_port

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
SHARDS = 9
ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}

needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun") is None or find_spec("mpi4py") is None, reason="needs mpirun (openmpi-bin) and mpi4py"
)
needs_ssh = pytest.mark.skipif(
    shutil.which("ssh") is None or not Path(SSHD).is_file(), reason="needs ssh and sshd (openssh-server)"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for number in range(SHARDS):
        write_jsonl(root / f"{number}.jsonl", [made_up_text(100 * number + index, 400) for index in range(100)])
    return root


def arguments(corpus: Path, tokenizer: Tokenizer, output: Path) -> list[str]:
    return [
        *("prepare", "--source", "mine", "--input", str(corpus), "--tokenizer", str(tokenizer.path)),
        *("--output", str(output), "--encoder", "sentencepiece", "--shard-bytes", "1"),
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Tokenizer) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("expected")
    assert main([*arguments(corpus, tokenizer, output), "--workers", "1"]) == 0
    assert len(list(output.rglob("*.json"))) == SHARDS
    return contents(output)


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_shares_make_up_the_whole(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, expected: dict[str, bytes]):
    for rank in (2, 0, 1):
        assert main([*arguments(corpus, tokenizer, tmp_path), "--workers", "1", "--share", f"{rank}/3"]) == 0
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("share", ["3/3", "-1/2", "1", "a/b", "0/0"])
def test_an_impossible_share_is_rejected(tmp_path: Path, tokenizer: Tokenizer, share: str):
    with pytest.raises(SystemExit):
        main([*arguments(tmp_path, tokenizer, tmp_path), "--share", share])


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_each_task_of_srun_makes_its_share(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, expected: dict[str, bytes]
):
    (tmp_path / "slurm").mkdir()
    command = [sys.executable, "-m", "tinyllama_ds.cli", *arguments(corpus, tokenizer, tmp_path / "out")]
    with slurm(tmp_path / "slurm") as environment:
        done = subprocess.run(
            ["srun", "--ntasks=2", *command, "--workers", "1"],
            env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=TIMEOUT, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shares = [line.split(", ")[-1] for line in done.stdout.splitlines() if line.startswith("mine/train")]
    assert sorted(shares) == ["4 shards", "5 shards"]
    assert contents(tmp_path / "out") == expected


# --- MPI --------------------------------------------------------------------------------------------------------------


def mpirun(ranks: int, *command: str) -> list[str]:
    options = ["--allow-run-as-root", "--oversubscribe"] if os.geteuid() == 0 else ["--oversubscribe"]
    return ["mpirun", *options, "-n", str(ranks), sys.executable, *command]


def start_mpi(ranks: int, corpus: Path, tokenizer: Tokenizer, output: Path) -> subprocess.Popen:
    program = ("-m", "mpi4py.futures", "-m", "tinyllama_ds.cli", *arguments(corpus, tokenizer, output), "--mpi")
    return subprocess.Popen(
        mpirun(ranks, *program), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@needs_mpi
def test_mpi_ranks_write_the_bytes_of_one_process(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, expected: dict[str, bytes]
):
    process = start_mpi(3, corpus, tokenizer, tmp_path)
    assert "mine/train: 9 files" in process.communicate(timeout=TIMEOUT)[0]
    assert process.returncode == 0
    assert contents(tmp_path) == expected


def stopped_writers(output: Path) -> list[psutil.Process]:
    """Who is writing a shard, and has stopped; the name of what is not finished has the number of its process."""
    writers = []
    for path in output.rglob(".*.bin.*.partial"):
        with suppress(psutil.NoSuchProcess):
            writer = psutil.Process(int(path.name.split(".")[-2]))
            writers += [writer] if writer.status() == psutil.STATUS_STOPPED else []
    return writers


@needs_mpi
def test_a_killed_mpi_rank_costs_its_shard_only(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, expected: dict[str, bytes]
):
    program = (stopping.__file__, "mine", str(corpus), str(tokenizer.path), str(tmp_path), "mpi")
    command = mpirun(3, "-m", "mpi4py.futures", *program)
    process = subprocess.Popen(command, env=ENVIRONMENT | {stopping.STOP_VARIABLE: "2"}, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(stopped_writers(tmp_path)) == 2, "two ranks that stop")
    stopped_writers(tmp_path)[0].kill()
    process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert 2 <= len(finished) < SHARDS
    process = start_mpi(2, corpus, tokenizer, tmp_path)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}.items()
    assert contents(tmp_path) == expected


@needs_mpi
def test_mpi_without_its_futures_is_rejected(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    command = mpirun(1, "-m", "tinyllama_ds.cli", *arguments(corpus, tokenizer, tmp_path), "--mpi")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 78
    assert "start with mpirun -n RANKS python -m mpi4py.futures" in done.stderr


# --- ssh --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ssh_to_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an `ssh` that is the real one, pointed at a server of our own on a free port of this machine."""
    root = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / name], check=True)
    shutil.copy(root / "user.pub", root / "authorized")
    port = free_port()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    options = {"HostKey": root / "host", "AuthorizedKeysFile": root / "authorized", "PidFile": "none"}
    options |= {"ListenAddress": f"127.0.0.1:{port}", "StrictModes": "no", "UsePAM": "no"}
    flags = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    server = subprocess.Popen([SSHD, "-D", "-f", "/dev/null", *flags])
    (root / "ssh").write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -F /dev/null -p {port} -i {root / 'user'} -l {getpass.getuser()}"
        ' -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    )
    (root / "ssh").chmod(0o700)
    wait_until(lambda: answers(port), "a server that listens")
    yield root
    server.terminate()
    server.wait(TIMEOUT)


def answers(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@needs_ssh
def test_a_hostfile_makes_every_host_work(
    tmp_path: Path,
    corpus: Path,
    tokenizer: Tokenizer,
    expected: dict[str, bytes],
    ssh_to_here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """Two names of this machine and one that nobody answers at, whose share is done in the end too."""
    monkeypatch.setenv("PATH", f"{ssh_to_here}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=8\n127.0.0.1 slots=8\nnobody.invalid slots=8\n")
    output = tmp_path / "a path with 'quotes' and $(spaces)"
    assert main([*arguments(corpus, tokenizer, output), "--workers", "1", "--hostfile", str(hostfile)]) == 0
    failures = [line for line in capsys.readouterr().err.splitlines() if "finishing its share here" in line]
    assert len(failures) == 1
    assert failures[0].startswith("tinyllama-ds: nobody.invalid: exit code 255")
    assert contents(output) == expected
