"""TinyLlama-1.1B on sequences of 32k and 128k tokens, recomputed, block inputs on the GPU or offloaded: rate, memory.

Rehearsed without offloading: on a CPU the inputs are in host memory already.
"""

import sys
from pathlib import Path

from gpu_parts.common import CONFIGS, Part, part_of_arguments
from tinyllama_ds.benchmark.grid import Row, grid, measure_all
from tinyllama_ds.config.deepspeed import load_deepspeed_config
from tinyllama_ds.distributed.network import free_port
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.launch.launcher import MEASURE, Placement, launcher_environment
from tinyllama_ds.model.config import model_config
from tinyllama_ds.planning.activations import Work
from tinyllama_ds.planning.layout import read_layout
from tinyllama_ds.planning.memory import memory_of
from tinyllama_ds.planning.timing import executed_flops

CONFIG = "zero3_keep"
SETTINGS = {  # tokens and whether block inputs are offloaded, by whether it is rehearsed
    False: [(32_768, False), (32_768, True), (131_072, False), (131_072, True)],
    True: [(128, False)],
}
MODEL = {False: "tinyllama-1.1b", True: "test"}
STEPS = 2


def measured(part: Part, tokens: int, offloads: bool) -> Row:
    """What `tinyllama-ds bench` measures, on one rank that is started here without a launcher."""
    compiled = not part.rehearse
    [setting] = grid([CONFIGS / f"{CONFIG}.json"], [1], ["auto"], [compiled])
    setting |= {"model": MODEL[part.rehearse], "sequence_length": tokens, "accumulation": 1, "steps": STEPS}
    setting |= {"activation_checkpointing": 1, "activation_offloading": offloads}
    environment = launcher_environment(Placement(None, [], 1, on_cpu=part.rehearse))
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    [row] = measure_all([setting], lambda words: [sys.executable, "-m", MEASURE, *words], environment)
    return row


def planned_gib(part: Part, tokens: int, offloads: bool) -> float:
    """The plan's peak of all tensors, without allocator and context."""
    config = load_deepspeed_config(Path(CONFIGS / f"{CONFIG}.json")) | {"bf16": {"enabled": True}}
    work = Work(1, tokens, recompute_every=1, is_compiled=True, offloads_activations=offloads)
    return memory_of(model_config(MODEL[part.rehearse]), read_layout(config, CONFIG, 1), work, 1).allocated / GIB


def report(part: Part, tokens: int, offloads: bool, row: Row, flops: float) -> None:
    """Store a row's figures and print them in a line."""
    name = f"{tokens}{'.offloaded' if offloads else ''}"
    if "error" in row:
        part.figures.check(f"{name}.ran", False, f"{name}: {row['error']}")
        return
    executed = executed_flops(model_config(MODEL[part.rehearse]), tokens)
    share = row["tokens_per_second"] * executed * 4 / 3 / flops  # a third of it is computed twice
    planned = planned_gib(part, tokens, offloads)
    part.figures.put(f"{name}.measured", row)
    part.figures.put(f"{name}.planned_gib", planned)
    text = f"{tokens:,} tokens{', inputs offloaded' if offloads else ''}: {row['tokens_per_second']:,.0f} tokens/s,"
    text += f" {share:.1%} of the matrix product with what is recomputed, peak {row['peak_gib']:.2f} GiB"
    part.figures.put(f"{name}.share_of_matmul", share, f"{text} (plan {planned:.2f}), attention {row['attention']}")


def main(part: Part) -> int:
    """One setting after the other, each in a process of its own."""
    flops = part.matmul_flops()
    for tokens, offloads in SETTINGS[part.rehearse]:
        row = measured(part, tokens, offloads)
        print(tokens, offloads, row, flush=True)
        report(part, tokens, offloads, row, flops)
    return part.figures.end()


if __name__ == "__main__":
    sys.exit(main(part_of_arguments("long_context")))
