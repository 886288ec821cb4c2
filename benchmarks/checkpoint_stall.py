"""The training stall of a checkpoint save, and what the background write costs the steps.

    python benchmarks/checkpoint_stall.py --json benchmarks/results/checkpoint_stall.json

Two ranks train tinyllama-120m under ZeRO-3, which gives a rank 0.8 GB of state: as much as each of 16 ranks has of
tinyllama-1.1b. They save some times the way `pretrain` does (`checkpoint/save.py`), and then with the writing waited
for, which is what a synchronous save would cost. Everything is real but the tokens, which are random.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from itertools import count, repeat
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from tinyllama_ds.checkpoint.format import Health, Progress
from tinyllama_ds.checkpoint.retention import Retention
from tinyllama_ds.checkpoint.save import Save, Saver, SaveSettings
from tinyllama_ds.checkpoint.staging import HostStateBuffer
from tinyllama_ds.commands.arguments import Parser, output_file, output_folder
from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.health.guard import check_parameters
from tinyllama_ds.model.config import model_config
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.train.batches import Batch
from tinyllama_ds.train.engine import start_process_group, wrap
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import train_step

if TYPE_CHECKING:
    pass

T, MICRO_BATCH, RANKS = 256, 1, 2
SAVES = 4  # of each kind; the first one has to make its host memory
CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero3.json"


class Trainer:
    """An engine that takes steps, each timed."""

    def __init__(self, model: str) -> None:
        self.world = read_world()
        start_process_group(self.world)
        self.model = model_config(model)
        config = json.loads(CONFIG.read_text())
        zero = config["zero_optimization"] | {"reduce_bucket_size": 10_000_000}
        keep = {key: config[key] for key in ("gradient_clipping", "bf16", "data_types", "optimizer")}
        timers = {"timers": {"throughput": {"enabled": False}}}
        batch = {"train_micro_batch_size_per_gpu": MICRO_BATCH, "gradient_accumulation_steps": 1}
        self.engine = wrap(build_model(self.model, "sdpa", 1), keep | timers | batch | {"zero_optimization": zero}, 1.0)
        self.tokens = torch.randint(self.model.vocab_size, (MICRO_BATCH, T + 1))
        self.numbers = count()

    def step(self) -> float:
        """Seconds of one optimizer step."""
        started = perf_counter()
        batch = MICRO_BATCH * self.world.size
        step = Step(next(self.numbers), "bench", 0, batch, 0, batch * T)
        train_step(
            self.engine, step, repeat(Batch(self.tokens)), MICRO_BATCH, self.world, PhaseClock(self.world.device)
        )
        dist.barrier()
        return perf_counter() - started


def measure(run_dir: Path, model: str) -> dict:
    """All figures, of rank 0. Collective."""
    trainer = Trainer(model)
    quiet = [trainer.step() for _ in range(6)][2:]
    started = perf_counter()
    check_parameters(trainer.engine)
    check_seconds = perf_counter() - started
    saves: list[Save] = []
    settings = SaveSettings(run_dir, Retention(2, 10**15), 1e9, trainer.model, {})
    saver = Saver(settings, trainer.world, saves.append)
    while_writing = [seconds for _ in range(SAVES) for seconds in save_behind(trainer, saver, saves)]
    quiet += [trainer.step() for _ in range(4)]
    for number in range(SAVES, 2 * SAVES):
        saver.save(trainer.engine, Progress(number + 1, 0, 0), Health)
        saver.finish()
    copies = copy_seconds(trainer, run_dir / "aside")
    first, *later = saves[:SAVES]
    return {
        "model": model, "ranks": trainer.world.size, "bytes_per_rank": first.size // trainer.world.size,
        "check_seconds": check_seconds, "copy_seconds": copies,
        "stall_seconds_first": first.stall, "stall_seconds": [save.stall for save in later],
        "seconds_behind_training": [save.seconds for save in later],
        "stall_seconds_synchronous": [save.stall for save in saves[SAVES:]],
        "step_seconds": statistics.median(quiet), "step_seconds_while_writing": statistics.median(while_writing),
    }  # fmt: skip


def save_behind(trainer: Trainer, saver: Saver, saves: list[Save]) -> list[float]:
    """Save as the training loop does; seconds of the steps until the save has ended."""
    number = len(saves)
    saver.save(trainer.engine, Progress(number + 1, 0, 0), Health)
    seconds = []
    while len(saves) == number:
        seconds.append(trainer.step())
        busy = int(sum_over_ranks(torch.tensor([saver.is_busy()], dtype=torch.int64)))
        saver.advance(is_any_busy=busy > 0)
    return seconds


def copy_seconds(trainer: Trainer, folder: Path) -> list[float]:
    """Seconds of the bare copy, the first into new memory, the others into memory that was used before."""
    folder.mkdir(parents=True, exist_ok=True)
    snapshots = HostStateBuffer(trainer.world)
    found = []
    for _ in range(6):
        dist.barrier()
        started = perf_counter()
        snapshots.copy_from(trainer.engine, Progress(1, 0, 0))
        found.append(perf_counter() - started)
    return found


def bytes_per_rank(stage: int, ranks: int, parameters: int) -> int:
    """What rank 0 copies under bf16: its part of master and both moments in fp32, before stage 3 also all weights."""
    return 12 * parameters // ranks + (2 * parameters if stage < 3 else 0)


def arithmetic(figures: dict) -> list[dict]:
    """The stall of tinyllama-1.1b on 16 ranks at the copy rate measured here: check and agreement as they are."""
    parameters = model_config("tinyllama-1.1b").num_parameters
    copying = statistics.median(figures["copy_seconds"][1:])
    rate = figures["bytes_per_rank"] / copying
    rest = max(0.0, statistics.median(figures["stall_seconds"]) - copying)
    rows = []
    for stage in (1, 3):
        size = bytes_per_rank(stage, 16, parameters)
        rows.append({"stage": stage, "ranks": 16, "bytes_of_rank_0": size, "stall_seconds": size / rate + rest})
    return rows


def table(figures: dict) -> str:
    """The figures in words."""
    size, copying = figures["bytes_per_rank"], statistics.median(figures["copy_seconds"][1:])
    stall, writing, synchronous = (
        statistics.median(figures[key])
        for key in ("stall_seconds", "seconds_behind_training", "stall_seconds_synchronous")
    )
    lines = [
        f"{figures['model']}, ZeRO-3, {figures['ranks']} ranks: {size / 1e9:.2f} GB per rank",
        f"copy                  {copying:.2f} s, {size / copying / 1e9:.2f} GB/s per rank",
        f"stall, asynchronous   {stall:.2f} s ({figures['stall_seconds_first']:.2f} s the first time)",
        f"stall, synchronous    {synchronous:.2f} s",
        f"save as a whole       {writing:.2f} s, {size / writing / 1e9:.2f} GB/s per rank",
        f"step                  {figures['step_seconds']:.2f} s, {figures['step_seconds_while_writing']:.2f} s during",
    ]
    for row in figures["tinyllama_1.1b"]:
        lines.append(
            f"1.1b, ZeRO-{row['stage']}, {row['ranks']} ranks: by arithmetic {row['stall_seconds']:.2f} s stall,"
            f" {row['bytes_of_rank_0'] / 1e9:.2f} GB on rank 0"
        )
    return "\n".join(lines)


def main() -> None:
    """Start the ranks, or be one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--directory", type=output_folder, help="where to save (default: a temporary directory)")
    parser.add_argument("--model", default="tinyllama-120m", help="named size (default: %(default)s)")
    options = parser.parse_args()
    if "RANK" in os.environ:
        figures = measure(options.directory, options.model)
        if dist.get_rank() == 0:
            options.json.write_text(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        output = Path(directory) / "figures.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command = [*launcher, __file__, *rank_arguments(options.model, output, Path(directory, "run"))]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        report(json.loads(output.read_text()), options.json)


def rank_arguments(model: str, output: Path, directory: Path) -> list[str]:
    """What a rank is told."""
    return ["--model", model, "--json", str(output), "--directory", str(directory)]


def report(figures: dict, path: Path | None) -> None:
    """The table with what follows by arithmetic, and the same as JSON."""
    figures["tinyllama_1.1b"] = arithmetic(figures)
    figures["machine"] = {"cores": os.cpu_count(), "processor": platform.processor(), "torch": torch.__version__}
    figures["load_average"] = os.getloadavg()[0]  # of the last minute, the ranks included
    print(table(figures))
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
