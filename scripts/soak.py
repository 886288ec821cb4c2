#!/usr/bin/env python
"""Trains a small model under faults for an hour, and compares its end with a run that was left alone.

    python scripts/soak.py --minutes 60 --every 150 --directory soak

Every so many seconds one of the ranks, the launcher or the supervisor is killed, stopped or asked to stop, the newest
checkpoint is damaged, or (as root, who can mount a small file system) the disk is filled; which one, and when, follows
from the seed. One step of the training has a non-finite gradient, in both runs. The hash chain over all samples and
every weight have to be those of the reference in the end: exit code 0, else 1. `soak.json` holds the whole story.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tinyllama_ds.checkpoint.format import find_checkpoints, newest_progress
from tinyllama_ds.checkpoint.reader import stream_weights
from tinyllama_ds.commands.arguments import MINUTES, SECONDS, SEED, Parser, output_folder
from tinyllama_ds.errors import EXIT_FINISHED, EXIT_RESTART

SEQUENCE_LENGTH, BATCH = 128, 8
STEP_TOKENS = SEQUENCE_LENGTH * BATCH
CALIBRATION_STEPS, POISONED_STEP = 150, 77
SAVES = 60  # in the whole run
TRAINING_SHARE = 0.8  # of the time under faults; the rest is recovery
DISK_BYTES = 64 * 2**20
RECOVERY_SECONDS = 300.0  # in which a run has to train again after a fault
FAULTS = (
    "kill_rank", "kill_launcher", "kill_supervisor", "freeze_rank", "ask_rank_to_stop", "stop", "damage_checkpoint",
)  # fmt: skip
COMMAND = [sys.executable, "-m", "tinyllama_ds.cli"]

RECIPE = """name = "soak"
model = "test"
sequence_length = {sequence_length}
seed = 1
validation_samples = 4
[[stages]]
name = "only"
tokens = {tokens}
global_batch_tokens = {batch_tokens}
weights = {{ slimpajama = 0.7, starcoderdata = 0.3 }}
[intervals]
log_steps = 5
evaluate_tokens = {tokens}
save_tokens = {save_tokens}
"""

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
    },
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 20_000,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_param_persistence_threshold": 0,
    },
}


@dataclass
class Fault:
    """One fault, and what it cost."""

    name: str
    at_seconds: float
    at_step: int
    resumed_from: int | None = None  # the checkpoint, where the ranks had to start again
    seconds_until_training: float | None = None


@dataclass
class Report:
    """What `soak.json` holds."""

    seed: int
    steps: int
    reference_seconds: float
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    starts: int = 0  # of the supervisor, by hand or by a scheduler
    steps_done_again: int = 0
    goodput: float = 0.0
    same_samples: bool = False
    same_weights: bool = False


class Soak:
    """A run under faults: its supervisor, and whoever starts that again."""

    def __init__(self, command: list[str], run_dir: Path, log: Path, rng: random.Random) -> None:
        self.run_dir = run_dir
        self.starts = 0
        self._command = command
        self._log = log.open("w+")
        self._rng = rng
        self._supervisor = self._start()

    def _start(self) -> subprocess.Popen:
        self.starts += 1
        return start(self._command, self._log)

    def is_finished(self) -> bool:
        """Whether the run is complete; one that was stopped or killed is started again, any other end is an error."""
        code = self._supervisor.poll()
        if code is None:
            return False
        if code == EXIT_FINISHED:
            return True
        if code not in (EXIT_RESTART, -signal.SIGKILL):
            raise RuntimeError(f"the run ended with code {code}; see {self._log.name}")
        self._supervisor = self._start()
        return False

    def step(self) -> int:
        """The step that was logged last; 0 before the first."""
        with suppress(OSError, IndexError, ValueError):
            rows = (self.run_dir / "metrics.jsonl").read_text().splitlines()
            return max(json.loads(row)["step"] for row in rows[-3:])
        return 0

    def said(self) -> str:
        """Everything that the run has printed."""
        return Path(self._log.name).read_text(errors="replace")

    def end(self) -> None:
        """Kill what is left."""
        self._supervisor.kill()
        self._supervisor.wait()

    def processes(self, script: str) -> list[psutil.Process]:
        """The run's processes whose command line ends a part with `script`."""
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._supervisor.pid).children(recursive=True)
            return [process for process in family if any(part.endswith(script) for part in command_line(process))]
        return []

    def a_rank(self) -> psutil.Process:
        """One of the ranks."""
        ranks = [process for process in self.processes("tinyllama_ds.rank.pretrain") if "-u" in command_line(process)
                 and "deepspeed.launcher.launch" not in command_line(process)]  # fmt: skip
        return self._rng.choice(ranks)

    def kill_rank(self) -> None:
        self.a_rank().kill()

    def freeze_rank(self) -> None:
        self.a_rank().suspend()

    def ask_rank_to_stop(self) -> None:
        self.a_rank().terminate()

    def kill_launcher(self) -> None:
        self._rng.choice(self.processes("deepspeed.launcher.launch")).kill()

    def kill_supervisor(self) -> None:
        self._supervisor.kill()

    def stop(self) -> None:
        self._supervisor.terminate()

    def damage_checkpoint(self) -> None:
        """A byte of the newest checkpoint changes, and then a rank dies."""
        newest = find_checkpoints(self.run_dir)[-1]
        file = self._rng.choice(sorted(newest.glob("*.safetensors")))
        content = bytearray(file.read_bytes())
        content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(8)
        file.write_bytes(content)
        self.kill_rank()

    def fill_disk(self) -> None:
        """For some seconds the disk is full."""
        filler = self.run_dir.parent / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(2**16))
        time.sleep(10)
        filler.unlink()


def command_line(process: psutil.Process) -> list[str]:
    """Of a process that may be gone."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def start(command: list[str], log: object) -> subprocess.Popen:
    """Start `tinyllama-ds pretrain` with one poisoned step, which every run meets whenever it comes by."""
    poison = {"TINYLLAMA_DS_FAULT": f"step.backward:1:{POISONED_STEP}:poison:always"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | poison)  # type: ignore[call-overload]


def prepare(directory: Path) -> Path:
    """Tokens of the demo corpus, made once."""
    data, raw, tokenizer = directory / "data", directory / "raw", directory / "tokenizer.model"
    if data.is_dir():
        return data
    corpora = [raw / "slimpajama", raw / "starcoderdata"]
    run([*COMMAND, "demo-data", str(raw)])
    run([*COMMAND, "train-tokenizer", "--input", *map(str, corpora), "--vocab-size", "512", "--output", str(tokenizer)])
    for corpus in corpora:
        run([*COMMAND, "prepare", "--source", corpus.name, "--input", str(corpus), "--tokenizer", str(tokenizer),
             "--output", str(directory / "data.partial")])  # fmt: skip
    (directory / "data.partial").rename(data)
    return data


def run(command: list[str]) -> None:
    """A command without progress bars."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pretrain_command(directory: Path, data: Path, run_dir: Path, steps: int) -> list[str]:
    """The recipe and DeepSpeed JSON for so many steps, and the command that trains them."""
    recipe, config = directory / f"{steps}_steps.toml", directory / "deepspeed.json"
    numbers = {"sequence_length": SEQUENCE_LENGTH, "tokens": steps * STEP_TOKENS, "batch_tokens": STEP_TOKENS}
    recipe.write_text(RECIPE.format(**numbers, save_tokens=max(1, steps // SAVES) * STEP_TOKENS))
    config.write_text(json.dumps(DEEPSPEED))
    arguments = ["--recipe", recipe, "--deepspeed-config", config, "--data", data, "--run-dir", run_dir]
    return [*COMMAND, "pretrain", *map(str, arguments), "--num-gpus", "2", "--step-timeout", "30"]


def train_alone(directory: Path, data: Path, run_dir: Path, steps: int) -> float:
    """A run without faults; returns the seconds from its first step to its end."""
    with (directory / f"{run_dir.name}.log").open("a") as log:
        process = start(pretrain_command(directory, data, run_dir, steps), log)
        wait_for(lambda: (run_dir / "metrics.jsonl").exists() or process.poll() is not None)
        started = time.monotonic()
        if process.wait() != EXIT_FINISHED:
            raise RuntimeError(f"the run without faults failed; see {log.name}")
    return time.monotonic() - started


def inject(soak: Soak, names: list[str], rng: random.Random, started: float) -> Fault | None:
    """Strike once, and wait until the run trains again; None where the run had just ended."""
    fault = Fault(rng.choice(names), time.monotonic() - started, soak.step())
    struck, said_before = time.monotonic(), len(soak.said())
    try:
        getattr(soak, fault.name)()
    except (IndexError, psutil.NoSuchProcess):
        return None
    while not soak.is_finished():
        resumed = re.findall(r"resumed at step ([\d,]+)", soak.said()[said_before:])
        if resumed:
            fault.resumed_from = int(resumed[-1].replace(",", ""))
        if (resumed or fault.name == "fill_disk") and soak.step() > (fault.resumed_from or fault.at_step):
            fault.seconds_until_training = time.monotonic() - struck
            break
        if time.monotonic() - struck > RECOVERY_SECONDS:
            raise RuntimeError(f"{fault.name} at step {fault.at_step}: not training again; see the log")
        time.sleep(0.2)
    return fault


def endure(soak: Soak, report: Report, every: float, rng: random.Random, names: list[str]) -> None:
    """Strike again and again until the run is complete."""
    started = time.monotonic()
    wait_for(lambda: newest_progress(soak.run_dir)[0] > 0)
    while not soak.is_finished():
        strike_at = time.monotonic() + every * rng.uniform(0.5, 1.5)
        while time.monotonic() < strike_at and not soak.is_finished():
            time.sleep(0.2)
        if soak.is_finished():
            break
        fault = inject(soak, names, rng, started)
        if fault is not None:
            report.faults.append(fault)
            print(f"{fault.at_seconds:6.0f} s  step {fault.at_step:6}  {fault.name}", flush=True)
    report.seconds = time.monotonic() - started
    report.starts = soak.starts


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it holds; raises RuntimeError when it takes too long."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the run does not train")
        time.sleep(0.2)


def fingerprint(run_dir: Path) -> tuple[str, str]:
    """(hash chain over the samples of all steps, SHA-256 over all weights) of the newest checkpoint."""
    manifest, weights = stream_weights(find_checkpoints(run_dir)[-1])
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(name.encode() + tensor.numpy().tobytes())
    return manifest.progress.chain, digest.hexdigest()


def small_disk(directory: Path) -> bool:
    """A file system of its own for the run under faults, where this is permitted."""
    place = directory / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=750", "tmpfs", str(place)]
    return subprocess.run(["mount", *options], stderr=subprocess.DEVNULL, check=False).returncode == 0


def conclude(report: Report, reference: Path, soaked: Path) -> None:
    """Compare the two ends, and count what the faults cost."""
    (chain, weights), (expected_chain, expected_weights) = fingerprint(soaked), fingerprint(reference)
    report.same_samples, report.same_weights = chain == expected_chain, weights == expected_weights
    report.steps_done_again = sum(
        max(0, fault.at_step - fault.resumed_from) for fault in report.faults if fault.resumed_from is not None
    )
    report.goodput = report.reference_seconds / report.seconds


def table(report: Report) -> str:
    """The report in words."""
    kinds = Counter(fault.name for fault in report.faults)
    recoveries = [fault.seconds_until_training for fault in report.faults if fault.seconds_until_training]
    lines = [f"{name.replace('_', ' '):<24}{number:>4}" for name, number in sorted(kinds.items())]
    return "\n".join([
        f"{len(report.faults)} faults in {report.seconds:,.0f} s, seed {report.seed}", *lines,
        f"{'until training again':<24}{sum(recoveries) / max(1, len(recoveries)):>6.1f} s on average",
        f"{'starts of the command':<24}{report.starts:>4}",
        f"{'steps done again':<24}{report.steps_done_again:>4} of {report.steps:,}",
        f"{'goodput':<24}{report.goodput:>8.1%} of {report.reference_seconds:,.0f} s without faults",
        f"{'samples':<24}{'the same in every step' if report.same_samples else 'DIFFERENT'}",
        f"{'weights':<24}{'the same, bit for bit' if report.same_weights else 'DIFFERENT'}",
    ])  # fmt: skip


def main() -> int:
    """Train alone, train under faults, compare."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=MINUTES, default=60, help="about so long under faults (default: %(default)s)")
    parser.add_argument("--every", type=SECONDS, default=150, metavar="SECONDS", help="a fault (default: %(default)s)")
    parser.add_argument("--seed", type=SEED, default=1, help="default: %(default)s")
    parser.add_argument(
        "--directory", type=output_folder, default=Path("soak"), help="for everything (default: %(default)s)"
    )
    options = parser.parse_args()
    directory = options.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    data = prepare(directory)
    for name in ("calibration", "reference", "disk"):
        shutil.rmtree(directory / name, ignore_errors=True)
    stragglers = CALIBRATION_STEPS / train_alone(directory, data, directory / "calibration", CALIBRATION_STEPS)
    steps = max(SAVES, int(60 * options.minutes * stragglers * TRAINING_SHARE))
    seconds = train_alone(directory, data, directory / "reference", steps)
    print(f"without faults: {steps:,} steps in {seconds:,.0f} s", flush=True)
    is_mounted = small_disk(directory)
    names = [*FAULTS, "fill_disk"] if is_mounted else [*FAULTS]
    report = Report(options.seed, steps, seconds)
    run_dir = directory / "disk" / "run"
    soak = Soak(pretrain_command(directory, data, run_dir, steps), run_dir, directory / "soak.log", rng)
    try:
        endure(soak, report, options.every, rng, names)
        conclude(report, directory / "reference", run_dir)
    finally:
        soak.end()
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(directory / "disk")], check=True)
    (directory / "soak.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    print(table(report))
    return 0 if report.same_samples and report.same_weights else 1


if __name__ == "__main__":
    sys.exit(main())
