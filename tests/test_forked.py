"""What `forked` promises to tests: nothing imported twice, and nothing left from one run to the next."""

import os
import signal
import sys
import threading

import pytest
import torch.distributed as dist
from forked import on_ranks, tinyllama_ds

from tinyllama_ds.errors import EXIT_CONFIG


def look_around() -> None:
    """Collective. Prints what was there at the beginning."""
    found = ["deepspeed" in sys.modules, dist.is_initialized(), threading.active_count(), os.environ.get("LEFT")]
    os.environ["LEFT"] = "behind"
    dist.init_process_group("gloo")
    os.write(1, f"{found} {dist.get_world_size()}\n".encode())  # at once, beside the other ranks
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_begins_with_the_imports_alone(ranks: int) -> None:
    finished = on_ranks(look_around, ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [f"[True, False, 1, None] {ranks}"] * ranks


def fail_on_rank_1() -> None:
    """Rank 0 waits for it in a collective."""
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    signal.pause()


def test_a_rank_that_fails_ends_the_others() -> None:
    assert on_ranks(fail_on_rank_1, ranks=2).returncode in (-signal.SIGKILL, 1)


def test_a_command_has_its_own_exit_code_and_output() -> None:
    finished = tinyllama_ds("export", "nowhere", "folder")
    assert (finished.returncode, finished.stdout) == (EXIT_CONFIG, "")
    assert finished.stderr.startswith("tinyllama-ds: ")
