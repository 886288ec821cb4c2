"""Supervises the deepspeed launcher: watches the ranks, restarts and stops them together, leaves no process behind."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.distributed.session import end_session
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, EXIT_NUMERICS, EXIT_RESTART, EXIT_ROLLBACK, log
from tinyllama_ds.files import read_object_if_whole
from tinyllama_ds.launch.lifeline import Lifeline
from tinyllama_ds.launch.lock import RunLock
from tinyllama_ds.launch.out_of_memory import count_oom_kills
from tinyllama_ds.layout import (
    FIRST_STEP,
    HEARTBEAT_VARIABLE,
    LIFELINE_VARIABLE,
    RESTART_VARIABLE,
    STACKS_SIGNAL,
    STARTING,
    SUPERVISOR_VARIABLE,
)

_FINAL_CODES = (EXIT_FINISHED, EXIT_RESTART, EXIT_CONFIG, EXIT_NUMERICS)
_CODES_OF_STATES = {"finished": EXIT_FINISHED, "stopped": EXIT_RESTART, "rolled back": EXIT_ROLLBACK}
_MAX_FAILURES = 3  # in a row without a new checkpoint
_STOP_SECONDS = 25  # from a stop request to the end of all processes; schedulers often kill after 30
_POLL_SECONDS = 0.2
_STACK_SECONDS, _STACK_LOOKS = 1.0, 10  # between two checks of the stacks, and how many of them
_CRASHED = 1
_OUT_OF_MEMORY = (
    "the kernel's out-of-memory killer has ended a process on this machine; expected more memory, or a run that needs"
    " less: a smaller train_micro_batch_size_per_gpu, another ZeRO stage, no offload,"
    " or --activation-checkpointing 1 (tinyllama-ds plan shows what fits); the last checkpoint is kept"
)

_HOSTS_SECONDS = 10  # between two checks for missing hosts
_STATUS_SECONDS = 10  # until a file that rank 0 wrote is visible on other hosts


@dataclass(frozen=True)
class Job:
    """A launcher in its own session, the host of each rank, and a function that kills a process group on a host."""

    process: subprocess.Popen
    hosts: list[str]
    kill: Callable[[str, int], None]


# Takes environment variables and a private directory for files; returns None while hosts are missing.
Launch = Callable[[dict[str, str], Path], Job | None]


@dataclass(frozen=True)
class SupervisorConfig:
    """The files that the supervisor reads, and its timeouts in seconds."""

    status_file: Path
    stop_file: Path
    committed: Callable[[], tuple[int, int]]  # steps and tokens of the newest checkpoint
    step_seconds: float  # after which a rank without a completed step is stuck
    start_seconds: float  # the same until the first step: imports, loading, compilation
    max_seconds: float | None  # wall time, after which the run is stopped
    is_first: bool = True  # False on all hosts but the first without ssh, where each host has a supervisor
    open_lifeline: Callable[[Path], Lifeline] | None = None  # for ranks on other hosts


@dataclass(frozen=True)
class SupervisionResult:
    """How a supervised run ended."""

    code: int
    restarts: int
    seconds: float
    tokens: int  # committed by this call


def supervise(launch: Launch, config: SupervisorConfig, lock: RunLock | None) -> SupervisionResult:
    """Run until it finishes, is stopped, is rejected, or fails three times in a row without a new checkpoint."""
    started = time.monotonic()
    stop = _StopRequest(config)
    step, tokens = _committed(config, (0, 0))
    tokens_before = tokens
    restarts = failures = 0
    while True:
        kills = count_oom_kills()
        try:
            code = _run_once(launch, config, stop, lock, restarts)
        except OSError as error:  # of this machine, such as a full disk
            log(f"the run cannot be started or watched: {error}")
            code = _CRASHED
        if code is None:
            stop.wait(_HOSTS_SECONDS)
            if stop.requested_at is None:
                continue
            code = EXIT_RESTART
        last_step, (step, tokens) = step, _committed(config, (step, tokens))
        if code not in (*_FINAL_CODES, EXIT_ROLLBACK) and count_oom_kills() > kills:
            log(_OUT_OF_MEMORY)
            code = code if step > last_step else EXIT_CONFIG  # it would run out of memory again
        if code == EXIT_ROLLBACK:  # not a failure; the run itself limits the number of rollbacks
            log(f"rolling back to checkpoint {step:,}, excluding the samples of the spike")
        else:
            failures = 0 if step > last_step else failures + 1
            if code in _FINAL_CODES or failures == _MAX_FAILURES:
                break
            log(f"the run exited with code {code} at checkpoint {step:,}; restarting in {2**failures} s")
            stop.wait(2**failures)
        if stop.requested_at is not None:
            code = EXIT_RESTART
            break
        restarts += 1
    stop.clear()
    if code not in _FINAL_CODES:
        log(f"giving up after {failures} consecutive failures without a new checkpoint, the last with code {code}")
    return SupervisionResult(code, restarts, time.monotonic() - started, tokens - tokens_before)


def _committed(config: SupervisorConfig, before: tuple[int, int]) -> tuple[int, int]:
    """Steps and tokens committed now, or `before` while the storage is unreachable."""
    try:
        return config.committed()
    except OSError:
        return before


def _run_once(
    launch: Launch, config: SupervisorConfig, stop: "_StopRequest", lock: RunLock | None, restarts: int
) -> int | None:
    """The exit code of one launch, after the end of its last process; None while hosts are missing."""
    if config.is_first:
        config.status_file.unlink(missing_ok=True)
    place = os.environ.get("XDG_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="tinyllama-ds-", dir=place, ignore_cleanup_errors=True) as name:
        directory = Path(name)
        variables = {RESTART_VARIABLE: str(restarts)}
        lifeline = None if config.open_lifeline is None else config.open_lifeline(directory)
        if lifeline is None:
            variables |= {SUPERVISOR_VARIABLE: str(os.getpid()), HEARTBEAT_VARIABLE: name}
        else:
            variables[LIFELINE_VARIABLE] = lifeline.value
        job = None
        try:
            job = launch(variables, directory)
            if job is None:
                return None
            if lifeline is not None:
                lifeline.expect(job.hosts)
            watchdog = _Watchdog(directory, config, lifeline)
            return _wait(job.process, watchdog, stop, lock, config.status_file)
        finally:
            left = lifeline.close() if lifeline is not None else []
            if job is not None:
                for host, group in left:
                    job.kill(host, group)
                # DeepSpeed would kill every run of this Python on the other hosts; the lifeline ends only these ranks.
                end_session(job.process, gently=lifeline is None)


class _StopRequest:
    """A stop request, by a signal or the end of the wall time; passed on to the ranks through the stop file."""

    def __init__(self, config: SupervisorConfig) -> None:
        self.file = config.stop_file
        self.requested_at: float | None = None
        self.is_forced = False
        self._deadline = None if config.max_seconds is None else time.monotonic() + config.max_seconds
        self.clear()  # left by an earlier process
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def poll(self) -> None:
        """Note the end of the wall time, and pass a request on to the ranks. Called several times a second."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.requested_at = self.requested_at or time.monotonic()
        if self.requested_at is not None:
            with suppress(OSError):  # a full disk
                self.file.touch()

    def clear(self) -> None:
        """Remove the file if possible."""
        with suppress(OSError):
            self.file.unlink(missing_ok=True)

    def is_overdue(self) -> bool:
        """Whether the ranks have had their time to stop by themselves."""
        late = self.requested_at is not None and time.monotonic() - self.requested_at > _STOP_SECONDS
        return self.is_forced or late

    def wait(self, seconds: float) -> None:
        """Sleep until a stop is requested."""
        end = time.monotonic() + seconds
        while self.requested_at is None and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.is_forced = self.requested_at is not None
        self.requested_at = self.requested_at or time.monotonic()


def _wait(
    process: subprocess.Popen, watchdog: "_Watchdog", stop: _StopRequest, lock: RunLock | None, status_file: Path
) -> int:
    """The exit code of the run. Returns while the launcher is alive if a rank is stuck or stopping takes too long."""
    failed = watchdog.failed_rank()
    while process.poll() is None and failed is None:
        if lock is not None:
            lock.refresh()
        stop.poll()
        if stop.is_overdue():
            return _code_when_overdue(status_file)
        stuck = watchdog.stuck_rank()
        if stuck is not None:
            log(f"{stuck}; stacks of all ranks:\n{watchdog.stacks()}")
            return _CRASHED
        time.sleep(_POLL_SECONDS)
        failed = watchdog.failed_rank()
    failed = failed or watchdog.failed_rank()  # what it reported last
    code = _exit_code(watchdog.reported_code() or (_CRASHED if failed else process.returncode), status_file)
    if failed and code not in (*_FINAL_CODES, EXIT_ROLLBACK):  # else the launcher ended it when another had finished
        log(failed)
    return code


def _code_when_overdue(status_file: Path) -> int:
    """From rank 0's status file: on a loaded machine processes take long to end after their run has."""
    state = _read_state(status_file)
    if state in _CODES_OF_STATES:
        log(f"the run has {state}, but not all of its processes had ended; they are killed")
        return _CODES_OF_STATES[state]
    log("the ranks did not stop in time; the last checkpoint is kept")
    return EXIT_RESTART


def _exit_code(code: int, status_file: Path) -> int:
    """From rank 0's status file: the launcher exits 0 when a signal kills it, and pdsh mixes up the ranks' codes."""
    state = _read_state(status_file)
    deadline = time.monotonic() + _STATUS_SECONDS
    while code == 0 and state == "running" and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        state = _read_state(status_file)
    if state in _CODES_OF_STATES:
        return _CODES_OF_STATES[state]
    if code < 0:
        return 128 - code
    return code or _CRASHED


def _read_state(status_file: Path) -> str | None:
    row = read_object_if_whole(status_file)
    state = row.get("state")
    return state if isinstance(state, str) else None


class _Watchdog:
    """Detects failed and stuck ranks, by changes seen here: the clocks of other hosts are not compared."""

    def __init__(self, directory: Path, config: SupervisorConfig, lifeline: Lifeline | None) -> None:
        self._lifeline = lifeline
        self._directory = directory
        self._config = config
        self._started = time.monotonic()
        self._seen: dict[Path, tuple[int, float]] = {}  # change time of the file, and when it was first seen

    def failed_rank(self) -> str | None:
        """A sentence about the first rank on any host that reported an error, died, or stopped responding."""
        return None if self._lifeline is None else self._lifeline.poll()

    def reported_code(self) -> int:
        """The first nonzero exit code that a rank reported, else 0.

        The launcher polls once a second, so its own code may be that of a rank which only lost its peer.
        """
        codes = (_read_beat(file).get("code") for file in sorted(self._directory.glob("rank_*")))
        return next(filter(None, codes), 0)

    def stuck_rank(self) -> str | None:
        """A sentence about the first stuck rank, else None."""
        now = time.monotonic()
        for file in sorted(self._directory.glob("rank_*")):
            changed = file.stat().st_mtime_ns
            if self._seen.get(file, (None,))[0] != changed:
                self._seen[file] = (changed, now)
        if not self._seen and now - self._started > self._config.start_seconds:
            return f"no rank started within {self._config.start_seconds:g} s"
        for file, (_, since) in self._seen.items():
            beat = _read_beat(file)
            is_slow = beat.get("doing") in (STARTING, FIRST_STEP)
            limit = self._config.start_seconds if is_slow else self._config.step_seconds
            if now - since > limit:
                return f"{file.name} has been {beat.get('doing')} at step {beat.get('step')} for {limit:g} s"
        return None

    def stacks(self) -> str:
        """The stacks of all ranks, including local ones that are stopped by a signal."""
        if self._lifeline is not None:
            self._lifeline.stacks()
        for file in self._seen:
            with suppress(ProcessLookupError, KeyError):
                os.kill(_read_beat(file)["pid"], STACKS_SIGNAL)
                os.kill(_read_beat(file)["pid"], signal.SIGCONT)
        stacks = self._settled_stacks()
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in stacks)

    def _settled_stacks(self) -> list[Path]:
        """The files with the stacks, once they no longer grow; some ranks may not answer."""
        sizes: list[int] = []
        for _ in range(_STACK_LOOKS):
            time.sleep(_STACK_SECONDS)
            files = sorted(self._directory.glob("stacks_*"))
            before, sizes = sizes, [file.stat().st_size for file in files]
            if sizes == before and all(sizes):
                break
        return files


def _read_beat(file: Path) -> dict:
    return read_object_if_whole(file) or {"doing": "working"}  # read while it was being written
