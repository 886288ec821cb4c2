"""`tinyllama-ds bench`: measures a grid of settings, each in fresh processes, and recommends one."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.distributed.session import run_in_session
from tinyllama_ds.text_table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Setting = dict[str, str | int | bool]
Row = dict  # a setting and its measurements, or a setting and its `error`

_COLUMNS = (
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("of matmul", "measured_mfu", "{:.1%}"),
    ("GiB", "peak_gib", "{:.2f}"),
    ("data", "seconds_data", "{:.3f}"),
    ("forward", "seconds_forward", "{:.3f}"),
    ("backward", "seconds_backward", "{:.3f}"),
    ("comm.", "seconds_communication", "{:.3f}"),
    ("optimizer", "seconds_step", "{:.3f}"),
)


def grid(
    configs: Iterable[Path], micro_batches: Iterable[int], attentions: Iterable[str], compiled: Iterable[bool]
) -> list[Setting]:
    """Every combination, the ZeRO file changing slowest."""
    return [
        {"deepspeed_config": str(config), "micro_batch": size, "attention": attention, "compile": is_compiled}
        for config, size, attention, is_compiled in product(configs, micro_batches, attentions, compiled)
    ]


def name_of(setting: Setting) -> str:
    """A short name for tables and pictures."""
    compiled = ", compiled" if setting["compile"] else ""
    config = Path(str(setting["deepspeed_config"])).stem
    return f"{config}, micro-batch {setting['micro_batch']}, {setting['attention']}{compiled}"


def measure_all(
    settings: list[Setting], command_of: Callable[[list[str]], list[str]], environment: dict[str, str]
) -> Iterator[Row]:
    """Measure one setting after the other; `command_of` puts a launcher in front of the arguments of a measurement.

    A setting that fails, such as out of memory, becomes a row with the line of its error; the others still run.
    """
    for setting in settings:
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as stderr:
            output = Path(folder) / "metrics.json"
            run_in_session(command_of([*_arguments(setting), "--output", str(output)]), environment, stderr)
            if output.is_file():
                yield setting | json.loads(output.read_text())
            else:
                stderr.seek(0)
                yield setting | {"error": cause(stderr.read())}


def _arguments(setting: Setting) -> list[str]:
    arguments = []
    for key, value in setting.items():
        option = f"--{key.replace('_', '-')}"
        if value is True:
            arguments.append(option)
        elif value is not False:
            arguments += [option, str(value)]
    return arguments


def cause(stderr: str) -> str:
    """The line that names the exception, not the launcher's output after it or the error of a rank that lost a peer."""
    lines = [line.strip() for line in stderr.splitlines()]
    config_errors = [line for line in lines if line.startswith("tinyllama-ds:")]
    errors = [line for line in lines if "Error" in line]
    causes = [line for line in errors if not line.startswith("torch.distributed.Dist")]
    for found in (config_errors, causes, errors):
        if found:
            return found[-1][:200]
    return "no result and no error; run it alone to see why"


def table(rows: list[Row]) -> str:
    """A line per setting, seconds per optimizer step; communication overlaps with forward and backward."""
    lines = [
        [name_of(row), row["error"]]
        if "error" in row
        else [name_of(row), *(_cell(form, row.get(key, 0.0)) for _, key, form in _COLUMNS)]
        for row in rows
    ]
    return text_table(lines, ["", *(title for title, _, _ in _COLUMNS)])


def _cell(form: str, value: float | None) -> str:
    return "above peak" if value is None else form.format(value)


def advice(rows: list[Row]) -> str:
    """The recommended setting: the fastest, unless another within 2 % of it needs a tenth less memory."""
    measured = [row for row in rows if "error" not in row]
    if not measured:
        return "no setting ran"
    fastest = max(measured, key=lambda row: row["tokens_per_second"])
    close = [row for row in measured if row["tokens_per_second"] >= 0.98 * fastest["tokens_per_second"]]
    smallest = min(close, key=lambda row: row["peak_gib"])
    best = smallest if smallest["peak_gib"] <= 0.9 * fastest["peak_gib"] else fastest
    flags = f"--deepspeed-config {best['deepspeed_config']} --attention {best['attention']}"
    flags += f" --compile {'on' if best['compile'] else 'off'}"
    return (
        f"recommended: {name_of(best)}: {best['tokens_per_second']:,.0f} tokens/s, {best['peak_gib']:.2f} GiB\n"
        f'pretrain {flags}, with "train_micro_batch_size_per_gpu": {best["micro_batch"]}'
    )


def picture_of(rows: list[Row], title: str) -> "Figure":
    """Tokens per second of every setting and where its step's time goes."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if "error" not in row]
    names = [name_of(row) for row in measured]
    figure = Figure(figsize=(13, 1.5 + 0.5 * len(rows)), layout="constrained")
    rates, split = figure.subplots(1, 2, sharey=True)
    labels = [f"{_cell('{:.0%}', row['mfu'])} MFU, {row['peak_gib']:.1f} GiB" for row in measured]
    bars = rates.barh(names, [row["tokens_per_second"] for row in measured], color="tab:blue")
    rates.bar_label(bars, labels=labels, padding=3)
    rates.set(xlabel="tokens per second, all ranks")
    rates.margins(x=0.35)
    rates.invert_yaxis()
    left = [0.0] * len(measured)
    for phase in ("data", "forward", "backward", "step"):
        seconds = [row.get(f"seconds_{phase}", 0.0) for row in measured]
        split.barh(names, seconds, left=left, label="optimizer" if phase == "step" else phase)
        left = [sum(pair) for pair in zip(left, seconds, strict=True)]
    split.set(xlabel="seconds per optimizer step on rank 0")
    split.legend()
    figure.suptitle(title)
    return figure
