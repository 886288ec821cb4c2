"""TinyLlama's published suites: tasks of lm-eval, and the scores of published models (`suites.toml`)."""

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tinyllama_ds.config.validation import validate
from tinyllama_ds.errors import ConfigError

HUMANEVAL = "humaneval"
LONG_CONTEXT = "long-context"  # which is measured without lm-eval (`long_context/`)


@dataclass(frozen=True)
class Benchmark:
    """A column of a published table, and the task of lm-eval behind it."""

    title: str
    task: str
    metric: str
    shots: int = 0
    folder: str = ""  # of the task in lm-eval's package; empty for our own


@dataclass(frozen=True)
class PublishedRow:
    """One line of a published table."""

    model: str
    scores: tuple[float, ...]  # percent, in the order of the suite's benchmarks
    tokens: float | None = None  # trained on; None if unpublished
    printed_average: float | None = None

    @property
    def average(self) -> float:
        """The mean of the scores; the printed one may differ."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Suite:
    """The benchmarks in the order of the published table, and its rows."""

    benchmarks: tuple[Benchmark, ...]
    published: tuple[PublishedRow, ...]
    misprints: dict[str, str] = field(default_factory=dict)  # of the sources, by model
    note: str = ""  # where scores of lm-eval are hard to compare

    def nearest_checkpoint(self, tokens: int | None) -> PublishedRow | None:
        """TinyLlama's published row within a tenth of the tokens, without v1.1 and its variants."""
        rows = [row for row in self.published if row.model.startswith(("TinyLlama,", "TinyLlama v1.0"))]
        distances = {row: abs(row.tokens - tokens) for row in rows if row.tokens and tokens}
        close = [row for row, distance in distances.items() if distance <= (row.tokens or 0) / 10]
        return min(close, key=distances.__getitem__, default=None)


@cache
def load_suites() -> dict[str, Suite]:
    """The suites by name."""
    path = Path(__file__).with_name("suites.toml")
    return validate(dict[str, Suite], tomllib.loads(path.read_text("utf-8")), path)


def suite_named(name: str) -> Suite:
    """Raises `ConfigError` for an unknown name."""
    if name not in load_suites():
        raise ConfigError(f"suite {name!r} is unknown; choose {', '.join([*load_suites(), LONG_CONTEXT])}")
    return load_suites()[name]
