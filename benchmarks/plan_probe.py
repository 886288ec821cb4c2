"""One rank of a measured training step: what it holds, which collectives it calls, what it sends, how long it takes.

    RANK=0 WORLD_SIZE=1 python benchmarks/plan_probe.py '{"config": {...}, "model": {...}, ...}' OUT_DIRECTORY

Started by plan_memory.py and network_plan.py; writes OUT_DIRECTORY/rank_N.json. Nothing of DeepSpeed is replaced: live
tensors are found by walking Python's objects, the peak by PyTorch's profiler, which sees every allocation of the CPU
allocator, collectives by DeepSpeed's own comms logger, bytes on the wire by the kernel's interface counters.
"""

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from ctypes import CDLL
from dataclasses import replace
from itertools import pairwise, repeat
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.distributed.world import DistributedInfo, read_world
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.train.batches import Batch
from tinyllama_ds.train.compile import compile_blocks
from tinyllama_ds.train.engine import hard_exit, sequence_parallel_group, start_process_group, wrap
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import train_step

WARMUP_STEPS = 2  # the optimizer's state, and ZeRO-3's recording of the order of modules
_MASTERS = ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups",
            "fp32_groups", "fp32_groups_flat")  # fmt: skip
_GRADIENTS = ("grad_partitions_flat_buffer", "fp32_groups_gradients_flat", "averaged_gradients", "all_grad_tensors")


def tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists and dicts."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        yield from (tensor for value in thing.values() for tensor in tensors_in(value))
    elif isinstance(thing, list | tuple):
        yield from (tensor for value in thing for tensor in tensors_in(value))


def bytes_by_kind(engine: Any, before: set[int]) -> dict[str, int]:
    """Bytes of all live tensors that are not among `before`, each storage once, by what they are for."""
    optimizer = engine.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state
    parameters = list(engine.module.parameters())
    shards = [getattr(p, name, None) for p in parameters for name in ("ds_tensor", "ds_secondary_tensor")]
    kinds = {
        "optimizer": [list(states.keys()), list(states.values()), [getattr(optimizer, name, []) for name in _MASTERS]],
        "weights": [parameters, shards],
        "gradients": [[p.grad for p in parameters], [getattr(optimizer, name, []) for name in _GRADIENTS]],
        "buckets": [[vars(bucket) for bucket in getattr(optimizer, "ipg_buckets", {}).values()]],
        "other": [[thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]],
    }
    seen, sizes = set(before), {}
    for kind, things in kinds.items():
        sizes[kind] = 0
        for tensor in tensors_in(things):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and storage.nbytes():
                seen.add(storage.data_ptr())
                sizes[kind] += storage.nbytes()
    return sizes


def random_batches(engine: Any, rows: int, length: int, world: DistributedInfo) -> Iterator[Batch]:
    """The same one for ever."""
    tokens = torch.randint(engine.module.config.vocab_size, (rows, length + 1))
    return repeat(Batch(tokens, own=world.own_tokens(length)))


def reset_resident_peak() -> int:
    """Give unused memory back to the kernel, whose record of the peak starts again; returns the resident bytes."""
    gc.collect()
    CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """A figure of this process that the kernel keeps."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


def sent_bytes(interface: str | None) -> int:
    """What an interface has sent since it is up, headers included."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text()) if interface else 0


def peak_bytes(profiler: torch.profiler.profile, trace: Path) -> dict[str, int]:
    """The most that PyTorch's CPU allocator held in measured micro-batches, and in measured optimizer steps."""
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    trace.unlink()
    steps = [event for event in events if event.get("name") == "optimizer step" and "dur" in event]
    start = steps[WARMUP_STEPS - 1]["ts"] + steps[WARMUP_STEPS - 1]["dur"]
    allocations = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    peaks = {"micro_batches": 0, "optimizer_step": 0}
    for event in allocations:
        if event["ts"] > start:
            in_step = any(step["ts"] <= event["ts"] <= step["ts"] + step["dur"] for step in steps[WARMUP_STEPS:])
            part = "optimizer_step" if in_step else "micro_batches"
            peaks[part] = max(peaks[part], event["args"]["Total Allocated"])
    return peaks


def main(setting: dict, output: Path) -> None:
    """Build, warm up, measure `steps` steps, write."""
    torch.set_num_threads(1)
    world = replace(read_world(), sequence_parallel=setting.get("sequence_parallel", 1))
    start_process_group(world)
    import deepspeed

    before = {t.untyped_storage().data_ptr() for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profiler if setting["profile"] else nullcontext():
        model = build_model(LlamaConfig(**setting["model"]), setting["attention"], 1, setting["recompute"])
        if setting["compile"]:
            compile_blocks(model)
        if world.sequence_parallel > 1:
            model.split_sequences(sequence_parallel_group(world))
        engine = wrap(model, setting["config"], 1.0)
        T, micro, steps = setting["sequence"], setting["micro_batch"], setting["steps"]
        batches = random_batches(engine, micro, T, world)
        batch = micro * setting["accumulation"] * world.data_size
        step, clock = Step(0, "probe", 0, batch, 0, batch * T), PhaseClock(world.device)
        held = spy_on_steps(engine, before)
        warmup = random_batches(engine, micro, setting.get("warmup_sequence", T), world)
        for _ in range(WARMUP_STEPS):
            train_step(engine, step, warmup, micro, world, clock)
        clock.read()
        logger = deepspeed.comm.comms_logger
        logger.comms_dict.clear()
        dist.barrier()
        sent, resident, ends = sent_bytes(setting.get("interface")), reset_resident_peak(), [perf_counter()]
        for _ in range(steps):
            train_step(engine, step, batches, micro, world, clock)
            ends.append(perf_counter())
        dist.barrier()
        # The fastest is the one that other work disturbed least.
        found: dict[str, Any] = {"fastest": min(end - begin for begin, end in pairwise(ends))}
        found["sent"] = (sent_bytes(setting.get("interface")) - sent) / steps
        found["phases"] = {name: seconds / steps for name, seconds in clock.read().items()}
        found["collectives"] = {
            name.split(" ")[0]: sum(size * figures[0] for size, figures in sizes.items()) / steps
            for name, sizes in logger.comms_dict.items()
        }
        found["resident_growth"] = status_bytes("VmHWM") - resident
        found["between_steps"] = bytes_by_kind(engine, before)
        found["before_step"] = held
    if setting["profile"]:
        found["peak"] = peak_bytes(profiler, output / f"trace_{world.rank}.json")
    (output / f"rank_{world.rank}.json").write_text(json.dumps(found))
    hard_exit(0)


def spy_on_steps(engine: Any, before: set[int]) -> dict[str, int]:
    """Mark the optimizer's steps in the profile; what is held just before the first of them is in the dict returned."""
    held: dict[str, int] = {}
    original = engine.step

    def step() -> None:
        if not engine.is_gradient_accumulation_boundary():
            return original()
        if not held and engine.global_steps:
            held.update(bytes_by_kind(engine, before))
        with torch.profiler.record_function("optimizer step"):
            return original()

    engine.step = step
    return held


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
