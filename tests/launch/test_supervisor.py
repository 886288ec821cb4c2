"""What the supervisor makes of the ends of ranks."""

import subprocess
import sys

import pytest
from launching import TIMEOUT

from tinyllama_ds.errors import EXIT_NUMERICS, EXIT_REFUSED

# A launcher of two ranks which ends with the code of the one that only lost its peer, as DeepSpeed's may.
LAUNCHER = """
import sys
from tinyllama_ds.training.heartbeat import Heartbeat
first, second = Heartbeat(0), Heartbeat(1)
first.beat(3, "training")
second.beat(3, "training")
second.farewell({code})
sys.exit(1)
"""
PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from tinyllama_ds.launch.supervisor import RankSide, Started, Watch, supervise
from tinyllama_ds.training import faults, heartbeat

def launch(variables, directory):
    command = [sys.executable, "-c", {launcher!r}]
    process = subprocess.Popen(command, env=os.environ | variables, start_new_session=True)
    return Started(process, ["here", "here"], lambda host, group: None)

names = (heartbeat.SUPERVISOR_VARIABLE, heartbeat.HEARTBEAT_VARIABLE, faults.RESTART_VARIABLE,
         heartbeat.LIFELINE_VARIABLE)
watch = Watch(Path("status.json"), Path("stop"), lambda: (0, 0), 600, 600, None)
ended = supervise(launch, watch, None, RankSide(*names, heartbeat.STACKS_SIGNAL, (heartbeat.STARTING,)))
print(ended.code, ended.restarts)
"""


@pytest.mark.parametrize("code", [EXIT_NUMERICS, EXIT_REFUSED])
def test_a_rank_that_says_why_it_ends_is_believed_before_the_launcher(code: int, tmp_path: object) -> None:
    program = PROGRAM.format(launcher=LAUNCHER.format(code=code))
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert finished.stdout == f"{code} 0\n", finished.stderr
