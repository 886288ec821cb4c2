"""How fast the ranks add up a tensor: the bandwidth that decides about ZeRO layouts."""

import json
import statistics
import time

import torch
import torch.distributed as dist

from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.errors import EXIT_FINISHED
from tinyllama_ds.health.heartbeat import Heartbeat
from tinyllama_ds.train.engine import start_process_group

ANSWER = "all-reduce: "  # what rank 0's line begins with
_BYTES = 64 * 2**20
_TIMES = 5


def main() -> int:
    """Measure over all ranks; rank 0 prints the result. Collective."""
    world = read_world()
    heartbeat = Heartbeat(world.rank)
    start_process_group(world)
    tensor = torch.ones(_BYTES // 4, device=world.device)
    dist.all_reduce(tensor)  # connects
    seconds = []
    for _ in range(_TIMES):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if world.is_rank0:
        rate = _BYTES / statistics.median(seconds)
        # Each rank sends and receives 2 (n - 1) / n of the tensor: what NCCL's tests call bus bandwidth.
        result = {"ranks": world.size, "bytes_per_second": rate * 2 * (world.size - 1) / world.size}
        print(f"{ANSWER}{json.dumps(result)}", flush=True)
    dist.destroy_process_group()
    heartbeat.report_exit(EXIT_FINISHED)
    return EXIT_FINISHED
