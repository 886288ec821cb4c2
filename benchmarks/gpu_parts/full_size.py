"""TinyLlama-1.1B for thirty steps on real shards: what a save costs, the resume, and the export."""

import shutil
import sys
import time

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
from tinyllama_ds.checkpoint.format import find_checkpoints

SHAPES = {False: Shape("tinyllama-1.1b", 2048, 16, 30, 15), True: Shape("test", 64, 8, 30, 15)}
SAME_CURVE = 2e-2  # relative, in bf16


def train(part: Part) -> bool:
    """One start of the run; whether it came to its end."""
    run_dir = part.work / "full_size"
    recipe = SHAPES[part.rehearse].write(part.work / "full_size.toml")
    config = own_config(part, "zero3_keep", micro_batch=8)
    finished = tinyllama_ds(
        "pretrain", "--recipe", recipe, "--deepspeed-config", config, "--data", part.work / "data",
        "--run-dir", run_dir, "--num-gpus", 1,
    )  # fmt: skip
    if finished.returncode:
        part.figures.check("pretrain", False, f"pretrain: {last_words(finished)}")
    return finished.returncode == 0


def report_run(part: Part, seconds: float) -> None:
    """Speed, memory and saves of the first start."""
    run_dir, shape, put = part.work / "full_size", SHAPES[part.rehearse], part.figures.put
    curve, rate = losses(run_dir), best_rate(run_dir)
    peak = max(row.get("Memory/PeakGiB", 0.0) for row in rows(run_dir))
    put("seconds", seconds)
    put("tokens_per_second", rate, f"{shape.model}, {len(curve)} steps on real shards, start to end {seconds:.0f} s:"
        f" {rate:,.0f} tokens/s, peak {peak:.2f} GiB")  # fmt: skip
    put("losses", curve, f"loss {curve[1]:.3f} to {curve[shape.steps]:.3f}")
    saves = [row for row in rows(run_dir) if "Checkpoint/StallSeconds" in row]
    stalls = [row["Checkpoint/StallSeconds"] for row in saves]
    put("save_seconds", [row["Checkpoint/Seconds"] for row in saves])
    put("stall_seconds", stalls, f"save of {saves[0]['Checkpoint/GiB']:.2f} GiB: training stall"
        f" {stalls[0]:.2f} s, the last save was waited for {stalls[-1]:.2f} s")  # fmt: skip


def resume(part: Part) -> None:
    """The second half again from the save in the middle."""
    run_dir, shape = part.work / "full_size", SHAPES[part.rehearse]
    before = losses(run_dir)
    shutil.rmtree(find_checkpoints(run_dir)[-1])
    started = time.perf_counter()
    if not train(part):
        return
    seconds, after = time.perf_counter() - started, losses(run_dir)
    again = range(shape.save_steps + 1, shape.steps + 1)
    difference = max(abs(after[step] / before[step] - 1) for step in again)
    text = f"resumed at step {shape.save_steps}, to the end in {seconds:.0f} s: losses equal to {difference:.1e}"
    part.figures.check("resume", difference < SAME_CURVE, text)


def export(part: Part) -> None:
    """A Hugging Face folder, verified equal."""
    started = time.perf_counter()
    finished = tinyllama_ds("export", part.work / "full_size", part.work / "full_size_hf")
    said = finished.stdout.strip().splitlines()[-1:] or [""]
    text = said[0].rsplit(": ")[-1] if finished.returncode == 0 else last_words(finished)
    took = time.perf_counter() - started
    part.figures.check("export", finished.returncode == 0, f"export in {took:.0f} s: {text}")


def main(part: Part) -> int:
    """The run, its resume, its export."""
    demo_data(part)
    started = time.perf_counter()
    if train(part):
        report_run(part, time.perf_counter() - started)
        resume(part)
        export(part)
    return part.figures.end()


if __name__ == "__main__":
    sys.exit(main(part_of_arguments("full_size")))
