"""How long a collective waits: long while ranks start, short while they train."""

import json
from datetime import timedelta

import torch
from forked import on_ranks

from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.train.engine import expect_steps, hard_exit, start_process_group


def print_timeouts() -> None:
    def seconds() -> float:
        return torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    world = read_world()
    start_process_group(world)
    at_start = seconds()
    expect_steps(world)
    print(json.dumps([at_start, seconds()]))
    hard_exit(0)


def test_the_start_may_take_longer_than_a_step() -> None:
    finished = on_ranks(print_timeouts, ranks=1)
    assert finished.returncode == 0, finished.stderr
    waits = [timedelta(seconds=value) for value in json.loads(finished.stdout.splitlines()[-1])]
    assert waits == [timedelta(minutes=30), timedelta(minutes=10)]
