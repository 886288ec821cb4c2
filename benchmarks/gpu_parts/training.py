"""The training step of TinyLlama-1.1B under three ZeRO files: rate, memory, and where a micro-step's time goes."""

import sys
from collections.abc import Iterator

from gpu_parts.common import CONFIGS, Part, part_of_arguments
from tinyllama_ds.benchmark.grid import Row, grid, measure_all
from tinyllama_ds.distributed.network import free_port
from tinyllama_ds.launch.launcher import MEASURE, Placement, launcher_environment
from tinyllama_ds.model.config import model_config

CONFIG_NAMES = ("zero3_keep", "zero3", "zero1")
SHAPES: dict[bool, dict[str, str | int | bool]] = {  # by whether it is rehearsed
    False: {"model": "tinyllama-1.1b", "sequence_length": 2048, "accumulation": 4, "steps": 8},
    True: {"model": "test", "sequence_length": 64, "accumulation": 2, "steps": 2},
}
MICRO_BATCH = {False: 8, True: 2}


def measured(part: Part) -> Iterator[Row]:
    """What `tinyllama-ds bench --compile on` measures, on one rank that is started here without a launcher."""
    shape = SHAPES[part.rehearse] | {"activation_checkpointing": 0, "activation_offloading": False}
    for name in CONFIG_NAMES:
        [setting] = grid([CONFIGS / f"{name}.json"], [MICRO_BATCH[part.rehearse]], ["auto"], [True])
        environment = launcher_environment(Placement(None, [], 1, on_cpu=part.rehearse))
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(free_port())
        yield from measure_all([setting | shape], lambda words: [sys.executable, "-m", MEASURE, *words], environment)


def report(part: Part, name: str, row: Row, flops: float) -> None:
    """Store a row's figures and print them in three lines."""
    put = part.figures.put
    if "error" in row:
        part.figures.check(f"{name}.ran", False, f"{name}: {row['error']}")
        return
    shape = model_config(str(row["model"]))
    rate = row["tokens_per_second"]
    share = rate * shape.flops_per_token(row["sequence_length"]) / flops
    put(f"{name}.measured", row)
    put(f"{name}.share_of_matmul", share)
    speed = f"{name:<11}{rate:>9,.0f} tokens/s, {share:.1%} of the matrix product, peak {row['peak_gib']:.2f} GiB"
    put(f"{name}.tokens_per_second", rate, f"{speed}, attention {row['attention']}")
    put(f"{name}.micro_step", *_micro_step(row))
    put(f"{name}.host_calls", *_host_calls(row))


def _micro_step(row: Row) -> tuple[dict[str, float], str]:
    """Milliseconds of one micro-step by kinds; the optimizer's are those of a whole step."""
    micro_steps, kernels = row["accumulation"], row["kernels"]
    milliseconds = {
        kind: 1000 * found["seconds"] / (1 if kind == "optimizer" else micro_steps)
        for kind, found in kernels["kinds"].items()
    }
    # Gaps are those of the steps that were timed: the profiler makes the host slower, and the kernels not.
    milliseconds["idle"] = 1000 * max(0.0, row["seconds"] - kernels["busy_seconds"]) / micro_steps
    counts = {kind: found["count"] for kind, found in kernels["kinds"].items()}
    whole = 1000 * row["seconds"] / micro_steps
    parts = [
        f"{kind} {value:.1f}" + (f" ({counts[kind]})" if kind in counts else "")
        for kind, value in milliseconds.items()
        if value
    ]
    return milliseconds, f"  of {whole:.1f} ms (kernels of a step): {', '.join(parts)}"


def _host_calls(row: Row) -> tuple[dict[str, int], str]:
    calls = row["kernels"]["host_calls"]
    said = ", ".join(f"{name} {count}" for name, count in calls.items()) or "none seen"
    return (
        calls,
        f"  per optimizer step of {row['accumulation']} micro-steps: {row['kernels']['count']:,} kernels; {said}",
    )


def main(part: Part) -> int:
    """One file after the other, each in a process of its own."""
    flops = part.matmul_flops()
    for name, row in zip(CONFIG_NAMES, measured(part), strict=True):
        print(name, row, flush=True)
        report(part, name, row, flops)
    return part.figures.end()


if __name__ == "__main__":
    sys.exit(main(part_of_arguments("training")))
