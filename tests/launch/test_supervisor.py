"""What the supervisor makes of the ends of ranks, and of the end of its time: with a launcher of a few lines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import on_ranks
from launching import Finished

from tinyllama_ds.errors import EXIT_NUMERICS, EXIT_REFUSED, EXIT_RESTART
from tinyllama_ds.launch.supervisor import RankSide, Started, Watch, supervise
from tinyllama_ds.training import faults, heartbeat

# Of two ranks, which ends with the code of the one that only lost its peer, as DeepSpeed's may.
LAUNCHER_OF_ONE_THAT_SAYS_WHY = """
import sys
from tinyllama_ds.training.heartbeat import Heartbeat
first, second = Heartbeat(0), Heartbeat(1)
first.beat(3, "training")
second.beat(3, "training")
second.farewell({code})
sys.exit(1)
"""
LAUNCHER_THAT_HEEDS_A_STOP = """
import json, time
from pathlib import Path
while not Path("stop").exists():
    time.sleep(0.01)
Path("status.json").write_text(json.dumps({"state": "stopped"}))
"""


LAUNCHER_OF_A_ROLLBACK = """
import json, os
from pathlib import Path
state = "finished" if os.environ["TINYLLAMA_DS_RESTART"] == "1" else "rolled back"
Path("status.json").write_text(json.dumps({"state": state}))
"""


def supervise_here(launcher: str, folder: Path, max_seconds: float | None) -> None:
    """Prints exit code and restarts."""
    os.chdir(folder)

    def launch(variables: dict[str, str], _directory: Path) -> Started:
        command = [sys.executable, "-c", launcher]
        process = subprocess.Popen(command, env=os.environ | variables, start_new_session=True)
        return Started(process, ["here", "here"], lambda host, group: None)

    names = (heartbeat.SUPERVISOR_VARIABLE, heartbeat.HEARTBEAT_VARIABLE, faults.RESTART_VARIABLE)
    ranks = RankSide(*names, heartbeat.LIFELINE_VARIABLE, heartbeat.STACKS_SIGNAL, (heartbeat.STARTING,))
    watch = Watch(Path("status.json"), Path("stop"), lambda: (0, 0), 600, 600, max_seconds)
    ended = supervise(launch, watch, None, ranks)
    print(ended.code, ended.restarts)


def supervised(launcher: str, folder: Path, max_seconds: float | None = None) -> Finished:
    return on_ranks(supervise_here, launcher, folder, max_seconds, ranks=1)


@pytest.mark.parametrize("code", [EXIT_NUMERICS, EXIT_REFUSED])
def test_a_rank_that_says_why_it_ends_is_believed_before_the_launcher(code: int, tmp_path: Path) -> None:
    finished = supervised(LAUNCHER_OF_ONE_THAT_SAYS_WHY.format(code=code), tmp_path)
    assert finished.stdout == f"{code} 0\n", finished.stderr


def test_it_gives_up_after_three_failures_without_a_new_checkpoint(tmp_path: Path) -> None:
    finished = supervised("raise SystemExit(5)", tmp_path)
    assert finished.stdout == "5 2\n", finished.stderr
    assert finished.stderr.count("at checkpoint 0; starting it again") == 2
    assert "given up: 3 failures in a row without a new checkpoint, the last with code 5" in finished.stderr


def test_a_rollback_is_no_failure_and_starts_at_once(tmp_path: Path) -> None:
    finished = supervised(LAUNCHER_OF_A_ROLLBACK, tmp_path)
    assert finished.stdout == "0 1\n", finished.stderr
    assert "going back to checkpoint 0, without the samples of the spike" in finished.stderr
    assert "starting it again" not in finished.stderr


def test_wall_time_asks_the_ranks_to_stop(tmp_path: Path) -> None:
    finished = supervised(LAUNCHER_THAT_HEEDS_A_STOP, tmp_path, max_seconds=0.001)
    assert finished.stdout == f"{EXIT_RESTART} 0\n", finished.stderr
    assert not (tmp_path / "stop").exists()
