"""Does the best learning rate hold over widths? Validation losses with muP and without, as a table and a picture.

    python benchmarks/mup_transfer.py DATA --runs runs.jsonl --json benchmarks/results/mup_transfer.json \
        --picture docs/mup.png

DATA holds the source slimpajama, with a vocabulary of at most 512. Every run is a recipe of its own, trained by
PyTorch's AdamW with the parameter groups of `pretrain`, which tests compare with DeepSpeed's. Runs in the file `--runs`
are not repeated. At the base width both parametrizations are the same model.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from tinyllama_ds.bars import progress
from tinyllama_ds.commands.arguments import POSITIVE, Parser, WholeNumber, output_file, output_picture
from tinyllama_ds.config.recipe import Recipe, load_recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.schedule import Schedule
from tinyllama_ds.data.loader import SampleReader, open_streams
from tinyllama_ds.data.order import planned_order
from tinyllama_ds.evaluation.validation import ValidationSet
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model
from tinyllama_ds.model.param_groups import group_parameters

SOURCE, VOCABULARY, LENGTH, BATCH, HEAD = "slimpajama", 512, 64, 16, 16
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
WARMUP, FLOOR = 0.1, 0.1  # of the steps, of the peak
RECIPE = """
sequence_length = {LENGTH}
seed = {seed}
validation_samples = 256
[model]
vocab_size = {VOCABULARY}
hidden_size = {width}
intermediate_size = {intermediate}
num_hidden_layers = 2
num_attention_heads = {heads}
num_key_value_heads = {key_heads}
max_position_embeddings = {LENGTH}
rms_norm_eps = 1e-5
[[stages]]
tokens = {tokens}
global_batch_tokens = {batch_tokens}
weights = {{ {SOURCE} = 1 }}
"""
MUP = "[mup]\nbase_hidden_size = {base}\n"
Key = tuple[bool, int, float, int]  # with muP, width, learning rate, seed


def recipe_of(key: Key, steps: int, base: int) -> Recipe:
    """The recipe of a run: a Llama whose width is heads of 16, over two layers."""
    with_mup, width, _, seed = key
    values = {"LENGTH": LENGTH, "VOCABULARY": VOCABULARY, "SOURCE": SOURCE, "seed": seed, "width": width}
    values |= {"heads": width // HEAD, "key_heads": width // HEAD // 2, "intermediate": 11 * width // 4}
    values |= {"tokens": steps * BATCH * LENGTH, "batch_tokens": BATCH * LENGTH}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "transfer.toml")
        path.write_text(RECIPE.format(**values) + (MUP.format(base=base) if with_mup else ""))
        return load_recipe(str(path))


def train(recipe: Recipe, learning_rate: float, data: Path) -> float:
    """The validation loss after all steps of a recipe."""
    plan = RunPlan(recipe)
    streams = open_streams(data, recipe.sources, "train", VOCABULARY)
    order = planned_order(recipe, plan, {name: stream.num_samples(LENGTH) for name, stream in streams.items()}, [])
    reader = SampleReader(streams, order, LENGTH, VOCABULARY)
    schedule = Schedule(int(WARMUP * plan.total_tokens), 0.0, ((0, plan.total_tokens),), "cosine", FLOOR)
    model = build_model(recipe.model, "sdpa", recipe.seed)
    optimizer = torch.optim.AdamW(groups_of(model), betas=BETAS)
    for step in plan.steps(0):
        tokens = torch.from_numpy(reader.read(np.arange(step.first_position, step.first_position + step.batch)))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule.ratio(step.tokens_after) * group["lr_multiplier"]
        optimizer.step()
        optimizer.zero_grad()
    return validate(model, data, recipe.validation_samples)


def groups_of(model: LlamaForCausalLM) -> list[dict]:
    """The parameter groups of `pretrain`, as PyTorch takes them."""
    return [
        {
            "params": members,
            "lr_multiplier": own.lr_multiplier,
            "weight_decay": WEIGHT_DECAY * own.weight_decay_multiplier,
        }
        for own, members in group_parameters(model.named_parameters(), model.config.width_multiplier).items()
    ]


@torch.no_grad()
def validate(model: LlamaForCausalLM, data: Path, samples: int) -> float:
    """The mean loss over the validation samples, infinite where it is not a number."""
    [stream] = open_streams(data, [SOURCE], "validation", VOCABULARY).values()
    batches = ValidationSet(SOURCE, stream, LENGTH, samples).batches(0, 1, samples)
    loss = np.mean([model(inputs, labels).item() for _, inputs, labels in batches])
    return float(loss) if np.isfinite(loss) else float("inf")


def keys_of(widths: list[int], base: int, exponents: list[int], seeds: int) -> Iterator[Key]:
    """Every run of the grid, narrow ones first; at the base width with muP is without it."""
    rates = [2.0**exponent for exponent in exponents]
    for seed, width, rate, with_mup in product(range(1, seeds + 1), sorted(widths), rates, (False, True)):
        if not (with_mup and width == base):
            yield with_mup, width, rate, seed


def curves_of(losses: dict[Key, float], base: int) -> dict[bool, dict[int, dict[float, float]]]:
    """By parametrization and width, the loss over the learning rate, as the mean over seeds."""
    found: dict = {False: {}, True: {}}
    for with_mup, width, rate in sorted({key[:3] for key in losses}):
        mean = float(np.mean([loss for key, loss in losses.items() if key[:3] == (with_mup, width, rate)]))
        for kind in (False, True) if width == base else (with_mup,):
            found[kind].setdefault(width, {})[rate] = mean
    return found


def optimum_of(line: dict[float, float]) -> float:
    """The lowest point of a parabola through the best learning rate and its neighbours, in log2 of the rate."""
    rates = sorted(line)
    place = rates.index(min(line, key=line.__getitem__))
    if place in (0, len(rates) - 1):
        return rates[place]
    before, best, after = (line[rate] for rate in rates[place - 1 : place + 2])
    return rates[place] * 2 ** (0.5 * (before - after) / (before - 2 * best + after))


def draw(curves: dict, output: Path) -> None:
    """Loss over learning rate, a line per width, without muP on the left and with it on the right."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    lowest = min(min(line.values()) for lines in curves.values() for line in lines.values())
    for axis, (with_mup, lines) in zip(figure.subplots(1, 2, sharey=True), curves.items(), strict=True):
        for number, (width, line) in enumerate(sorted(lines.items())):
            color, best = f"C{number}", min(line, key=line.__getitem__)
            axis.plot(line.keys(), line.values(), marker="o", markersize=4, color=color, label=f"width {width}")
            axis.plot(best, line[best], marker="*", markersize=14, color=color)
        axis.set_xscale("log", base=2)
        axis.set(
            xlabel="peak learning rate", title="muP" if with_mup else "standard", ylim=(lowest - 0.1, lowest + 1.2)
        )
        axis.grid(alpha=0.3)
    figure.axes[0].legend(title="star: the best", loc="upper center")
    figure.axes[0].set_ylabel("validation loss, nats per token")
    figure.savefig(output, dpi=100)


def report(curves: dict, steps: int, seeds: int) -> dict:
    """The result as JSON: every loss, and the best learning rate of each width."""
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    rows = [
        {
            "mup": with_mup,
            "width": width,
            "best_learning_rate": min(line, key=line.__getitem__),
            "parabola": round(optimum_of(line), 5),
            "losses": {str(rate): round(loss, 4) for rate, loss in line.items()},
        }
        for with_mup, lines in curves.items()
        for width, line in sorted(lines.items())
    ]
    return {
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "seeds": seeds,
        "machine": machine | versions,
        "rows": rows,
    }


def main() -> None:
    """Train what is not there yet; print the table, write JSON and picture."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("data", type=Path)
    add("--runs", type=Path, required=True, help="file of finished runs, a line for each")
    add("--widths", type=WholeNumber(2 * HEAD, 4096), nargs="+", default=[32, 64, 128, 256])
    add("--base", type=WholeNumber(2 * HEAD, 4096), default=64, help="width of muP's base")
    add(
        "--exponents",
        type=WholeNumber(-30, 10),
        nargs="+",
        default=list(range(-9, -2)),
        help="of 2: the learning rates",
    )
    add("--steps", type=POSITIVE, default=200)
    add("--seeds", type=POSITIVE, default=1)
    add("--report", action="store_true", help="train nothing: report the runs that are there")
    add("--json", type=output_file)
    add("--picture", type=output_picture)
    options = parser.parse_args()
    lines = options.runs.read_text().splitlines() if options.runs.exists() else []
    losses: dict[Key, float] = {(*key,): loss for key, loss in map(json.loads, lines)}
    keys = list(keys_of(options.widths, options.base, options.exponents, options.seeds))
    if not options.report:
        train_absent(keys, losses, options)
    curves = curves_of({key: losses[key] for key in keys if key in losses}, options.base)
    found = report(curves, options.steps, options.seeds)
    for row in found["rows"]:
        name = "muP" if row["mup"] else "standard"
        print(f"{name:>8} {row['width']:>5}  best {row['best_learning_rate']:.5f}"
              f"  parabola {row['parabola']:.5f}  losses", *row["losses"].values())  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.picture:
        draw(curves, options.picture)


def train_absent(keys: list[Key], losses: dict[Key, float], options: argparse.Namespace) -> None:
    """Train what has no loss yet, and add each to the file of runs."""
    torch.set_num_threads(1)
    for key in progress(keys, total=len(keys), desc="mup", unit="run"):
        if key not in losses:
            losses[key] = train(recipe_of(key, options.steps, options.base), key[2], options.data)
            with options.runs.open("a") as file:
                file.write(json.dumps([key, losses[key]]) + "\n")


if __name__ == "__main__":
    main()
