"""The training stall of a checkpoint save, and what the background write costs the steps.

    python benchmarks/checkpoint_stall.py --json benchmarks/results/checkpoint_stall.json

Two ranks train tinyllama-120m under ZeRO 1, 2 and 3, and save some times as `pretrain` does (`checkpoint/save.py`).
They also copy the same state in two other ways: whole parameters, gathered through DeepSpeed's
`safe_get_full_*`, and `torch.distributed.checkpoint.async_save` with its safetensors storage. With
`--before CHECKOUT`, the saves of an older version of this repository are measured instead of these two, in turns
with those of this one. Everything is real but the tokens.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import count, repeat
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist

from tinyllama_ds.checkpoint.format import Health, Progress
from tinyllama_ds.checkpoint.retention import Retention
from tinyllama_ds.checkpoint.save import Save, Saver, SaveSettings
from tinyllama_ds.commands.arguments import Parser, WholeNumber, output_file, output_folder
from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.model.config import model_config
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.train.batches import Batch
from tinyllama_ds.train.engine import start_process_group, wrap
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import train_step

T, MICRO_BATCH, RANKS, ROUNDS = 64, 1, 2, 2
STAGES = (1, 2, 3)
SAVES = 4  # of each kind in a round; the first one has to make its host memory, and does not count
KINDS = ("master", "exp_avg", "exp_avg_sq")


class Bench:
    """An engine that takes steps, each timed."""

    def __init__(self, model: str, layers: int | None, stage: int, states: str) -> None:
        self.world = read_world()
        start_process_group(self.world)
        self.model = model_config(model)
        if layers:
            self.model = replace(self.model, num_hidden_layers=layers)
        zero: dict = {"stage": stage, "reduce_bucket_size": 10_000_000}
        zero |= {"stage3_prefetch_bucket_size": 10_000_000} if stage == 3 else {"allgather_bucket_size": 10_000_000}
        in_bf16 = states == "bf16"
        bf16 = {"enabled": True, "bf16_master_weights_and_grads": in_bf16, "bf16_optimizer_states": in_bf16}
        adam = {"lr": 4e-4, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True, "fused": True}
        config = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
            "bf16": bf16, "optimizer": {"type": "AdamW", "params": adam}, "zero_optimization": zero,
            "timers": {"throughput": {"enabled": False}},
        }  # fmt: skip
        self.engine = wrap(build_model(self.model, "sdpa", 1, dtype=torch.bfloat16), config, 1.0)
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


def measure(bench: Bench, run_dir: Path, candidates: bool) -> dict:
    """The figures of one process group. Collective."""
    quiet = [bench.step() for _ in range(4)][1:]
    saves: list[Save] = []
    saver = Saver(SaveSettings(run_dir, Retention(2, 10**15), 1e9, bench.model, {}), bench.world, saves.append)
    while_writing = [seconds for _ in range(SAVES) for seconds in save_behind(bench, saver, saves)]
    found = {
        "stall": [save.stall for save in saves[1:]], "first": [saves[0].stall],
        "save": [save.seconds for save in saves[1:]], "bytes": [saves[0].size],
        "step": quiet, "step_while_writing": while_writing,
    }  # fmt: skip
    if candidates:
        found["whole"] = timed(WholeParameters(bench).copy)[1:]
        dcp = DistributedCheckpoint(bench, run_dir / "dcp")
        found["dcp"] = timed(dcp.save, dcp.wait)[1:]
    return found


def save_behind(bench: Bench, saver: Saver, saves: list[Save]) -> list[float]:
    """Save as the training loop does; seconds of the steps until the save has ended."""
    number = len(saves)
    saver.save(bench.engine, Progress(number + 1, 0, 0), Health)
    seconds = []
    while len(saves) == number:
        seconds.append(bench.step())
        busy = int(sum_over_ranks(torch.tensor([saver.is_busy()], dtype=torch.int64)))
        saver.advance(is_any_busy=busy > 0)
    return seconds


def timed(action: Callable[[], None], after: Callable[[], None] = lambda: None) -> list[float]:
    """Seconds of an action, some times over; all ranks begin together, and the slowest one counts."""
    found = []
    for _ in range(SAVES):
        dist.barrier()
        started = perf_counter()
        action()
        dist.barrier()
        found.append(perf_counter() - started)
        after()
    return found


class WholeParameters:
    """Every parameter is gathered on all ranks, and one of them, in turns, copies it into host memory."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    def copy(self) -> None:
        """Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for number, (name, parameter) in enumerate(self._bench.engine.module.named_parameters()):
            for kind in KINDS:
                if kind == "master":
                    whole = safe_get_full_fp32_param(parameter)
                else:
                    whole = safe_get_full_optimizer_state(parameter, kind)
                if number % self._bench.world.size == self._bench.world.rank:
                    self._buffers.setdefault((kind, name), torch.empty_like(whole)).copy_(whole)


class DistributedCheckpoint:
    """PyTorch's own asynchronous save of the fragments; what it does before it returns is the stall."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self._bench = bench
        self._folder = folder
        self._group = dist.new_group(backend="gloo")  # its thread's collectives must not mix with those of training

    def save(self) -> None:
        """Collective."""
        from torch.distributed.checkpoint import async_save
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        from tinyllama_ds.checkpoint.fragments import fragments_to_save, kinds_of, optimizer_state

        engine, world = self._bench.engine, self._bench.world
        state = {}
        for fragment in fragments_to_save(engine, world.rank, world.size):
            kept = optimizer_state(engine, fragment)
            for kind in kinds_of(kept):
                state[f"{kind}/{fragment.name}[{fragment.start}:{fragment.stop}]"] = fragment.values(kept, kind)
        writer = HuggingFaceStorageWriter(str(self._folder), save_distributed=True)
        self._pending = async_save(state, storage_writer=writer, process_group=self._group)

    def wait(self) -> None:
        """Until it is written."""
        self._pending.result()  # type: ignore[union-attr]


def start(options: argparse.Namespace, stage: int, checkout: Path | None, directory: Path) -> dict:
    """The figures of two ranks that this call starts, of this version or of another checkout."""
    output, run_dir = directory / "figures.json", directory / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), __file__]
    arguments = ["--model", options.model, "--states", options.states, "--stage", stage]
    arguments += ["--json", output, "--directory", run_dir]
    arguments += ["--layers", options.layers] if options.layers else []
    arguments += ["--before", options.before] if options.before else []
    paths = os.pathsep.join(map(str, filter(None, [checkout, *sys.path[1:]])))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run([*command, *map(str, arguments)], check=True, env=environment)
    shutil.rmtree(run_dir)
    return json.loads(output.read_text())


def table(found: dict[str, dict]) -> str:
    """Median and range of every figure in seconds, a line for each stage and way."""
    lines = []
    for name, figures in found.items():
        lines.append(f"{name}: {figures['bytes'][0] / 1e9:.2f} GB in all")
        for key in sorted(figures.keys() - {"bytes"}):
            values = figures[key]
            lines.append(f"  {key:<20}{statistics.median(values):7.2f} s  ({min(values):.2f} to {max(values):.2f})")
    return "\n".join(lines)


def main() -> None:
    """Start the ranks, or be one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--directory", type=output_folder, help="where to save (default: a temporary directory)")
    parser.add_argument("--model", default="tinyllama-120m", help="named size (default: %(default)s)")
    parser.add_argument("--stage", type=WholeNumber(1, 3), metavar="N", help="this ZeRO stage only")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="an older version to compare with")
    parser.add_argument("--layers", type=WholeNumber(1, 1000), metavar="N", help="of the model (default: all)")
    parser.add_argument("--states", choices=("fp32", "bf16"), default="fp32", help="of the optimizer, and masters")
    options = parser.parse_args()
    if "RANK" in os.environ:
        bench = Bench(options.model, options.layers, options.stage, options.states)
        figures = measure(bench, options.directory, candidates=options.before is None)
        if dist.get_rank() == 0:
            options.json.write_text(json.dumps(figures))
        os._exit(0)
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for _ in range(ROUNDS):
            for stage in [options.stage] if options.stage else STAGES:
                for checkout in [options.before, None] if options.before else [None]:
                    figures = start(options, stage, checkout, Path(directory))
                    kept = found.setdefault(f"ZeRO-{stage}, {'before' if checkout else 'now'}", {})
                    for key, values in figures.items():
                        kept[key] = [*kept.get(key, []), *values]
    print(table(found))
    machine = {"cores": os.cpu_count(), "processor": platform.processor(), "torch": torch.__version__}
    measured = {"size": options.model, "layers": options.layers, "states": options.states}
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "model": measured, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
