"""What the plan's benchmarks share: DeepSpeed files at a small size, ranks as processes, hosts as namespaces."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

from tinyllama_ds.distributed.network import free_port

ROOT = Path(__file__).parents[1]
_BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
_NETWORK, _INTERFACE = "10.79.0", "e0"


def deepspeed_config(name: str, micro_batch: int, accumulation: int, **zero: int) -> dict:
    """A file of ds_configs/ with small buckets, the values of `zero`, and the comms logger."""
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    section = config["zero_optimization"]
    section |= {key: 500_000 for key in _BUCKETS if key in section}
    section |= {key: value for key, value in zero.items() if key in section}
    keep = ("gradient_clipping", "bf16", "data_types", "optimizer", "zero_optimization")
    return {key: config[key] for key in keep if key in config} | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "timers": {"throughput": {"enabled": False}},
        "comms_logger": {"enabled": True, "prof_all": True, "verbose": False},
    }


def run_ranks(setting: dict, ranks: int, output: Path, is_on_namespaces: bool = False) -> list[dict]:
    """Start plan_probe.py on every rank, one thread each, and return what each wrote."""
    output.mkdir(parents=True, exist_ok=True)
    port, processes = free_port(), []
    for rank in range(ranks):
        places: dict[str, str | int] = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        places |= {"LOCAL_RANK": 0 if is_on_namespaces else rank, "LOCAL_SIZE": 1 if is_on_namespaces else ranks}
        command = [sys.executable, str(ROOT / "benchmarks" / "plan_probe.py"), json.dumps(setting), str(output)]
        address = "127.0.0.1"
        if is_on_namespaces:
            command, address = ["ip", "netns", "exec", host_name(rank), *command], f"{_NETWORK}.1"
            places["GLOO_SOCKET_IFNAME"] = _INTERFACE
        environment = os.environ | {key: str(value) for key, value in places.items()} | {"MASTER_ADDR": address}
        with open(output / f"rank_{rank}.log", "w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    _wait(processes, output)
    return [json.loads((output / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


def _wait(processes: list[subprocess.Popen], output: Path) -> None:
    """Until all have ended well; the first that fails takes the others with it."""
    try:
        while any(process.poll() is None for process in processes):
            for rank, process in enumerate(processes):
                if process.poll():
                    raise RuntimeError(f"rank {rank} failed: {(output / f'rank_{rank}.log').read_text()[-2000:]}")
            sleep(0.05)
    finally:
        for process in processes:
            process.kill()


def host_name(rank: int) -> str:
    """The namespace of a rank. It carries this process's id, so that two measurements on one machine do not meet."""
    return f"tlp{os.getpid()}h{rank + 1}"


@contextmanager
def namespaces(count: int) -> Iterator[None]:
    """Hosts on one machine: namespaces with an address each on one bridge. Needs root and iproute2."""
    bridge = f"tlp{os.getpid()}b"
    _ip("link", "add", bridge, "type", "bridge")
    try:
        _ip("link", "set", bridge, "up")
        for rank in range(count):
            name, outside = host_name(rank), f"tlp{os.getpid()}v{rank + 1}"
            _ip("netns", "add", name)
            _ip("link", "add", outside, "type", "veth", "peer", "name", _INTERFACE, "netns", name)
            _ip("link", "set", outside, "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{_NETWORK}.{rank + 1}/24", "dev", _INTERFACE)
            for interface in (_INTERFACE, "lo"):
                _ip("-n", name, "link", "set", interface, "up")
            # What a host is set to may be BBR, which takes tens of round trips to find a short flow's rate.
            setting = "net.ipv4.tcp_congestion_control=reno"
            subprocess.run(["ip", "netns", "exec", name, "sysctl", "-qw", setting], check=True)
        yield
    finally:
        for rank in range(count):  # the link first: a namespace lives on for a moment after it is deleted
            for thing in (["link", "del", f"tlp{os.getpid()}v{rank + 1}"], ["netns", "del", host_name(rank)]):
                subprocess.run(["ip", *thing], check=False, capture_output=True)
        _ip("link", "del", bridge)


def throttle(count: int, mbit: float) -> None:
    """Let every host send so many Mbit/s, headers included, and no more; 50 ms of it may wait in the queue."""
    # Bytes, 1 ms: half of it could not fill a gigabit (571 Mbit/s of a stream), and 4 ms let every collective that
    # follows a pause send its first 500 KB at once, which is half of one.
    burst = max(64_000, int(mbit * 1e6 / 8 * 0.001))
    limit = ["tbf", "rate", f"{mbit:g}mbit", "burst", str(burst), "latency", "50ms"]
    for rank in range(count):
        inside = ["ip", "netns", "exec", host_name(rank)]
        subprocess.run([*inside, "tc", "qdisc", "replace", "dev", _INTERFACE, "root", *limit], check=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
