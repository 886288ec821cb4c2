"""The curves of a run as a picture, and where it stands as a table."""

import json
from pathlib import Path
from typing import Any

from tinyllama_ds.errors import Refusal


def read_metrics(run_dir: Path) -> list[dict]:
    """All rows of a run's metrics.jsonl; a last one that was cut short is left out."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise Refusal(f"{path}: is missing; expected the directory of a run that has logged a step")
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def summarise(rows: list[dict]) -> dict[str, float]:
    """The last value of every figure, and the median rate of the run."""
    summary: dict[str, float] = {}
    for row in rows:
        summary |= row
    rates = sorted(row["Speed/TokensPerSecond"] for row in rows if "Speed/TokensPerSecond" in row)
    if rates:
        summary["Speed/MedianTokensPerSecond"] = rates[len(rates) // 2]
    return summary


def draw(rows: list[dict], output: Path, title: str) -> None:
    """Loss over tokens with the validation losses, learning rate, gradient norm and speed, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    _draw_losses(axes[0, 0], rows)
    for axis, name, label in (
        (axes[0, 1], "Train/LearningRate", "learning rate"),
        (axes[1, 0], "Train/GradNorm", "gradient norm before clipping"),
        (axes[1, 1], "Speed/TokensPerSecond", "tokens per second"),
    ):
        axis.plot(*_series(rows, name), linewidth=1)
        axis.set(xlabel="tokens", ylabel=label, ylim=(0, None))
    for axis in axes.flat:
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def _draw_losses(axis: Any, rows: list[dict]) -> None:
    axis.plot(*_series(rows, "Train/Loss"), linewidth=1, alpha=0.6, label="training, every step")
    prefix = "Validation/Loss/"
    for name in sorted({key for row in rows for key in row if key.startswith(prefix)}):
        tokens, losses = _series(rows, name)
        axis.plot(tokens, losses, marker="o", label=f"validation {name.removeprefix(prefix)}: {losses[-1]:.2f}")
    axis.set(xlabel="tokens", ylabel="loss (nats per token)")
    axis.legend()


def _series(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    chosen = [(row["tokens"], row[name]) for row in rows if name in row]
    return [tokens for tokens, _ in chosen], [value for _, value in chosen]
