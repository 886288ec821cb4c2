"""A small model through `tinyllama-ds pretrain` on one GPU: everything that happens to a run, each with a verdict."""

import json
import math
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess

from gpu_parts.common import (
    Part,
    Shape,
    best_rate,
    demo_data,
    last_words,
    losses,
    own_config,
    part_of_arguments,
    rows,
    tinyllama_ds,
)
from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest

SHAPES = {True: Shape("test", 64, 8, 24, 8), False: Shape("demo", 256, 16, 48, 16)}  # by whether it is rehearsed
SAME_CURVE = 2e-2  # relative, in bf16: another ZeRO stage adds up in another order


def pretrain(part: Part, config: str, run_dir: Path, *more: object, **environment: str) -> CompletedProcess[str]:
    """One rank on the demo corpus, with a shipped config."""
    recipe = SHAPES[part.rehearse].write(part.work / "lifecycle.toml")
    path = own_config(part, config, micro_batch=SHAPES[part.rehearse].batch // 2)
    arguments = ("--recipe", recipe, "--deepspeed-config", path, "--data", part.work / "data")
    return tinyllama_ds("pretrain", *arguments, "--run-dir", run_dir, "--num-gpus", 1, *more, **environment)


def train_and_kill(part: Part, run_dir: Path) -> bool:
    """A whole run whose rank is killed between two saves; whether it got to its end."""
    shape, check = SHAPES[part.rehearse], part.figures.check
    doomed = shape.save_steps + shape.save_steps // 2
    finished = pretrain(part, "zero3", run_dir, TINYLLAMA_DS_FAULT=f"step.before_optimizer:0:{doomed}:kill")
    said = next((line for line in finished.stdout.splitlines() if "ZeRO-" in line), "")
    check("pretrain", finished.returncode == 0, said or f"pretrain, ZeRO-3: {last_words(finished)}")
    if finished.returncode:
        return False
    first = next((row for row in rows(run_dir) if any(key.startswith("Validation/Loss") for key in row)), {})
    validation = {key.split("/")[-1]: value for key, value in first.items() if key.startswith("Validation/Loss")}
    is_untrained = first.get("step") == 0 and all(math.isfinite(value) for value in validation.values())
    text = ", ".join(f"{name} {value:.3f}" for name, value in validation.items())
    check("validation", is_untrained, f"validation at step {first.get('step')}: {text}")
    curve = losses(run_dir)
    values = [curve.get(step, math.nan) for step in range(1, shape.steps + 1)]
    is_curve = all(map(math.isfinite, values)) and values[-1] < values[0]
    check("curve", is_curve, f"loss of {len(curve)} steps: {values[0]:.3f} to {values[-1]:.3f}")
    part.figures.put("tokens_per_second", best_rate(run_dir))
    return True


def check_saves(part: Part, run_dir: Path) -> None:
    """What the saves hold, and that the killed run went on from one of them."""
    shape, check = SHAPES[part.rehearse], part.figures.check
    manifests = [read_manifest(folder) for folder in find_checkpoints(run_dir)]
    steps = [manifest.progress.step for manifest in manifests]
    expected = list(range(shape.save_steps, shape.steps + 1, shape.save_steps))
    check("saves", steps == expected, f"saves at steps {', '.join(map(str, steps))}")
    probes = [manifest.health.probe.loss for manifest in manifests if manifest.health.probe]
    is_probed = len(probes) == len(steps) and all(map(math.isfinite, probes))
    check("probe", is_probed, f"probe's loss in every save: {', '.join(f'{loss:.4f}' for loss in probes)}")
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    is_resumed = [start["step"] for start in starts] == [0, shape.save_steps]
    check("resume", is_resumed, f"killed (SIGKILL), resumed by itself at step {starts[-1]['step']}, probe equal")


def change_stage(part: Part, run_dir: Path) -> None:
    """The last stretch again under ZeRO-1, from what ZeRO-3 saved: the same losses."""
    shape = SHAPES[part.rehearse]
    before = losses(run_dir)
    shutil.rmtree(find_checkpoints(run_dir)[-1])
    finished = pretrain(part, "zero1", run_dir, "--resume", "must")
    if finished.returncode:
        part.figures.check("other_stage", False, f"ZeRO-3 to ZeRO-1: {last_words(finished)}")
        return
    after = losses(run_dir)
    again = range(shape.steps - shape.save_steps + 1, shape.steps + 1)
    difference = max(abs(after[step] / before[step] - 1) for step in again)
    text = f"ZeRO-3 to ZeRO-1 at step {again[0] - 1}: losses of {len(again)} steps equal to {difference:.1e}"
    part.figures.check("other_stage", difference < SAME_CURVE, text)


def export_and_generate(part: Part, run_dir: Path) -> None:
    """A Hugging Face folder, whose logits `export` compares, and a text from it."""
    folder = part.work / "lifecycle_hf"
    finished = tinyllama_ds("export", run_dir, folder)
    said = finished.stdout.strip().splitlines()[-1:] or [""]
    text = said[0].rsplit(": ")[-1] if finished.returncode == 0 else last_words(finished)
    part.figures.check("export", finished.returncode == 0, f"export: {text}")
    finished = tinyllama_ds("generate", folder, "def load_model(path):", "--max-new-tokens", 16)
    is_text = finished.returncode == 0 and len(finished.stdout.strip()) > 0
    text = repr(finished.stdout.strip())[:80] if is_text else last_words(finished)
    part.figures.check("generate", is_text, f"generate: {text}")


def main(part: Part) -> int:
    """All of it; where the run itself fails there is nothing to look at."""
    demo_data(part)
    run_dir = part.work / "lifecycle"
    if train_and_kill(part, run_dir):
        check_saves(part, run_dir)
        change_stage(part, run_dir)
        export_and_generate(part, run_dir)
    return part.figures.end()


if __name__ == "__main__":
    sys.exit(main(part_of_arguments("lifecycle")))
