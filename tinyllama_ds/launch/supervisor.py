"""Around the deepspeed launcher: watches the ranks, restarts them, stops them together, leaves no process behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, EXIT_NUMERICS, EXIT_RESTART, EXIT_ROLLBACK
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
_STOP_SECONDS = 25  # from the wish to stop to the end of all processes; a scheduler often kills after 30
_POLL_SECONDS = 0.2
_STACK_SECONDS, _STACK_LOOKS = 1.0, 10  # between two looks at the stacks, and how often before it goes on without some
_CRASHED = 1
_OUT_OF_MEMORY = (
    "the kernel has ended a process for want of memory on this machine, as its out-of-memory killer counts; expected"
    " more memory, or a run that needs less: a smaller train_micro_batch_size_per_gpu, another ZeRO stage, no offload,"
    " or --activation-checkpointing 1 (tinyllama-ds plan shows what fits); the last checkpoint stands"
)

_HOSTS_SECONDS = 10  # between two looks for hosts that are missing
_STATUS_SECONDS = 10  # for what rank 0 wrote to be seen on another host


@dataclass(frozen=True)
class Job:
    """A launcher in a session of its own, the host of every rank, by rank, and how a process group there is killed."""

    process: subprocess.Popen
    hosts: list[str]
    kill: Callable[[str, int], None]


# With these variables, and a private directory for its files; None where hosts are missing that may come back.
Launch = Callable[[dict[str, str], Path], Job | None]


@dataclass(frozen=True)
class SupervisorConfig:
    """What the supervisor looks at, and for how long it waits."""

    status_file: Path
    stop_file: Path
    committed: Callable[[], tuple[int, int]]  # steps and tokens of the newest checkpoint
    step_seconds: float  # a rank that completes no step for so long is stuck
    start_seconds: float  # the same until its first step, with imports, loading and compiling in it
    max_seconds: float | None  # of wall time, then stop
    is_first: bool = True  # of several supervisors on one run, each with its own host's ranks
    open_lifeline: Callable[[Path], Lifeline] | None = None  # for ranks on other hosts


@dataclass(frozen=True)
class SupervisionResult:
    """How it ended."""

    code: int
    restarts: int
    seconds: float
    tokens: int  # committed by this call


def supervise(launch: Launch, watch: SupervisorConfig, lock: RunLock | None) -> SupervisionResult:
    """Run until it has finished, was stopped, was refused, or failed three times in a row without a new checkpoint."""
    started = time.monotonic()
    stop = _StopRequest(watch)
    step, tokens = _committed(watch, (0, 0))
    tokens_before = tokens
    restarts = failures = 0
    while True:
        kills = count_oom_kills()
        code = _try_once(launch, watch, stop, lock, restarts)
        if code is None:
            stop.wait(_HOSTS_SECONDS)
            if stop.requested_at is None:
                continue
            code = EXIT_RESTART
        last_step, (step, tokens) = step, _committed(watch, (step, tokens))
        if code not in (*_FINAL_CODES, EXIT_ROLLBACK) and count_oom_kills() > kills:
            _log(_OUT_OF_MEMORY)
            code = code if step > last_step else EXIT_CONFIG  # what does not fit once does not fit again
        if code == EXIT_ROLLBACK:  # no failure; the run itself counts how often it does this
            _log(f"going back to checkpoint {step:,}, without the samples of the spike")
        else:
            failures = 0 if step > last_step else failures + 1
            if code in _FINAL_CODES or failures == _MAX_FAILURES:
                break
            _log(f"the run ended with code {code} at checkpoint {step:,}; starting it again in {2**failures} s")
            stop.wait(2**failures)
        if stop.requested_at is not None:
            code = EXIT_RESTART
            break
        restarts += 1
    stop.forget()
    if code not in _FINAL_CODES:
        _log(f"given up: {failures} failures in a row without a new checkpoint, the last with code {code}")
    return SupervisionResult(code, restarts, time.monotonic() - started, tokens - tokens_before)


def _committed(watch: SupervisorConfig, before: tuple[int, int]) -> tuple[int, int]:
    """What is committed now; storage that is out of reach does not change how a run ends."""
    try:
        return watch.committed()
    except OSError:
        return before


def _try_once(
    launch: Launch, watch: SupervisorConfig, stop: "_StopRequest", lock: RunLock | None, restarts: int
) -> int | None:
    """As `_run_once`; a start that this machine cannot make, because a disk is full, say, is one that has failed."""
    try:
        return _run_once(launch, watch, stop, lock, restarts)
    except OSError as error:
        _log(f"the run cannot be started or watched: {error}")
        return _CRASHED


def _run_once(
    launch: Launch, watch: SupervisorConfig, stop: "_StopRequest", lock: RunLock | None, restarts: int
) -> int | None:
    """From the start of the launcher to the end of its last process; None where it could not start yet."""
    if watch.is_first:
        watch.status_file.unlink(missing_ok=True)
    place = os.environ.get("XDG_RUNTIME_DIR")
    with tempfile.TemporaryDirectory(prefix="tinyllama-ds-", dir=place, ignore_cleanup_errors=True) as name:
        directory = Path(name)
        variables = {RESTART_VARIABLE: str(restarts)}
        lifeline = None if watch.open_lifeline is None else watch.open_lifeline(directory)
        if lifeline is None:
            variables |= {SUPERVISOR_VARIABLE: str(os.getpid()), HEARTBEAT_VARIABLE: name}
        else:
            variables[LIFELINE_VARIABLE] = lifeline.value
        started = None
        try:
            started = launch(variables, directory)
            if started is None:
                return None
            if lifeline is not None:
                lifeline.expect(started.hosts)
            watchdog = _Watchdog(directory, watch, lifeline)
            return _wait(started.process, watchdog, stop, lock, watch.status_file)
        finally:
            left = lifeline.close() if lifeline is not None else []
            if started is not None:
                for host, group in left:
                    started.kill(host, group)
                # DeepSpeed's own end of a run on other hosts kills every run of this Python there; ours is the line.
                end_group(started.process, gently=lifeline is None)


class _StopRequest:
    """The wish to stop: a signal, or the end of the wall time. Passed on to the ranks through the stop file."""

    def __init__(self, watch: SupervisorConfig) -> None:
        self.file = watch.stop_file
        self.requested_at: float | None = None
        self.is_forced = False
        self._deadline = None if watch.max_seconds is None else time.monotonic() + watch.max_seconds
        self.forget()  # it was meant for an earlier process
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def look(self) -> None:
        """To be called often."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.requested_at = self.requested_at or time.monotonic()
        if self.requested_at is not None:
            with suppress(OSError):  # without an inode for it there is none for a checkpoint either
                self.file.touch()

    def forget(self) -> None:
        """Remove the file, if that is possible."""
        with suppress(OSError):
            self.file.unlink(missing_ok=True)

    def is_overdue(self) -> bool:
        """Whether waiting for the ranks' own end is over."""
        late = self.requested_at is not None and time.monotonic() - self.requested_at > _STOP_SECONDS
        return self.is_forced or late

    def wait(self, seconds: float) -> None:
        """Sleep, unless a stop is wanted."""
        end = time.monotonic() + seconds
        while self.requested_at is None and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def _note(self, _number: int, _frame: object) -> None:
        self.is_forced = self.requested_at is not None
        self.requested_at = self.requested_at or time.monotonic()


def _wait(
    process: subprocess.Popen, watchdog: "_Watchdog", stop: _StopRequest, lock: RunLock | None, status_file: Path
) -> int:
    """The exit code of the run; returns early, the launcher still alive, where it is stuck or stopping too long."""
    while process.poll() is None:
        if lock is not None:
            lock.refresh()
        stop.look()
        if stop.is_overdue():
            _log("the ranks did not stop by themselves; the last checkpoint stands")
            return EXIT_RESTART
        failed = watchdog.failed_rank()
        if failed is not None:
            return watchdog.code_of_failure(failed, status_file)
        stuck = watchdog.stuck_rank()
        if stuck is not None:
            _log(f"{stuck}; stacks of all ranks:\n{watchdog.stacks()}")
            return _CRASHED
        time.sleep(_POLL_SECONDS)
    failed = watchdog.failed_rank()  # its last words
    if failed is not None:
        return watchdog.code_of_failure(failed, status_file)
    return _exit_code(watchdog.report_exit() or process.returncode, status_file)


def _exit_code(code: int, status_file: Path) -> int:
    """What rank 0 wrote counts: the launcher exits 0 when it dies by a signal, and pdsh mixes up the ranks' codes."""
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
    """Sees that every rank goes on. Clocks of other processes are not read, only changes seen here."""

    def __init__(self, directory: Path, watch: SupervisorConfig, lifeline: Lifeline | None) -> None:
        self._lifeline = lifeline
        self._directory = directory
        self._watch = watch
        self._started = time.monotonic()
        self._seen: dict[Path, tuple[int, float]] = {}  # change time of the file, and when it was first seen

    def failed_rank(self) -> str | None:
        """A sentence about the first rank on any host that said why it ends, died, or fell silent."""
        return None if self._lifeline is None else self._lifeline.look()

    def report_exit(self) -> int:
        """The code other than 0 with which a rank has said that it ends; 0 where none has.

        The launcher's own may be that of a rank which only lost this one: it looks once a second.
        """
        if self._lifeline is not None:
            return self._lifeline.code or 0
        codes = (_read_beat(file).get("code") for file in sorted(self._directory.glob("rank_*")))
        return next(filter(None, codes), 0)

    def code_of_failure(self, failed: str, status_file: Path) -> int:
        """What a rank's end means: nothing, where the launcher ended it because another had come to a regular end."""
        code = None if self._lifeline is None else self._lifeline.code
        code = _exit_code(code or _CRASHED, status_file)
        if code not in (*_FINAL_CODES, EXIT_ROLLBACK):
            _log(failed)
        return code

    def stuck_rank(self) -> str | None:
        """A sentence about the first rank found stuck."""
        now = time.monotonic()
        for file in sorted(self._directory.glob("rank_*")):
            changed = file.stat().st_mtime_ns
            if self._seen.get(file, (None,))[0] != changed:
                self._seen[file] = (changed, now)
        if not self._seen and now - self._started > self._watch.start_seconds:
            return f"no rank has come to life for {self._watch.start_seconds:g} s"
        for file, (_, since) in self._seen.items():
            beat = _read_beat(file)
            is_slow = beat.get("doing") in (STARTING, FIRST_STEP)
            limit = self._watch.start_seconds if is_slow else self._watch.step_seconds
            if now - since > limit:
                return f"{file.name} has been {beat.get('doing')} at step {beat.get('step')} for {limit:g} s"
        return None

    def stacks(self) -> str:
        """The stacks of all ranks; on this machine of one that was stopped by a signal, too."""
        if self._lifeline is not None:
            self._lifeline.stacks()
        for file in self._seen:
            with suppress(ProcessLookupError, KeyError):
                os.kill(_read_beat(file)["pid"], STACKS_SIGNAL)
                os.kill(_read_beat(file)["pid"], signal.SIGCONT)
        stacks = self._settled_stacks()
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in stacks)

    def _settled_stacks(self) -> list[Path]:
        """The files in which the ranks answer, once they grow no more; a rank may have nothing to say."""
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


def end_group(process: subprocess.Popen, gently: bool = True) -> None:
    """Nothing of the launcher's session outlives it, whatever group it is in. Returns when all of it is gone."""
    if gently and process.poll() is None:
        process.terminate()  # lets the launcher end the ranks on other hosts
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)
    for _ in range(100):
        members = _session(process.pid)
        if not members:
            break
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(members, timeout=0.2)
    process.wait()


def _session(leader: int) -> list[psutil.Process]:
    members = []
    for candidate in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(candidate.pid) == leader and candidate.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(candidate)
    return members


def _log(text: str) -> None:
    with suppress(OSError):  # a log file on a full disk ends no run
        print(f"tinyllama-ds: {text}", file=sys.stderr, flush=True)
