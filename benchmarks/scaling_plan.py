"""Efficiency on paper: TinyLlama v1 on more and more A100, the best layout for each network, as a table and a picture.

    python benchmarks/scaling_plan.py --json benchmarks/results/scaling_plan.json --picture docs/scaling.png

Pure arithmetic of tinyllama_ds/planning; what of it was measured is in docs/planning.md.
"""

import json
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from tinyllama_ds.commands.arguments import Parser, WholeNumber, output_file, output_picture
from tinyllama_ds.config.recipe import Recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.hardware.gpus import gpu_named, network_of
from tinyllama_ds.planning.communication import Hosts
from tinyllama_ds.planning.plan import PlanRequest, read_inputs
from tinyllama_ds.planning.search import search
from tinyllama_ds.planning.timing import Machines, executed_flops

GPU, PER_HOST, EFFICIENCY = gpu_named("a100-40g"), 8, 0.518
NETWORKS, SIZES = (25, 100, 400), (8, 16, 64, 512, 1024)  # Gbit/s out of a host; GPUs
BATCHES = (1, 4)  # times TinyLlama's 2,097,152 tokens
CONFIG = Path(__file__).parents[1] / "ds_configs" / "zero3.json"


def larger_batch(recipe: Recipe, times: int) -> Recipe:
    """The recipe with so many times its global batch."""
    stages = tuple(replace(s, global_batch_tokens=times * s.global_batch_tokens) for s in recipe.stages)
    return replace(recipe, stages=stages)


def best(gpus: int, gbit: float, times: int) -> dict:
    """The winner of the search, and the share of its time in which it computes without recomputing."""
    inputs = read_inputs("tinyllama-v1", CONFIG)
    recipe = larger_batch(inputs.recipe, times)
    inputs = replace(inputs, recipe=recipe, plan=RunPlan(recipe))
    hosts, flops = Hosts(max(1, gpus // PER_HOST), min(gpus, PER_HOST)), EFFICIENCY * GPU.peak_flops
    machines = Machines(hosts, GPU, network_of(GPU, gbit), flops, "")
    winner = search(PlanRequest("tinyllama-v1", CONFIG, machines, is_compiled=True), inputs, {}).candidates[0]
    ideal = flops / executed_flops(inputs.model, recipe.sequence_length)
    rate, batch = winner.longest_step.tokens_per_second_per_gpu, recipe.stages[0].global_batch_tokens
    row = {"gpus": gpus, "gbit": gbit, "batch_tokens": batch, "layout": winner.layout.name}
    row |= {"micro_batch": winner.work.micro_batch, "tokens_per_second_per_gpu": rate}
    return row | {"efficiency": rate / ideal}


def draw(rows: list[dict], output: Path) -> None:
    """Efficiency over GPUs, a line per network, a panel per batch."""
    figure, sizes = Figure(figsize=(11, 4), layout="constrained"), sorted({row["gpus"] for row in rows})
    for axis, times in zip(figure.subplots(1, len(BATCHES), sharey=True), BATCHES, strict=True):
        batch = times * 2_097_152
        for gbit in NETWORKS:
            line = [row for row in rows if (row["gbit"], row["batch_tokens"]) == (gbit, batch)]
            axis.plot(range(len(line)), [row["efficiency"] for row in line], marker="o", label=f"{gbit} Gbit/s")
        axis.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        axis.set(xlabel="A100-40G, 8 per host with NVLink", title=f"{batch:,} tokens per step", ylim=(0, 1.05))
        axis.grid(alpha=0.3)
    axis.legend(title="between hosts")
    figure.axes[0].set_ylabel("efficiency of the best layout")
    figure.savefig(output, dpi=100)


def main() -> None:
    """Print the table; write JSON and picture."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=output_file)
    parser.add_argument("--picture", type=output_picture)
    parser.add_argument(
        "--gpus", type=WholeNumber(1, 1_000_000), nargs="+", default=list(SIZES), help="default: %(default)s"
    )
    options = parser.parse_args()
    rows = [best(size, gbit, times) for times in BATCHES for gbit in NETWORKS for size in options.gpus]
    for row in rows:
        print(f"{row['batch_tokens']:>10,} {row['gbit']:>4} Gbit/s {row['gpus']:>5} GPUs  {row['layout']:<11}"
              f" micro-batch {row['micro_batch']:>2}  {row['tokens_per_second_per_gpu']:>7,.0f}"
              f"  {row['efficiency']:.1%}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
