"""Validation losses of several runs, sample by sample: their differences per source, with standard errors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_ds.files import Kinds, whole_rows
from tinyllama_ds.layout import VALIDATION_FILE
from tinyllama_ds.page import Table
from tinyllama_ds.report.history import History
from tinyllama_ds.report.run_files import LARGEST

_ROW: dict[str, Kinds] = {"tokens": int, "source": str, "losses": list, "targets": list}
Losses = dict[str, dict[int, np.ndarray]]  # by source and tokens: sum of losses and targets (samples, 2)


@dataclass(frozen=True)
class Difference:
    """The validation loss of a run on a source minus that of the first run, in nats per token."""

    source: str
    first: str  # names of the runs
    run: str
    tokens: tuple[int, int]  # of the first run and of this one: the last ones that both have, else the last of each
    losses: tuple[float, float]
    error: float  # standard error of the difference; NaN for a single sample
    is_paired: bool  # the samples are the same

    @property
    def value(self) -> float:
        return self.losses[1] - self.losses[0]

    def to_dict(self) -> dict:
        """For JSON, which has no NaN."""
        return asdict(self) | {"difference": self.value, "error": None if isnan(self.error) else self.error}


def read_sample_losses(run_dir: Path) -> Losses:
    """All evaluations of a run; none without the file, which earlier versions did not write."""
    path, found = run_dir / VALIDATION_FILE, Losses()
    if path.is_file():
        with path.open("rb") as file:
            for _, row in whole_rows(file, path, **_ROW):
                samples = _samples(row["losses"], row["targets"])
                if samples is not None:
                    found.setdefault(row["source"], {})[row["tokens"]] = samples
    return found


def _samples(losses: list, targets: list) -> np.ndarray | None:
    """(samples, 2), without those that have no target; None where one is damaged, or its loss is not finite."""
    try:
        samples = np.array([losses, targets], dtype=np.float64).T
    except (TypeError, ValueError, OverflowError):
        return None
    if samples.ndim != 2 or not (np.abs(samples) < LARGEST).all() or not (samples[:, 1] > 0).any():
        return None
    return samples[samples[:, 1] > 0]


def differences_of_losses(runs: Mapping[str, History], places: Mapping[str, Path]) -> list[Difference]:
    """Of every run from the first one, on each source that both were evaluated on; `places` are their directories."""
    losses = {name: read_sample_losses(path) for name, path in places.items()}
    first, *others = runs
    return [
        _difference(source, (first, run), losses, _have_same_samples(source, runs[first], runs[run]))
        for source in losses[first]
        for run in others
        if source in losses[run]
    ]


def _have_same_samples(source: str, first: History, run: History) -> bool:
    """By the fingerprint of the held-out tokens and how these are cut, in run.json."""
    one, other = (_identity(history.description, source) for history in (first, run))
    return one is not None and one == other


def _identity(description: dict, source: str) -> Any:
    try:
        recipe = description["recipe"]
        cut = (recipe["sequence_length"], recipe.get("document_mask"), recipe.get("packing"))
        return description["data"]["validation"][source], cut
    except (KeyError, TypeError):
        return None


def _difference(source: str, names: tuple[str, str], losses: Mapping[str, Losses], same_samples: bool) -> Difference:
    of_first, of_run = (losses[name][source] for name in names)
    common = max(of_first.keys() & of_run.keys(), default=None)
    tokens = (max(of_first), max(of_run)) if common is None else (common, common)
    one, other = of_first[tokens[0]], of_run[tokens[1]]
    is_paired = same_samples and np.array_equal(one[:, 1], other[:, 1])
    if is_paired:
        error = standard_error(other[:, 0] - one[:, 0], one[:, 1])
    else:
        error = float(np.hypot(standard_error(*one.T), standard_error(*other.T)))
    return Difference(source, *names, tokens, (_mean(one), _mean(other)), error, is_paired)


def _mean(samples: np.ndarray) -> float:
    losses, targets = samples.sum(axis=0)
    return float(losses / targets)


def standard_error(sums: np.ndarray, targets: np.ndarray) -> float:
    """Of sum(sums) / sum(targets), each (samples,), by the spread of the samples; NaN for one sample.

    With as many targets in every sample it is that of the mean of the samples; else that of a ratio (Cochran 1977,
    "Sampling Techniques", 6.4).
    """
    n = len(sums)
    residuals = sums - targets * sums.sum() / targets.sum()
    return float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / targets.sum()) if n > 1 else float("nan")


def loss_table(differences: list[Difference]) -> Table:
    """A row per source and run."""
    rows = [
        (
            of.source, of.run, f"{of.tokens[1]:,}", f"{of.losses[0]:.4f}", f"{of.losses[1]:.4f}",
            f"{of.value:+.4f} ± {of.error:.4f}{'' if of.is_paired else ' *'}",
        )
        for of in differences
    ]  # fmt: skip
    first = differences[0].first if differences else ""
    head = ("source", "run", "tokens", f"loss of {first}", "loss", "difference ± standard error")
    return Table("Validation loss by source", head, rows, _note(differences), (0, 1))


def _note(differences: list[Difference]) -> str:
    """What the errors are of, and what cannot be compared as it stands."""
    notes = ["Standard errors are over pairs of validation samples, without the effect of the training seed."]
    if not all(of.is_paired for of in differences):
        notes.append("* Different samples or tokenizers: not paired. Bits per byte are comparable over tokenizers.")
    apart = dict.fromkeys(f"{of.run} at {of.tokens[1]:,} tokens" for of in differences if len(set(of.tokens)) > 1)
    if apart:
        notes.append(f"Never evaluated at the same tokens as the first run: {', '.join(apart)}.")
    return " ".join(notes)


def draw_differences(axis: Any, differences: list[Difference]) -> None:
    """Differences with two standard errors to each side."""
    labels = [f"{of.source}, {of.run}" for of in differences]
    axis.errorbar(
        [of.value for of in differences], range(len(differences)), xerr=[2 * of.error for of in differences],
        fmt="o", markersize=3.5, linewidth=0.9, capsize=2,
    )  # fmt: skip
    axis.axvline(0, linewidth=0.9, linestyle=":")
    axis.set(yticks=range(len(labels)), yticklabels=labels, xlabel="difference, nats per token (± 2 standard errors)")
    axis.set_ylim(len(labels) - 0.5, -0.5)  # the first one on top
