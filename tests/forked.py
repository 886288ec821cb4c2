"""Ranks and commands as processes forked from one that has imported PyTorch and DeepSpeed already.

Imports are four fifths of what a launch costs. All else is as in a launch: a process for each rank, which ends with its
run and takes all of DeepSpeed's state with it, a gloo group, files and exit codes. What launcher and supervisor do is
tested through `launching`.
"""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from launching import TIMEOUT, Finished

from tinyllama_ds.distributed.network import free_port
from tinyllama_ds.launch.launcher import PRETRAIN

_ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])


@dataclass(frozen=True)
class Processes:
    """The forks, by rank, and where they print."""

    arguments: list[str]
    processes: list[BaseProcess]
    stdout: Path
    stderr: Path

    def finish(self) -> Finished:
        """Wait for their end. As under the launcher, one that fails ends the others.

        Raises `TimeoutExpired` with the output so far where one hangs.
        """
        code = self._wait()
        stdout, stderr = (output.read_text(errors="replace") for output in (self.stdout, self.stderr))
        if code is None:
            raise subprocess.TimeoutExpired(self.arguments, TIMEOUT, stdout, stderr)
        return Finished(self.arguments, code, stdout, stderr)

    def _wait(self) -> int | None:
        """The exit code of the first one that failed, 0 if none did, None if one hangs."""
        deadline = time.monotonic() + TIMEOUT
        running = {process.sentinel: process for process in self.processes}
        while running:
            ended = wait(list(running), max(0, deadline - time.monotonic()))
            if not ended:
                return None
            codes = [running.pop(sentinel).exitcode for sentinel in ended]
            if any(codes):  # at once: rather the cause's than that of a peer which lost its connection
                return min(filter(None, codes), key=lambda code: (code > 0, code == 1))
        return 0


def pretrain(
    recipe: Path, config: Path, data: Path, run_dir: Path, ranks: int, *more: str, **environment: str
) -> Finished:
    """Ranks of `tinyllama_ds.rank.pretrain`: once, a rollback asks for another start by its exit code."""
    arguments = ["--recipe", recipe, "--deepspeed-config", config, "--data", data, "--run-dir", run_dir, *more]
    return on_ranks(run_module, PRETRAIN, *arguments, ranks=ranks, **environment)


def tinyllama_ds(*arguments: object, **environment: str) -> Finished:
    """Any command of the toolkit, by its arguments."""
    with _forks(run_command, arguments, [os.environ | environment]) as processes:
        return processes.finish()


def plain_curves(program: str, recipe: Path, data: Path, steps: int, *more: str) -> dict[str, list[float]]:
    """Loss and gradient norm of every step of a training without DeepSpeed, by a program of `tests/integration`."""
    script = Path(__file__).with_name("integration") / program
    finished = on_ranks(run_script, script, recipe, data, steps, *more, ranks=1)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def on_ranks(function: Callable[..., None], *arguments: object, ranks: int, **environment: str) -> Finished:
    """A function of a module, called on every rank; what it prints is the output, and it may end its process."""
    with started(function, *arguments, ranks=ranks, **environment) as processes:
        return processes.finish()


def started(
    function: Callable[..., None], *arguments: object, ranks: int, **environment: str
) -> AbstractContextManager[Processes]:
    """The same while they are at work; at the end of the context they are killed."""
    shared = os.environ | _ON_CPU | {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port())} | environment
    own = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return _forks(function, arguments, own)


def run_script(script: Path, *arguments: object) -> None:
    """As `python SCRIPT ARGUMENTS`."""
    sys.argv = [str(script), *map(str, arguments)]
    runpy.run_path(str(script), run_name="__main__")


def run_module(name: str, *arguments: object) -> None:
    """As `python -m NAME ARGUMENTS`."""
    sys.argv = [name, *map(str, arguments)]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_command(*arguments: object) -> None:
    """As `tinyllama-ds ARGUMENTS`."""
    from tinyllama_ds.cli import main

    sys.argv = ["tinyllama-ds", *map(str, arguments)]
    sys.exit(main(sys.argv[1:]))


@contextmanager
def _forks(function: Callable[..., None], arguments: tuple, environments: list[dict[str, str]]) -> Iterator[Processes]:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for output in outputs:
            output.touch()
        processes = [_fork(function, arguments, own, outputs) for own in environments]
        try:
            yield Processes([function.__name__, *map(str, arguments)], processes, *outputs)
        finally:
            for process in processes:
                process.kill()
                with suppress(ProcessLookupError):  # it has ended, or has no group of its own yet
                    os.killpg(process.pid, signal.SIGKILL)  # what it has started
                process.join()


def _fork(function: Callable[..., None], arguments: tuple, own: Mapping[str, str], outputs: list[Path]) -> BaseProcess:
    process = _context.Process(target=_become, args=(function, arguments, dict(own), list(map(str, outputs))))
    with mock.patch.dict(os.environ, _ON_CPU | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        process.start()  # the first one starts the server, which imports under these variables
    return process


def _become(function: Callable[..., None], arguments: tuple, own: dict[str, str], outputs: list[str]) -> None:
    """In the fork: take over environment and outputs as a process that was started would have them."""
    os.setsid()
    os.environ.clear()
    os.environ.update(own)
    for descriptor, output in zip((1, 2), outputs, strict=True):
        file = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    function(*arguments)
