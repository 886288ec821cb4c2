"""Parts of `on_gpu.py` that end in every way, for its tests: python -m parts_for_tests, and the way."""

import subprocess
import sys
import time

from gpu_parts.common import part_of_arguments

way = sys.argv.pop(1)
part = part_of_arguments(way)
part.figures.put("before", 1, f"{way} has begun")
if way == "crashing":
    raise ValueError("as ordered")
if way == "endless":
    # What it leaves behind is in a session of its own, as the launcher of a training is, and is nobody's child.
    found = subprocess.run(
        ["sh", "-c", "setsid sleep 1000000 >&2 & echo $!"], stdout=subprocess.PIPE, text=True, check=True
    )
    part.figures.put("pids", [int(found.stdout), subprocess.Popen(["sleep", "1000000"]).pid])
    time.sleep(10**6)
part.figures.check("verdict", way != "failing", f"{way} is good")
sys.exit(part.figures.end())
