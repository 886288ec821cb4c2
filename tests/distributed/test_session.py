"""A command's session of processes: nothing of it is left, however the command ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tinyllama_ds.distributed.session import run_in_session

# A launcher whose rank is in a process group of its own and ignores SIGTERM; both report their ids.
LAUNCHER = """
import os, signal, subprocess, sys, time
rank = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
rank += "print(os.getpid(), flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", rank], process_group=0)
print(os.getpid(), flush=True)
time.sleep(600)
"""
# A background job ignores SIGINT, and so would what it starts.
COMMAND = """
import signal, sys, tempfile
from tinyllama_ds.distributed.session import run_in_session
signal.signal(signal.SIGINT, signal.default_int_handler)
with tempfile.TemporaryDirectory(dir=sys.argv[1]):
    run_in_session([sys.executable, "-c", sys.argv[2]], {})
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_ends_every_process_and_removes_temporary_files(tmp_path: Path, number: signal.Signals) -> None:
    arguments = [sys.executable, "-c", COMMAND, str(tmp_path), LAUNCHER]
    command = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert command.stdout is not None
    members = [psutil.Process(int(command.stdout.readline())) for _ in range(2)]
    assert len(list(tmp_path.iterdir())) == 1
    command.send_signal(number)
    code = command.wait(60)
    command.stdout.close()
    assert code == (-number if number == signal.SIGINT else 128 + number)
    assert not [member for member in members if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.iterdir())


def test_exit_code_and_stderr(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w+") as stderr:
        code = run_in_session(
            [sys.executable, "-c", "import sys; print('unread'); sys.exit('reason')"], dict(os.environ), stderr
        )
        stderr.seek(0)
        assert (code, stderr.read()) == (1, "reason\n")


def test_processes_that_outlive_the_command_are_ended(tmp_path: Path) -> None:
    left = f"import subprocess; print(subprocess.Popen(['sleep', '600']).pid, file=open('{tmp_path}/pid', 'w'))"
    assert run_in_session([sys.executable, "-c", left], dict(os.environ)) == 0
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_handlers_are_restored_and_nohup_is_kept() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seen = "import signal, sys; sys.exit(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
        assert run_in_session([sys.executable, "-c", seen], dict(os.environ)) == 1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
