"""The results of the suite `long-context` as values and as tables."""

from collections import Counter
from collections.abc import Sequence
from math import comb, exp, sqrt
from statistics import NormalDist
from typing import Any

from tinyllama_ds.evaluation.long_context.needle import CHOICES
from tinyllama_ds.evaluation.scores import described
from tinyllama_ds.page import Table

_Z = NormalDist().inv_cdf(0.975)
Outcome = tuple[int, int, bool, bool]  # length, depth, whether the choice is right, whether greedy generation is exact


def summarize_answers(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Right answers of each length and depth with their intervals, and of all against chance."""
    asked = Counter((length, depth) for length, depth, *_ in outcomes)
    right = Counter((length, depth) for length, depth, is_right, _ in outcomes if is_right)
    exact = Counter((length, depth) for length, depth, _, is_exact in outcomes if is_exact)
    cells = [
        {"length": cell[0], "depth": cell[1]} | _proportion(asked[cell], right[cell], exact[cell])
        for cell in sorted(asked)
    ]
    total = _proportion(asked.total(), right.total(), exact.total())
    p_value = chance_of(right.total(), asked.total(), CHOICES)
    return {"choices": CHOICES, "cells": cells, "all": total | {"p_value": p_value}}


def _proportion(questions: int, right: int, exact: int) -> dict[str, Any]:
    low, high = wilson_interval(right, questions)
    return {"questions": questions, "right": right, "exact": exact, "low": low, "high": high}


def wilson_interval(right: int, questions: int) -> tuple[float, float]:
    """The 95 % interval of a proportion, also of few questions and near 0 and 1 (Wilson 1927)."""
    share, z2 = right / questions, _Z * _Z / questions
    center, half = share + z2 / 2, _Z * sqrt(share * (1 - share) / questions + z2 / questions / 4)
    return max(0.0, (center - half) / (1 + z2)), min(1.0, (center + half) / (1 + z2))


def chance_of(right: int, questions: int, choices: int) -> float:
    """The probability of as many right answers or more by guessing: the exact binomial tail."""
    ways = (comb(questions, count) * (choices - 1) ** (questions - count) for count in range(right, questions + 1))
    return sum(ways) / choices**questions


def long_context_tables(found: dict[str, Any], name: str = "") -> list[Table]:
    """The tables of what is in `found["long_context"]`; their titles begin with the name of the model."""
    prefix, part = f"{name}: " if name else "", found["long_context"]
    tables = []
    if part.get("positions"):
        note = f"{_documents(part)} Positions count the tokens before a token in its document. {_ERRORS}"
        by_position = [
            (f"{row['first']:,} to {row['end'] - 1:,}", f"{row['tokens']:,}", *_loss_cells(row))
            for row in part["positions"]
        ]
        tables.append(Table(f"{prefix}Perplexity by position", ("position", "tokens", *_LOSS), by_position, note))
    if part.get("contexts"):
        note = "The second halves of the same documents, with no more than so many tokens of context, and at least half"
        by_context = [
            (f"{row['context']:,}", f"{row['tokens']:,}", *_loss_cells(row), _difference(row["difference"]))
            for row in part["contexts"]
        ]
        head = ("context", "tokens", *_LOSS, "difference from the shortest")
        tables.append(
            Table(f"{prefix}Perplexity of the same tokens by context", head, by_context, f"{note}. {_ERRORS}")
        )
    if part.get("needle"):
        tables.append(_needle_table(part["needle"], f"{prefix}Needle in a haystack"))
    return tables


def long_context_markdown(found: dict[str, Any]) -> str:
    """The tables with their notes, and how it was measured."""
    parts = [f"# {found['model']}"]
    for table in long_context_tables(found):
        parts.append(f"\n## {table.title}\n\n{table.as_markdown()}\n\n{table.note}")
    return "\n".join([*parts, *described(found)]) + "\n"


_LOSS = ("loss ± standard error", "perplexity")
_ERRORS = "Standard errors are by document."


def _documents(part: dict[str, Any]) -> str:
    sources = ", ".join(f"{count} of {source}" for source, count in part.get("sources", {}).items())
    return f"The first {part['document_tokens']:,} tokens of {part['documents']} held-out documents ({sources})."


def _loss_cells(row: dict[str, Any]) -> tuple[str, str]:
    error = "" if row.get("stderr") is None else f" ± {row['stderr']:.4f}"
    return f"{row['value']:.4f}{error}", f"{exp(min(row['value'], 700)):,.2f}"


def _difference(row: dict[str, Any]) -> str:
    if not row["value"]:
        return ""
    return f"{row['value']:+.4f}" + ("" if row.get("stderr") is None else f" ± {row['stderr']:.4f}")


def _needle_table(needle: dict[str, Any], title: str) -> Table:
    """A row per depth, a column per length."""
    cells = {(cell["length"], cell["depth"]): cell for cell in needle["cells"]}
    lengths, depths = (sorted({cell[key] for cell in cells}) for key in (0, 1))
    rows = [(f"{depth} %", *(_share(cells.get((length, depth))) for length in lengths)) for depth in depths]
    return Table(title, ("depth", *(f"{length:,} tokens" for length in lengths)), rows, needle_note(needle))


def _share(cell: dict[str, Any] | None) -> str:
    return f"{cell['right']}/{cell['questions']}" if cell else ""


def needle_note(needle: dict[str, Any]) -> str:
    """All questions together, against chance."""
    total, questions = needle["all"], needle["all"]["questions"]
    return (
        f"Right choices among {needle['choices']} numbers by log-likelihood; in all {total['right']:,} of"
        f" {questions:,}: {total['right'] / questions:.1%}, 95 % interval {total['low']:.1%} to {total['high']:.1%}."
        f" Chance is {1 / needle['choices']:.0%}, and as many by chance have the probability"
        f" {_probability(total['p_value'])}. Greedy generation writes {total['exact'] / questions:.1%} of the numbers."
    )


def _probability(value: float) -> str:
    return "below 1e-12" if value < 1e-12 else f"{value:.2g}"
