"""Bytes that two hosts of two ranks send each other per optimizer step under each ZeRO layout.

    python benchmarks/host_traffic.py --json benchmarks/results/host_traffic.json

Needs root: the hosts are namespaces of this machine (tests/hosts.py), the bytes are their interface counters.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from conftest import made_up_text, prepare_small_data  # noqa: E402
from hosts import Host, start_hosts  # noqa: E402
from launching import STEP_TOKENS, write_deepspeed_config, write_recipe  # noqa: E402

from tinyllama_ds.commands.arguments import Parser, WholeNumber, output_file  # noqa: E402
from tinyllama_ds.data.tokenizers.train_tokenizer import train_tokenizer  # noqa: E402
from tinyllama_ds.model.config import model_config  # noqa: E402

LAYOUTS: dict[str, tuple[int, dict]] = {
    "zero1": (1, {}), "zero2": (2, {}), "zero3": (3, {}), "zero3_hpz": (3, {"zero_hpz_partition_size": 2}),
}  # fmt: skip
MICRO_BATCH = 1  # two per step


def measure(name: str, steps: int, hosts: list[Host], data: Path, folder: Path) -> dict:
    """A run of its own; what start and end send is a small part of it."""
    stage, changes = LAYOUTS[name]
    recipe = write_recipe(folder / "recipe.toml", steps, save_every=steps)
    recipe.write_text(recipe.read_text().replace("log_steps = 1", f"log_steps = {steps}"))
    config = write_deepspeed_config(folder / f"{name}.json", stage, MICRO_BATCH)
    content = json.loads(config.read_text())
    content["zero_optimization"] |= changes
    config.write_text(json.dumps(content))
    (folder / "hostfile").write_text("".join(f"{host.name} slots=2\n" for host in hosts))
    before = hosts[0].sent_bytes()
    finished = hosts[0].tinyllama_ds(
        *("pretrain", "--recipe", recipe, "--deepspeed-config", config, "--data", data),
        *("--run-dir", folder / name, "--hostfile", folder / "hostfile"),
    )
    assert finished.returncode == 0, finished.stderr
    sent = (hosts[0].sent_bytes() - before) / steps
    weights = 4 * model_config("test").num_parameters
    return {"layout": name, "bytes_per_step": round(sent), "times_the_weights": round(sent / weights, 2)}


def main() -> None:
    """Print the table, write the JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--steps", type=WholeNumber(6, 100_000), default=200, help="more than the warmup's 5 (default: %(default)s)"
    )
    parser.add_argument("--json", type=output_file)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "hosts").mkdir()
        texts = [made_up_text(seed, 2000) for seed in range(20)]
        data = prepare_small_data(folder, train_tokenizer(texts, 512, folder / "tokenizer.model").path)
        with start_hosts(2, folder / "hosts") as hosts:
            rows = [measure(layout, options.steps, hosts, data, folder) for layout in options.layouts]
    for row in rows:
        print(
            f"{row['layout']:12}{row['bytes_per_step']:>12,} bytes per step, {row['times_the_weights']} x the weights"
        )
    if options.json:
        options.json.write_text(json.dumps({"step_tokens": STEP_TOKENS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
