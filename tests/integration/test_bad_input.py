"""Wrong configuration or input: exit 78, one sentence that says where, and nothing changed."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch
from forked import tinyllama_ds
from launching import Finished, run, write_deepspeed_config, write_recipe
from made_up import made_up_text

from tinyllama_ds.data.tokenizers.train_tokenizer import train_tokenizer
from tinyllama_ds.distributed.network import free_port
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.fault_injection import FAULT_VARIABLE
from tinyllama_ds.launch.launcher import PRETRAIN


@dataclass
class Inputs:
    """A set of inputs that trains, for a case to spoil."""

    recipe: Path
    config: Path
    data: Path
    run_dir: Path
    more: list[str]
    ranks: int = 2


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def other_tokenizer(vocab_size: int) -> Callable[[Inputs], None]:
    def spoil(inputs: Inputs) -> None:
        path = inputs.data / "tokenizer.model"
        path.unlink()
        train_tokenizer([made_up_text(10_000 + seed, 1000) for seed in range(20)], vocab_size, path)

    return spoil


def lower_vocabulary(inputs: Inputs) -> None:
    """Shards that claim ids which the model does not have."""
    for manifest in (inputs.data / "slimpajama" / "train").glob("*.json"):
        edit_json(manifest, largest_id=512)


def another_run(inputs: Inputs) -> None:
    inputs.run_dir.mkdir()
    (inputs.run_dir / "run.json").write_text(json.dumps({"recipe": {"seed": 99}}))


def checkpoints_of_nobody(inputs: Inputs) -> None:
    folder = inputs.run_dir / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


CASES: dict[str, tuple[Callable[[Inputs], object], str]] = {
    "top-level typo": (lambda i: edit_json(i.config, gradient_cliping=0.5), "ds.json: unknown key 'gradient_cliping'"),
    "removed key": (lambda i: edit_json(i.config, elasticity={}), "ds.json: elasticity was removed"),
    "wrong value": (
        lambda i: edit_json(i.config, zero_optimization={"stage": 7}),
        "zero_optimization.stage is 7; expected 0, 1, 2 or 3",
    ),
    "batch given twice": (
        lambda i: edit_json(i.config, train_batch_size=8),
        'ds.json: train_batch_size is 8; expected "auto" or nothing, because the recipe decides it',
    ),
    "what DeepSpeed cannot start with": (
        lambda i: edit_json(
            i.config,
            optimizer={
                "type": "AdamW",
                "params": {"torch_adam": True, "amsgrad": True, "fused": True, "foreach": True},
            },
        ),
        "ds.json: DeepSpeed cannot start with this config: RuntimeError: `fused` and `foreach` cannot be `True`",
    ),
    "micro batch": (
        lambda i: edit_json(i.config, train_micro_batch_size_per_gpu=3),
        "3 does not divide the 4 sequences per rank and step (2 data-parallel ranks); sizes that work: 1, 2, 4",
    ),
    "number of ranks": (lambda i: setattr(i, "ranks", 3), "does not divide over 3 data-parallel ranks"),
    "fp32 sums at stage 0": (
        lambda i: edit_json(
            i.config, zero_optimization={"stage": 0}, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}
        ),
        "cannot accumulate in fp32 at stage 0 with bf16",
    ),
    "recipe typo": (lambda i: edit_text(i.recipe, "seed", "sede"), "unknown key 'sede'; did you mean 'seed'"),
    "unknown model": (lambda i: edit_text(i.recipe, '"test"', '"tset"'), 'model is "tset"; expected tinyllama-1.1b, '),
    "too long": (
        lambda i: edit_text(i.recipe, "sequence_length = 32", "sequence_length = 256"),
        "sequence_length is 256; expected at most the 128 positions of model 'test'",
    ),
    "missing source": (lambda i: edit_text(i.recipe, "slimpajama", "slimpyjama"), "slimpyjama/train: holds no token"),
    "missing data": (lambda i: shutil.rmtree(i.data), "the data directory is missing"),
    "missing tokenizer": (lambda i: (i.data / "tokenizer.model").unlink(), "the tokenizer is missing"),
    "larger tokenizer": (other_tokenizer(600), "has 600 pieces, but the model's vocabulary is 512"),
    "tokenizer of another hash": (other_tokenizer(512), "was made with a different tokenizer than"),
    "ids beyond the vocabulary": (lower_vocabulary, "holds token id 512, beyond the model's vocabulary of 512"),
    "shard cut short": (
        lambda i: os.truncate(i.data / "slimpajama/train/shard_00000.bin", 100),
        "shard_00000.bin: 100 bytes of uint16, but its manifest has",
    ),
    "another run": (another_run, "run.json: holds a different run: "),
    "checkpoints of an unknown run": (checkpoints_of_nobody, "holds checkpoints but no run.json"),
    "nothing to resume": (lambda i: i.more.extend(["--resume", "must"]), "holds no checkpoint to resume from"),
    "kernel of a GPU": (
        lambda i: i.more.extend(["--attention", "flash_attention_2"]),
        "attention backend 'flash_attention_2' needs a GPU; choose auto or sdpa",
    ),
    "absent monitor": (
        lambda i: edit_json(i.config, comet={"enabled": True}),
        "comet.enabled is true, but the package comet_ml is not installed",
    ),
    "unknown kernel": (lambda i: i.more.extend(["--attention", "flash"]), "attention backend 'flash' is unknown"),
}


@pytest.fixture
def inputs(data_dir: Path, tmp_path: Path) -> Inputs:
    shutil.copytree(data_dir, tmp_path / "data")
    recipe = write_recipe(tmp_path / "small.toml", 8, save_every=8)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    return Inputs(recipe, config, tmp_path / "data", tmp_path / "run", [])


def arguments_of(inputs: Inputs) -> list[str]:
    where = ["--data", inputs.data, "--run-dir", inputs.run_dir, "--num-gpus", inputs.ranks]
    return [*map(str, ["--recipe", inputs.recipe, "--deepspeed-config", inputs.config, *where]), *inputs.more]


def assert_refused(finished: Finished, sentence: str) -> None:
    assert finished.returncode == EXIT_CONFIG, finished.stdout + finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("tinyllama-ds: ")
    assert sentence in lines[0]


@pytest.mark.parametrize("case", CASES)
def test_pretrain_rejects(case: str, inputs: Inputs) -> None:
    spoil, sentence = CASES[case]
    spoil(inputs)
    before = snapshot(inputs.run_dir.parent)
    finished = tinyllama_ds("pretrain", *arguments_of(inputs))
    assert_refused(finished, sentence)
    assert snapshot(inputs.run_dir.parent) == before


def put_gpu(folder: Path) -> str:
    """A PATH with a program in the place of nvidia-smi that lists one GPU, which this build of torch cannot use."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 3, 470.57.02, 9.0'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


GPU_CASES = {
    "unusable": (None, "1 x NVIDIA H100 80GB HBM3"),
    "gap": ("0,,2", "CUDA_VISIBLE_DEVICES is '0,,2': '' is not a GPU"),
    "no such": ("7", "CUDA_VISIBLE_DEVICES is '7': there is no GPU 7; expected 0 to 0"),
    "half hidden": ("0,-1", "CUDA_VISIBLE_DEVICES is '0,-1': '-1' is not a GPU"),
}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU here")


@no_gpu
@pytest.mark.parametrize(
    ("command", "case"), [*product(["pretrain"], GPU_CASES), ("bench", "gap"), ("the script alone", "unusable")]
)
def test_gpus_are_not_left_idle(command: str, case: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    visible, sentence = GPU_CASES[case]
    monkeypatch.setenv("PATH", put_gpu(inputs.run_dir.with_name("bin")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    before = snapshot(inputs.run_dir.parent)
    if command == "the script alone":
        finished = run([sys.executable, "-m", PRETRAIN, *arguments_of(inputs)[:-2]])
    elif command == "bench":
        finished = tinyllama_ds("bench", "--deepspeed-config", inputs.config, "--output", inputs.run_dir)
    else:
        finished = tinyllama_ds("pretrain", *arguments_of(inputs))
    assert_refused(finished, sentence)
    assert snapshot(inputs.run_dir.parent) == before


@no_gpu
@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_are_said_and_left_alone(visible: str, inputs: Inputs) -> None:
    hidden = {"PATH": put_gpu(inputs.run_dir.with_name("bin")), "CUDA_VISIBLE_DEVICES": visible}
    finished = tinyllama_ds("pretrain", *arguments_of(inputs), "--dry-run", **hidden)
    assert finished.returncode == 0, finished.stderr
    assert f"tinyllama-ds: CUDA_VISIBLE_DEVICES is {visible!r}, which hides this machine's 1 GPUs" in finished.stderr
    assert "--num_gpus 2" in finished.stdout


def snapshot(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*"))}


def test_missing_hostfile_never_means_this_machine(inputs: Inputs) -> None:
    arguments = ["--recipe", inputs.recipe, "--deepspeed-config", inputs.config, "--data", inputs.data]
    hostfile = inputs.run_dir.parent / "hosts"
    finished = tinyllama_ds("pretrain", *arguments, "--run-dir", inputs.run_dir, "--hostfile", hostfile)
    assert_refused(finished, f"{hostfile}: the hostfile is missing")
    assert not inputs.run_dir.exists()


def test_the_script_rejects_under_the_bare_launcher(inputs: Inputs) -> None:
    """Without our supervisor in front; the launcher ends rank 0, late to speak, when rank 1 has ended."""
    edit_json(inputs.config, gradient_cliping=0.5)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    arguments = ["--deepspeed_config", inputs.config, "--recipe", inputs.recipe, "--data", inputs.data]
    command = [
        *launcher,
        Path(__file__).parents[2] / "scripts" / "pretrain.py",
        *arguments,
        "--run-dir",
        inputs.run_dir,
    ]
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", FAULT_VARIABLE: "start:0:0:pause"}
    finished = run(list(map(str, command)), **variables)
    assert finished.returncode == EXIT_CONFIG, finished.stderr
    said = [line for line in finished.stderr.splitlines() if line.startswith("tinyllama-ds: ")]
    assert len(said) == 1
    assert "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?" in said[0]
    assert not inputs.run_dir.exists()


def test_prepare_rejects_an_empty_corpus(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "raw").mkdir()
    arguments = ["--input", tmp_path / "raw", "--tokenizer", tokenizer.path, "--output", tmp_path / "out"]
    assert_refused(tinyllama_ds("prepare", "--source", "mine", *arguments), "holds no file of a known kind")
    (tmp_path / "raw" / "a.jsonl").write_text("")
    finished = tinyllama_ds("prepare", "--source", "mine", *arguments)
    assert finished.returncode == EXIT_CONFIG
    assert "a.jsonl: the file is empty" in finished.stderr.splitlines()[-1]
