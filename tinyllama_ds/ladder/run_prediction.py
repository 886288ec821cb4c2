"""The losses that a finished ladder predicts of one run: for `plan` before it starts, for `report` next to its own."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_ds.config.recipe import Recipe, recipe_of_run
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.ladder.fit import COVERAGE
from tinyllama_ds.ladder.page import draw_predicted, finish, interval_text, predicted_table
from tinyllama_ds.ladder.result import Prediction, SourceFit, read_result
from tinyllama_ds.page import Chart, Table, chart
from tinyllama_ds.report.history import History

_LOSS = "Validation/Loss/"
_PARTS = (0.25, 0.5, 0.75, 1.0)  # of the tokens
_CURVE = 100  # points of a drawn curve


@dataclass(frozen=True)
class Predicted:
    """Of a recipe: a model that is finished at any number of tokens up to its own."""

    fits: Mapping[str, SourceFit]  # by source
    parameters: int
    tokens: int

    def table(self) -> Table:
        """At some numbers of tokens."""
        tokens = [round(part * self.tokens) for part in _PARTS]
        return predicted_table(self.fits, self.parameters, tokens, "Predicted validation loss")

    def charts(self) -> list[Chart]:
        """One per source."""
        title = "Predicted loss of a model that is finished at so many tokens"
        return [chart(partial(self.draw, source=source), f"{title}, {source}", is_wide=True) for source in self.fits]

    def draw(self, axis: Any, source: str, first: float | None = None) -> None:
        """From `first` tokens on."""
        tokens = np.geomspace(first or self.tokens / _CURVE, self.tokens, _CURVE)
        draw_predicted(axis, self.fits[source], self.parameters, tokens)
        finish(axis, "loss, nats per token")

    def at(self, source: str, tokens: int) -> Prediction:
        """Of one source."""
        return self.fits[source].predictions(self.parameters, [tokens])[0]

    def as_dict(self) -> dict[str, dict]:
        """By source, at the end."""
        return {source: asdict(self.at(source, self.tokens)) for source in self.fits}


def predict(directory: Path, recipe: Recipe) -> Predicted:
    """What the ladder of a directory predicts of a recipe; raises `ConfigError` where it cannot."""
    result = read_result(directory)
    return Predicted(result.of_recipe(recipe), recipe.model.num_parameters, RunPlan(recipe).total_tokens)


@dataclass(frozen=True)
class Compared:
    """Predicted and measured losses of a run, at its last validation."""

    predicted: Predicted
    history: History
    measured: Mapping[str, tuple[int, float]]  # by source: tokens and loss

    def tables(self) -> list[Table]:
        """One row per source."""
        rows = []
        for source, (tokens, loss) in self.measured.items():
            one = self.predicted.at(source, tokens)
            is_inside = one.low <= loss <= one.high
            rows.append(
                (
                    *(source, f"{tokens:,}", f"{one.loss:.3f}", interval_text(one), f"{loss:.3f}"),
                    *(f"{loss - one.loss:+.3f}", "yes" if is_inside else "NO"),
                )
            )
        head = ("source", "tokens", "predicted", f"{COVERAGE:.0%} interval", "measured", "difference", "inside")
        note = "Predicted by a ladder of smaller models, for a model whose learning rate has decayed."
        return [Table("Predicted and measured loss", head, rows, note, text_columns=(0, 6))]

    def charts(self) -> list[Chart]:
        """One per source."""
        return [
            chart(partial(self._draw, source=source), f"Predicted and measured, {source}") for source in self.measured
        ]

    def _draw(self, axis: Any, source: str) -> None:
        tokens, losses = self.history.points(f"{_LOSS}{source}")
        tokens, losses = tokens[tokens > 0], losses[tokens > 0]
        axis.plot(tokens, losses, "o-", markersize=3.5, linewidth=0.9, label=f"measured: {losses[-1]:.3f}")
        self.predicted.draw(axis, source, tokens[0])

    def as_dict(self) -> dict[str, dict]:
        """By source."""
        return {
            source: asdict(self.predicted.at(source, tokens)) | {"measured": loss}
            for source, (tokens, loss) in self.measured.items()
        }


def compare(directory: Path, history: History) -> Compared:
    """Raises `ConfigError` where the run's recipe is not known, or no validation was logged after its first step."""
    try:
        recipe = recipe_of_run(history.description)
    except (ConfigError, KeyError, TypeError) as error:
        raise ConfigError(f"--ladder: the run's recipe is not in its run.json ({error})") from error
    predicted = predict(directory, recipe)
    points = {source: history.points(f"{_LOSS}{source}") for source in predicted.fits}
    measured = {
        source: (round(tokens[-1]), float(losses[-1]))
        for source, (tokens, losses) in points.items()
        if len(tokens) and tokens[-1] > 0
    }
    if not measured:
        raise ConfigError("--ladder: the run has logged no validation loss yet, to compare predictions with")
    return Compared(predicted, history, measured)
