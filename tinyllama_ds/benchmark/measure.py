"""One measurement of the training step: random tokens, the real engine, the real step, no data and no run directory."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from tinyllama_ds.benchmark.kernels import break_down
from tinyllama_ds.config.deepspeed import (
    AutoValues,
    computes_in_16_bit,
    load_deepspeed_config,
    resolve_deepspeed_config,
    split_off_our_sections,
    weights_dtype,
)
from tinyllama_ds.config.run_plan import Step, check_offloading
from tinyllama_ds.distributed.world import DistributedInfo, read_world
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, ConfigError, log
from tinyllama_ds.model.attention import Demands, Device, capability_of, resolve_attention_backend
from tinyllama_ds.model.config import model_config
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.train.batches import Batch
from tinyllama_ds.train.compile import compile_blocks
from tinyllama_ds.train.engine import start_process_group, supports_fast_bf16, wrap
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import train_step
from tinyllama_ds.train.utilization import measured_together, memory_bytes, peak_flops, utilisation

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_WARMUP_STEPS = 2  # compilation, and ZeRO-3's recording of the order of modules


@dataclass(frozen=True)
class Setting:
    """What is measured: a model under a DeepSpeed config, a micro-batch, an attention backend, compiled or not."""

    deepspeed_config: Path
    micro_batch: int
    attention: str
    compile: bool
    activation_checkpointing: int
    activation_offloading: bool
    model: str
    sequence_length: int
    accumulation: int  # micro-batches per step
    steps: int  # that are measured


def measure(setting: Setting) -> dict:
    """Run the step under the deepspeed launcher; returns the metrics of rank 0. Collective.

    Rates are over all ranks; `mfu` is against the spec sheet if there is one, `measured_mfu` against a matrix
    product in the same processes, each null where the step was faster than what was measured; seconds are per optimizer
    step, and so is `kernels` (`kernels.summarize`).
    """
    world = read_world()
    config, sequence_length = model_config(setting.model), setting.sequence_length
    bf16 = supports_fast_bf16(world.device)
    raw = load_deepspeed_config(setting.deepspeed_config)
    batch = setting.micro_batch * setting.accumulation * world.size
    values = AutoValues(setting.micro_batch, batch, world.size, 1000, config.hidden_size, bf16)
    resolved = resolve_deepspeed_config(raw, setting.deepspeed_config, values)
    start_process_group(world)
    device, demands = Device(world.device.type, capability_of(world.device)), Demands(computes_in_16_bit(resolved))
    attention = resolve_attention_backend(setting.attention, device, demands)
    dtype = getattr(torch, weights_dtype(resolved))
    recompute_every = setting.activation_checkpointing
    decoder = build_model(config, attention.backend, 1, recompute_every, world.device, dtype)
    if setting.activation_offloading:
        check_offloading(recompute_every, world.device.type)
        decoder.offload_activations()
    if setting.compile:
        compile_blocks(decoder)
    engine_config, _ = split_off_our_sections(resolved)
    engine = wrap(decoder, {"timers": {"throughput": {"enabled": False}}} | engine_config, 1.0)
    micro = Batch(torch.randint(config.vocab_size, (setting.micro_batch, sequence_length + 1)))
    step = Step(0, "bench", 0, batch, 0, batch * sequence_length)
    run_step = partial(train_step, engine, step, repeat(micro), setting.micro_batch, world)
    timed = _time_steps(run_step, world, setting.steps)
    flops = step.tokens_after * config.flops_per_token(sequence_length)
    metrics = _metrics(engine, world, step.tokens_after, flops, timed)
    profiled = _profile_step(run_step, world)
    communication = profiled["kinds"]["collectives"]["seconds"]
    return metrics | {"attention": attention.backend, "seconds_communication": communication, "kernels": profiled}


def _time_steps(run_step: Callable[[PhaseClock], object], world: DistributedInfo, steps: int) -> dict[str, float]:
    """Seconds of one step as a whole and by phase, averaged over `steps` after the warmup."""
    clock = PhaseClock(world.device)
    for _ in range(_WARMUP_STEPS):
        run_step(clock)
    _wait(world)
    clock.read()
    started = perf_counter()
    for _ in range(steps):
        run_step(clock)
    _wait(world)
    whole = (perf_counter() - started) / steps
    return {"seconds": whole} | {f"seconds_{name}": seconds / steps for name, seconds in clock.read().items()}


def _metrics(
    engine: "DeepSpeedEngine", world: DistributedInfo, tokens: int, flops: float, timed: dict[str, float]
) -> dict:
    """Of a step of all ranks: its tokens, its FLOPs and its seconds."""
    memory = memory_bytes(world.device)  # before the matrix products below take some, too
    dtype = next(engine.module.parameters()).dtype
    peak, origin = peak_flops(world.device, dtype, world.size)
    measured = measured_together(world.device, dtype, world.size)
    if world.device.type == "cpu":  # where that is the peak: the better one
        peak = measured = max(peak, measured)
    rate = flops / timed["seconds"] / world.size
    return timed | {
        "tokens_per_second": tokens / timed["seconds"],
        "mfu": utilisation(rate, peak),
        "peak_from": origin,
        "measured_mfu": utilisation(rate, measured),
        "measured_peak_tflops": measured / 1e12,
        "peak_gib": memory / 2**30,
        "ranks": world.size,
    }


def _profile_step(run_step: Callable[[PhaseClock], object], world: DistributedInfo) -> dict:
    """One more step by kinds of kernels, overlapped or not, as PyTorch's profiler saw them on rank 0."""
    on_gpu = world.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        run_step(PhaseClock(world.device))
        if on_gpu:
            torch.cuda.synchronize()
    _wait(world)
    return break_down(profiler)


def _wait(world: DistributedInfo) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    torch.distributed.barrier()


def main(setting: Setting, output: Path) -> int:
    """Measure, and let rank 0 write the metrics to a file; returns the exit code."""
    try:
        metrics = measure(setting)
    except ConfigError as error:
        log(error)
        return EXIT_CONFIG
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(metrics) + "\n")
    torch.distributed.destroy_process_group()
    return EXIT_FINISHED
