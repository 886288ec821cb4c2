"""Tokens per second of one training step: ours next to what a user would pick instead, same model, tokens and machine.

    python benchmarks/training_peers.py --json benchmarks/results/training_peers_cpu.json

With a GPU it is TinyLlama-1.1B on one rank, 16k tokens per micro-batch, without activation checkpointing: one contender
after the other, because each needs the memory (`gpu_parts/peers.py` takes two in turn). Else it is 26.7M parameters on
two ranks of one thread each (`plain` is one process with two threads, about 1.2 GB per process): every contender starts
once and warms up, then each in turn trains a step while the rest wait, round after round, so that a drift of the
machine hits all. Ours run in the environment that `tinyllama-ds pretrain` gives its ranks. litgpt is not among our
dependencies: install it (`pip install litgpt`), else its row is skipped, as that of a contender that fails. Nothing is
downloaded.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from contenders import CONTENDERS, SIZES, Size, ranks_of
from installed import of_installed
from tinyllama_ds.commands.arguments import Parser, WholeNumber, output_file
from tinyllama_ds.distributed.network import free_port
from tinyllama_ds.launch.launcher import Placement, launcher_environment
from tinyllama_ds.train.utilization import measured_peak, memory_bytes


def serve(name: str, size: Size) -> None:
    """Run inside the ranks: after the warmup, as many steps as a line of stdin asks for; prints their mean seconds
    and the peak bytes so far.

    On a GPU one more goes before, and the memory of activations is given back after: another contender may need it.
    """
    on_gpu = size.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(size.ranks // ranks_of(name, size))
    step = CONTENDERS[name].build(size)
    for _ in range(size.warmup_steps):
        step()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        if on_gpu:
            step()
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(int(line)):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / int(line)
        if on_gpu:
            torch.cuda.empty_cache()
        print(json.dumps([seconds, memory_bytes(torch.device(size.device))]), flush=True)
    os._exit(0)  # gloo's threads can abort at the interpreter's end


class Contender:
    """The processes of one contender, waiting for their turn."""

    def __init__(self, name: str, size_name: str) -> None:
        self.name, self.size = name, SIZES[size_name]
        port = str(free_port())
        environments = [environment_of(name, self.size, rank, port) for rank in range(ranks_of(name, self.size))]
        command = [sys.executable, __file__, "--serve", name, "--size", size_name]
        self._ranks = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for environment in environments
        ]

    def wait_until_warm(self) -> None:
        for process in self._ranks:
            self._read(process)
        print(f"{self.name} is warm", flush=True)

    def run(self, steps: int) -> tuple[float, int]:
        """Let all ranks train some steps; seconds of one, and peak bytes, of the rank with the most.

        Raises RuntimeError where a rank has ended.
        """
        for process in self._ranks:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # reported by the read
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
        seconds, peaks = zip(*(self._read(process) for process in self._ranks), strict=True)
        return max(seconds), max(peaks)

    def end(self) -> None:
        for process in self._ranks:
            process.kill()
            process.wait()

    def _read(self, process: subprocess.Popen) -> Any:
        assert process.stdout is not None
        for line in process.stdout:  # libraries print there too
            if line.startswith(('"ready"', "[")):
                with suppress(json.JSONDecodeError):
                    return json.loads(line)
        raise RuntimeError(f"{self.name} ended with code {process.wait()}")


def environment_of(name: str, size: Size, rank: int, port: str) -> dict[str, str]:
    ranks, on_cpu = ranks_of(name, size), size.device == "cpu"
    environment = dict(os.environ)
    if name.startswith("ours"):
        environment = launcher_environment(Placement(None, [], size.ranks, on_cpu=on_cpu))
    if on_cpu:
        one_process = {"OMP_NUM_THREADS": str(size.ranks // ranks), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        environment |= one_process | {"DS_ACCELERATOR": "cpu"}
    return environment | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }  # fmt: skip


@dataclass
class Result:
    """Of one contender: tokens per second of every round, and the peak memory of a process."""

    rates: list[float] = field(default_factory=list)
    peak_gib: float = 0.0


def measure(names: list[str], size_name: str, rounds: int) -> dict[str, Result]:
    """All contenders in turn; on a GPU one after the other. One that fails (for example out of memory) has no row."""
    results: dict[str, Result] = {}
    for group in [names] if SIZES[size_name].device == "cpu" else [[name] for name in names]:
        contenders: list[Contender] = []
        try:
            for name in group:
                contenders.append(Contender(name, size_name))
                _each(contenders[-1:], contenders, results, lambda contender: contender.wait_until_warm())
            for number in range(rounds):
                _each(list(contenders), contenders, results, partial(run_once, results=results, number=number))
        finally:
            for contender in contenders:
                contender.end()
    return results


def _each(
    turns: list[Contender], contenders: list[Contender], results: dict[str, Result], do: Callable[[Contender], None]
) -> None:
    """Let some do it one after the other; of one that fails nothing is left, and the others go on."""
    for contender in turns:
        try:
            do(contender)
        except RuntimeError as failure:
            print(f"{failure}; skipped", flush=True)
            contender.end()
            contenders.remove(contender)
            results.pop(contender.name, None)


def run_in_turn(
    contenders: list[Contender],
    results: dict[str, Result],
    rounds: int,
    steps: int,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Some steps of each, round after round, while the others wait; what comes of it is added to `results`."""
    for number in range(rounds):
        for contender in contenders:
            run_once(contender, results, number, steps)
            after_each()


def run_once(contender: Contender, results: dict[str, Result], number: int, steps: int = 1) -> None:
    """The turn of one contender. Raises RuntimeError where it has ended."""
    seconds, peak = contender.run(steps)
    result = results.setdefault(contender.name, Result())
    result.rates.append(contender.size.tokens / seconds)
    result.peak_gib = peak / 2**30
    print(f"round {number + 1}: {contender.name}: {result.rates[-1]:,.0f} tokens/s", flush=True)


def table(results: dict[str, Result], size: Size, peak: float) -> str:
    """A line per contender: tokens/s, the part of the matrix product's rate, memory, and the first one's rate / its."""
    first = next(iter(results))
    lines = [f"{'':<38}{'tokens/s':>10}{'of matmul':>11}{'GiB':>8}  {first} / it, median of rounds (min to max)"]
    for name, result in results.items():
        ratios = [ours / theirs for ours, theirs in zip(results[first].rates, result.rates, strict=True)]
        rate = statistics.median(result.rates)
        share = rate * size.model.flops_per_token(size.sequence_length) / peak
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"{name:<38}{rate:>10,.0f}{share:>11.1%}{result.peak_gib:>8.2f}  {spread}")
    return "\n".join(lines)


def main() -> None:
    """Measure all contenders and print a table of medians and ratios."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=WholeNumber(1, 1000), default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--size", choices=SIZES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=output_file)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.serve:
        return serve(options.serve, size)
    names = of_installed({name: CONTENDERS[name].package for name in options.only})
    peak = measured_peak(torch.device(size.device), torch.bfloat16)
    if size.device == "cuda":
        torch.cuda.empty_cache()  # the contenders need the memory
    results = measure(names, options.size, options.rounds)
    if not results:
        raise SystemExit("no contender trained to the end")
    print(f"\n{table(results, size, peak)}\nmatmul: {peak / 1e12:.2f} TFLOP/s in bf16, measured before the contenders")
    if options.json:
        options.json.parent.mkdir(exist_ok=True)
        rows = {name: asdict(result) for name, result in results.items()}
        content = {"machine": machine(), "matmul_flops": peak, "results": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return None


def machine() -> dict[str, str | int | None]:
    """What the figures were measured on, and with which versions."""
    found: dict[str, str | int | None] = {"processor": cpu_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    found["python"] = platform.python_version()
    for package in ("torch", "triton", "deepspeed", "transformers", "flash-attn", "litgpt"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def cpu_name() -> str:
    """The processor's model name, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
