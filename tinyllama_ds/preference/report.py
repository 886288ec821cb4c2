"""What a preference tuning has done: a table, its rows by step, and a picture."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tinyllama_ds.text_table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS, MARGIN, ACCURACY = "loss", "rewards/margins", "rewards/accuracies"
_SHOWN = {LOSS: "loss", MARGIN: "margin", ACCURACY: "accuracy"}
_EVAL = "eval_"
Row = dict[str, float]


def split_history(history: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of training steps, and those of the validation file under the same names; the summary is neither."""
    training = [row for row in history if LOSS in row]
    validation = [
        {name.removeprefix(_EVAL): value for name, value in row.items()} for row in history if f"{_EVAL}{LOSS}" in row
    ]
    return training, validation


def summary(history: list[Row]) -> dict[str, dict[str, float]]:
    """Loss, margin and accuracy of the first and the last tenth of the steps, and of the last validation.

    Before the first step all margins are 0: the model is its own reference.
    """
    training, validation = split_history(history)
    part = max(1, len(training) // 10)
    found = {"first steps": _means(training[:part]), "last steps": _means(training[-part:])}
    if validation:
        found["validation"] = _means(validation[-1:])
    return found


def _means(rows: list[Row]) -> dict[str, float]:
    return {name: sum(row[key] for row in rows) / len(rows) for key, name in _SHOWN.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """The summary for people."""
    rows = [[name, *(f"{value:.4f}" for value in values.values())] for name, values in found.items()]
    return text_table(rows, ["", *_SHOWN.values()])


def picture_of(history: list[Row], title: str) -> "Figure":
    """Loss, margin and accuracy by step, each with its validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    figure.suptitle(title)
    training, validation = split_history(history)
    for axis, (key, name) in zip(figure.subplots(1, len(_SHOWN)), _SHOWN.items(), strict=True):
        _draw(axis, training, key, label="training")
        if validation:
            _draw(axis, validation, key, label="validation", marker="o")
            axis.legend()
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    return figure


def _draw(axis: "object", rows: Iterable[Row], key: str, **style: str) -> None:
    steps, values = zip(*((row["step"], row[key]) for row in rows), strict=True)
    axis.plot(steps, values, **style)  # type: ignore[attr-defined]
