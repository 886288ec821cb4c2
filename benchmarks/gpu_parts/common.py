"""What the parts share: their arguments, and the commands of the toolkit that they start."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from gpu_parts.figures import Figures, read_figures
from tinyllama_ds.commands.arguments import Parser, output_folder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"


@dataclass(frozen=True)
class Part:
    """A part at work. It has its process group to itself: what it leaves behind is killed."""

    name: str
    out: Path  # <name>.json and <name>.log of every part
    work: Path  # scratch, shared by the parts
    rehearse: bool  # on a CPU with a tiny model

    @cached_property
    def figures(self) -> Figures:
        return Figures(self.out / f"{self.name}.json")

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def of_part(self, name: str) -> dict:
        """The figures of another part, as far as it came."""
        return read_figures(self.out / f"{name}.json")["figures"]

    def matmul_flops(self) -> float:
        """FLOP/s of the matrix product that part `machine` measured; measured now where it was skipped."""
        measured = self.of_part("machine").get("matmul_flops")
        if measured is None:
            import torch

            from tinyllama_ds.train.utilization import measured_peak

            measured = measured_peak(torch.device(self.device), torch.bfloat16)
            torch.cuda.empty_cache()
        return measured


def part_of_arguments(name: str) -> Part:
    """As `on_gpu.py` starts its parts."""
    parser = Parser()
    parser.add_argument("--out", type=output_folder, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    return Part(name, options.out, options.work, options.rehearse)


def tinyllama_ds(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the toolkit as a user starts it; its output goes to this part's log, too."""
    words = [str(argument) for argument in arguments]
    print(f"$ tinyllama-ds {' '.join(words)}", flush=True)
    started = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-m", "tinyllama_ds.cli", *words],
        capture_output=True, text=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    print(finished.stdout, finished.stderr, sep="", flush=True)
    print(f"exit code {finished.returncode} after {time.perf_counter() - started:.1f} s", flush=True)
    return finished


def last_words(finished: subprocess.CompletedProcess[str]) -> str:
    """Of a command that failed: its own sentence, or the exception's line."""
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or line.startswith("tinyllama-ds:")]
    return (telling or lines or ["said nothing"])[-1][:150]


def demo_data(part: Part) -> Path:
    """Token shards of prose and code from the Python installation, made by the commands that the quickstart uses."""
    data, raw, tokenizer = (part.work / name for name in ("data", "raw", "tokenizer.model"))
    if data.exists():
        return data
    making = part.work / "data.partial"
    if part.rehearse:
        from tinyllama_ds.data.demo.corpus import make_demo_corpus

        make_demo_corpus(raw, max_bytes=2_000_000)  # a quarter of what the command below makes
    vocabulary = 512 if part.rehearse else 2048  # of the model sizes `test` and `demo`
    commands: list[tuple[object, ...]] = [
        ("demo-data", raw),
        ("train-tokenizer", "--input", raw / "slimpajama", "--vocab-size", vocabulary, "--output", tokenizer),
        *(
            ("prepare", "--source", source, "--input", raw / source, "--tokenizer", tokenizer, "--output", making)
            for source in ("slimpajama", "starcoderdata")
        ),
    ]
    for command in commands:
        finished = tinyllama_ds(*command)
        if finished.returncode:
            raise SystemExit(f"Error: tinyllama-ds {command[0]}: {last_words(finished)}")
    making.rename(data)
    return data


@dataclass(frozen=True)
class Shape:
    """What a recipe of some steps is about."""

    model: str
    sequence_length: int
    batch: int  # sequences per optimizer step
    steps: int
    save_steps: int

    @property
    def step_tokens(self) -> int:
        return self.sequence_length * self.batch

    def write(self, path: Path) -> Path:
        """The recipe as a file: both sources, validation at the beginning, at every save and at the end."""
        path.write_text(f"""name = "on_gpu"
model = "{self.model}"
sequence_length = {self.sequence_length}
seed = 1
validation_samples = 16
[[stages]]
name = "only"
tokens = {self.steps * self.step_tokens}
global_batch_tokens = {self.step_tokens}
weights = {{ slimpajama = 0.6, starcoderdata = 0.4 }}
[intervals]
log_steps = 1
evaluate_tokens = {self.save_steps * self.step_tokens}
save_tokens = {self.save_steps * self.step_tokens}
keep_last = 10
""")
        return path


def own_config(part: Part, name: str, micro_batch: int) -> Path:
    """A shipped ZeRO file, with the warmup of a run of some steps."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config["scheduler"]["params"]["warmup_num_steps"] = 4
    config["train_micro_batch_size_per_gpu"] = micro_batch
    path = part.work / f"{name}.json"
    path.write_text(json.dumps(config, indent=1))
    return path


def rows(run_dir: Path) -> list[dict]:
    """All rows of a run's metrics."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step; of a step that was made twice, the last one."""
    return {row["step"]: row["Train/Loss"] for row in rows(run_dir) if "Train/Loss" in row}


def best_rate(run_dir: Path) -> float:
    """Tokens per second, the median of the faster half of the logged steps: the others compile or load."""
    rates = sorted(row["Speed/TokensPerSecond"] for row in rows(run_dir) if "Speed/TokensPerSecond" in row)
    return median(rates[len(rates) // 2 :])
