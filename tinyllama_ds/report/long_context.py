"""The section of a page on long contexts: results of the suite `long-context`, of one model or of several."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tinyllama_ds.evaluation.long_context.charts import CONTEXTS, draw_contexts, draw_needle, draw_positions, lengths_of
from tinyllama_ds.evaluation.long_context.result import long_context_tables
from tinyllama_ds.page import Chart, Table, chart

Results = Mapping[str, dict[str, Any]]  # by the name of the model or checkpoint


def long_context_charts(results: Results) -> list[Chart]:
    """Perplexities with a line per model, then a heat map per model; nothing without results."""
    if not results:
        return []
    lengths = sorted({length for part in results.values() for length in lengths_of(part["needle"])})
    heat_maps = [
        chart(
            partial(draw_needle, needle=part["needle"], lengths=lengths), f"Needle in a haystack, right answers: {name}"
        )
        for name, part in results.items()
    ]
    return [
        chart(partial(draw_positions, results=results), "Perplexity by position"),
        chart(partial(draw_contexts, results=results), CONTEXTS),
        *heat_maps,
    ]


def all_long_context_tables(results: Results) -> list[Table]:
    """The tables of all models, one model after another."""
    return [table for name, part in results.items() for table in long_context_tables({"long_context": part}, name)]
