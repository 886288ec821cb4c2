"""How the supervisor reacts to the ends of ranks and of the wall time, with launchers of a few lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import on_ranks
from launching import Finished

from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, EXIT_NUMERICS, EXIT_RESTART
from tinyllama_ds.launch import out_of_memory
from tinyllama_ds.launch.supervisor import Job, SupervisorConfig, supervise

# Of two ranks, which ends with the code of the one that only lost its peer, as DeepSpeed's may.
LAUNCHER_WITH_A_REPORTED_CODE = """
import sys
from tinyllama_ds.health.heartbeat import Heartbeat
first, second = Heartbeat(0), Heartbeat(1)
first.beat(3, "training")
second.beat(3, "training")
second.report_exit({code})
sys.exit(1)
"""
LAUNCHER_THAT_STOPS = """
import json, time
from pathlib import Path
while not Path("stop").exists():
    time.sleep(0.01)
Path("status.json").write_text(json.dumps({"state": "stopped"}))
"""


LAUNCHER_THAT_DOES_NOT_END = """
import json, os, signal, time
from pathlib import Path
while not Path("stop").exists():
    time.sleep(0.01)
Path("status.json").write_text(json.dumps({{"state": "{state}"}}))
os.kill(os.getppid(), signal.SIGTERM)  # a second request
signal.pause()
"""
LAUNCHER_OF_A_ROLLBACK = """
import json, os
from pathlib import Path
state = "finished" if os.environ["TINYLLAMA_DS_RESTART"] == "1" else "rolled back"
Path("status.json").write_text(json.dumps({"state": state}))
"""
LAUNCHER_KILLED_BY_THE_KERNEL = """
import os, signal
from pathlib import Path
Path("memory.events").write_text("low 0\\noom_kill {kills}\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""


def supervise_here(launcher: str, folder: Path, max_seconds: float | None) -> None:
    """Prints exit code and restarts."""
    os.chdir(folder)
    out_of_memory._CGROUPS, out_of_memory._MOUNT = Path("cgroup"), folder  # counters written by the test

    def launch(variables: dict[str, str], _directory: Path) -> Job:
        command = [sys.executable, "-c", launcher]
        process = subprocess.Popen(command, env=os.environ | variables, start_new_session=True)
        return Job(process, ["here", "here"], lambda host, group: None)

    watch = SupervisorConfig(Path("status.json"), Path("stop"), lambda: (0, 0), 600, 600, max_seconds)
    ended = supervise(launch, watch, None)
    print(ended.code, ended.restarts)


def supervised(launcher: str, folder: Path, max_seconds: float | None = None, place: str = "") -> Finished:
    return on_ranks(supervise_here, launcher, folder, max_seconds, ranks=1, XDG_RUNTIME_DIR=place or str(folder))


@pytest.mark.parametrize("code", [EXIT_NUMERICS, EXIT_CONFIG])
def test_the_exit_code_of_a_rank_precedes_that_of_the_launcher(code: int, tmp_path: Path) -> None:
    finished = supervised(LAUNCHER_WITH_A_REPORTED_CODE.format(code=code), tmp_path)
    assert finished.stdout == f"{code} 0\n", finished.stderr


def test_it_gives_up_after_three_failures_without_a_new_checkpoint(tmp_path: Path) -> None:
    finished = supervised("raise SystemExit(5)", tmp_path)
    assert finished.stdout == "5 2\n", finished.stderr
    assert finished.stderr.count("at checkpoint 0; restarting in") == 2
    assert "giving up after 3 consecutive failures without a new checkpoint, the last with code 5" in finished.stderr


def test_a_rollback_is_not_a_failure_and_restarts_at_once(tmp_path: Path) -> None:
    finished = supervised(LAUNCHER_OF_A_ROLLBACK, tmp_path)
    assert finished.stdout == "0 1\n", finished.stderr
    assert "rolling back to checkpoint 0, excluding the samples of the spike" in finished.stderr
    assert "restarting in" not in finished.stderr


def test_the_end_of_the_wall_time_stops_the_ranks(tmp_path: Path) -> None:
    finished = supervised(LAUNCHER_THAT_STOPS, tmp_path, max_seconds=0.001)
    assert finished.stdout == f"{EXIT_RESTART} 0\n", finished.stderr
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        ("running", EXIT_RESTART, "the ranks did not stop in time; the last checkpoint is kept"),
        ("stopped", EXIT_RESTART, "the run has stopped, but not all of its processes had ended; they are killed"),
        ("finished", EXIT_FINISHED, "the run has finished, but not all of its processes had ended; they are killed"),
    ],
)
def test_ranks_that_do_not_end_are_killed_and_the_status_says_how_far_they_came(
    state: str, code: int, said: str, tmp_path: Path
) -> None:
    finished = supervised(LAUNCHER_THAT_DOES_NOT_END.format(state=state), tmp_path, max_seconds=0.001)
    assert finished.stdout == f"{code} 0\n", finished.stderr
    assert said in finished.stderr
    assert finished.stderr.count("tinyllama-ds: the r") == 1, finished.stderr


@pytest.mark.parametrize("version", ["0::/", "4:cpu,memory:/"])
def test_a_run_ended_by_the_out_of_memory_killer_is_not_restarted(version: str, tmp_path: Path) -> None:
    """It would need as much again. The counters are those of cgroup v2 and v1."""
    (tmp_path / "cgroup").write_text(f"1:name=systemd:/\n{version}\n")
    if "memory" in version:
        (tmp_path / "memory").mkdir()
        (tmp_path / "memory" / "memory.oom_control").symlink_to(tmp_path / "memory.events")
    (tmp_path / "memory.events").write_text("low 0\noom_kill 7\n")
    finished = supervised(LAUNCHER_KILLED_BY_THE_KERNEL.format(kills=8), tmp_path)
    assert finished.stdout == f"{EXIT_CONFIG} 0\n", finished.stderr
    assert "the kernel's out-of-memory killer has ended a process on this machine" in finished.stderr


def test_any_other_kill_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "memory.events").write_text("oom_kill 7\n")
    finished = supervised(LAUNCHER_KILLED_BY_THE_KERNEL.format(kills=7), tmp_path)
    assert finished.stdout == "137 2\n", finished.stderr
    assert "out-of-memory killer" not in finished.stderr


def test_files_that_cannot_be_created_or_removed_are_a_failure(tmp_path: Path) -> None:
    """No directory for the supervisor's files; a stop file and a status that cannot be removed."""
    (tmp_path / "file").touch()
    finished = supervised("raise SystemExit(5)", tmp_path, place=str(tmp_path / "file"))
    assert finished.stdout == "1 2\n", finished.stderr
    assert "the run cannot be started or watched: [Errno 20] Not a directory" in finished.stderr
    assert "Traceback" not in finished.stderr
    (tmp_path / "stop").mkdir()
    assert supervised(LAUNCHER_WITH_A_REPORTED_CODE.format(code=78), tmp_path).stdout == "78 0\n"
