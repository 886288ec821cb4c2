"""What a ladder predicts: a fit per source over its finished models, kept as `ladder.json` in its directory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from tinyllama_ds.config.recipe import Recipe
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.config.validation import validate_json
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.inputs import read_text
from tinyllama_ds.ladder.fit import DRAWS, Fit, Points, fit
from tinyllama_ds.outputs import write_file

LADDER_FILE = "ladder.json"
_NOISE = 0.02  # nats between two models that differ by chance alone


@dataclass(frozen=True)
class Measurement:
    """A finished model: its size, all its parameters, its tokens, and the validation loss of one source in nats."""

    size: str
    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class Prediction:
    """Of a loss in nats, with the interval of `fit.COVERAGE` that one run is expected in."""

    tokens: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class HeldOut:
    """A finished model of the largest size, predicted by a fit to all smaller ones."""

    size: str
    predicted: Prediction
    measured: float

    @property
    def error(self) -> float:
        """Measured less predicted, in nats."""
        return self.measured - self.predicted.loss

    @property
    def is_inside(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass(frozen=True)
class SourceFit:
    """The finished models of one source and their fit (`fit.Fit`), and how well the largest size was predicted."""

    measurements: tuple[Measurement, ...]
    values: tuple[float, ...]
    draws: tuple[tuple[float, ...], ...]
    noise: tuple[float, ...]
    held_out: tuple[HeldOut, ...]

    @cached_property
    def fit(self) -> Fit:
        fitted = Fit(np.array(self.values), np.empty(0), np.array(self.draws), np.array(self.noise))
        points = points_of(self.measurements)
        residuals = np.log(points.losses / fitted.loss(points.parameters, points.tokens))
        return Fit(fitted.values, residuals, fitted.draws, fitted.noise)

    def predictions(self, parameters: int, tokens: Sequence[int]) -> list[Prediction]:
        """Of finished models of one size."""
        return predictions(self.fit, parameters, tokens)


@dataclass(frozen=True)
class LadderResult:
    """The content of `ladder.json`."""

    name: str
    recipe: str  # name of the large one
    parameters: int  # of its model
    tokens: int  # of its run
    sources: dict[str, SourceFit]

    def of_recipe(self, recipe: Recipe) -> dict[str, SourceFit]:
        """The fits of a recipe's sources; raises `ConfigError` where the ladder was not trained on one."""
        missing = [source for source in recipe.sources if source not in self.sources]
        if missing:
            raise ConfigError(
                f"ladder {self.name}: was not trained on {missing[0]}; expected a recipe of"
                f" {', '.join(self.sources)}, such as {self.recipe}"
            )
        return {source: self.sources[source] for source in recipe.sources}


def warnings_of(result: LadderResult) -> list[str]:
    """A larger model that is worse on as many tokens: no law of this form has that."""
    found = []
    for source, fitted in result.sources.items():
        pairs = [
            (larger.loss - smaller.loss, larger, smaller)
            for larger, smaller in product(fitted.measurements, repeat=2)
            if larger.parameters > smaller.parameters and larger.tokens == smaller.tokens
        ]
        excess, larger, smaller = max(pairs, key=lambda pair: pair[0], default=(0.0, None, None))
        if larger and smaller and excess > _NOISE:
            found.append(
                f"{source}: {larger.size} is worse than {smaller.size} by {excess:.3f} at {larger.tokens:,} tokens, so"
                " the law does not hold; its learning rate is too high or too low for its width, or its tokens too few"
            )
    return found


def points_of(measurements: Sequence[Measurement]) -> Points:
    """As arrays."""
    columns = zip(*((one.parameters, one.tokens, one.loss) for one in measurements), strict=True)
    return Points(*(np.array(column, dtype=float) for column in columns))


def predictions(fitted: Fit, parameters: int, tokens: Sequence[int]) -> list[Prediction]:
    """Of one size at several numbers of tokens."""
    counts = np.array(tokens, dtype=float)
    columns = (fitted.loss(parameters, counts), *fitted.interval(parameters, counts))
    return [
        Prediction(count, float(loss), float(low), float(high))
        for count, loss, low, high in zip(tokens, *columns, strict=True)
    ]


def fit_ladder(name: str, recipe: Recipe, measured: Mapping[str, Sequence[Measurement]]) -> LadderResult:
    """The fits of all sources, and the predictions of the largest size without it."""
    sources = {source: _fit_source(of_source) for source, of_source in measured.items()}
    return LadderResult(name, recipe.name, recipe.model.num_parameters, RunPlan(recipe).total_tokens, sources)


def _fit_source(measured: Sequence[Measurement]) -> SourceFit:
    whole = fit(points_of(measured), DRAWS)
    largest = max(one.parameters for one in measured)
    held = [one for one in measured if one.parameters == largest]
    smaller = fit(points_of([one for one in measured if one.parameters < largest]), DRAWS)
    predicted = predictions(smaller, largest, [one.tokens for one in held])
    return SourceFit(
        tuple(measured),
        tuple(whole.values.tolist()),
        tuple(map(tuple, whole.draws.tolist())),
        tuple(whole.noise.tolist()),
        tuple(HeldOut(one.size, guess, one.loss) for one, guess in zip(held, predicted, strict=True)),
    )


def write_result(directory: Path, result: LadderResult) -> None:
    """Write `ladder.json`."""
    write_file(directory / LADDER_FILE, json.dumps(asdict(result)) + "\n")


def read_result(directory: Path) -> LadderResult:
    """The result of a finished ladder; raises `ConfigError` where there is none."""
    path = directory / LADDER_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: is missing; expected the --run-dir of a finished `tinyllama-ds ladder`")
    return validate_json(LadderResult, read_text(path, "the result of a ladder"), path)
