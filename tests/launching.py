"""Starting real runs: recipes and DeepSpeed configs for the model size `test`, and the commands that train it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tinyllama_ds.launch.launcher import PRETRAIN

SEQUENCE_LENGTH = 32
BATCH = 8  # sequences per optimizer step
STEP_TOKENS = SEQUENCE_LENGTH * BATCH
TIMEOUT = 600  # seconds; a bound for what hangs, and none for speed: a machine may be busy

Finished = subprocess.CompletedProcess[str]


def write_recipe(path: Path, steps: int, save_every: int, evaluate_every: int | None = None, **changes: object) -> Path:
    """A recipe of some steps over both sources 7:3."""
    lines = {
        "name": "small",
        "model": "test",
        "sequence_length": SEQUENCE_LENGTH,
        "seed": 1,
        "validation_samples": 5,
    } | changes
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in lines.items())
    path.write_text(f"""{text}
[[stages]]
name = "only"
tokens = {steps * STEP_TOKENS}
global_batch_tokens = {STEP_TOKENS}
weights = {{ slimpajama = 0.7, starcoderdata = 0.3 }}
[intervals]
log_steps = 1
evaluate_tokens = {(evaluate_every or steps) * STEP_TOKENS}
save_tokens = {save_every * STEP_TOKENS}
""")
    return path


def write_deepspeed_config(path: Path, stage: int, micro_batch: int, **changes: object) -> Path:
    """fp32 on any stage, small buckets, every parameter partitioned."""
    zero: dict = {"stage": stage}
    if stage:
        zero["reduce_bucket_size"] = 20_000
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": 20_000, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_num_steps": 5,
                "warmup_type": "linear",
                "warmup_min_ratio": 0.0,
                "cos_min_ratio": 0.1,
            },
        },
        "zero_optimization": zero,
        "tensorboard": {"enabled": False},
    } | changes
    path.write_text(json.dumps(config))
    return path


def pretrain(recipe: Path, config: Path, data: Path, run_dir: Path, ranks: int, *more: str) -> Finished:
    """`tinyllama-ds pretrain`, to its end."""
    return run(pretrain_command(recipe, config, data, run_dir, ranks, *more))


def pretrain_command(recipe: Path, config: Path, data: Path, run_dir: Path, ranks: int, *more: str) -> list[str]:
    """The command line of `tinyllama-ds pretrain`."""
    arguments = ["--recipe", recipe, "--deepspeed-config", config, "--data", data, "--run-dir", run_dir]
    return [sys.executable, "-m", "tinyllama_ds.cli", "pretrain", *map(str, arguments), "--num-gpus", str(ranks), *more]


def tinyllama_ds(*arguments: object) -> Finished:
    """Any command of the toolkit, as a user starts it."""
    return run([sys.executable, "-m", "tinyllama_ds.cli", *map(str, arguments)])


def run(command: list[str], timeout: float = TIMEOUT, **environment: str) -> Finished:
    """A command with its output captured."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=os.environ | environment, check=False
    )


def read_series(run_dir: Path, name: str) -> list[float]:
    """One figure of a run, row by row."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def read_series_so_far(run_dir: Path, name: str) -> list[float]:
    """The same of a run that is at work: there may be no file yet, and half of its last row."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row[name] for row in rows if name in row]


def wait_until(condition: Callable[[], object], what: str, seconds: float = TIMEOUT) -> None:
    """Wait for what another process brings about, sooner or later; `what` is said where it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_rank(command_line: list[str]) -> bool:
    """Of training, and not the launcher or its runner, which name the same module and may have a variable RANK too."""
    is_launcher = any(part in command_line for part in ("deepspeed.launcher.launch", "deepspeed.launcher.runner"))
    return "-u" in command_line and PRETRAIN in command_line and not is_launcher


def rank_process(supervisor: subprocess.Popen, rank: int) -> psutil.Process | None:
    """The training process of a rank on this machine, once it is there."""
    for child in psutil.Process(supervisor.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # of what a start leaves behind
            if is_rank(child.cmdline()) and child.environ().get("RANK") == str(rank):
                return child
    return None
