"""The audit as a person reads it: a verdict in words, and one HTML file that needs nothing else."""

import html
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyllama_ds.data.audit import DataAudit, ShardAudit
from tinyllama_ds.data.coverage import Coverage

_STYLE = """body { font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } .good { color: #17692b } .bad { color: #a11 } svg { width: 100% }"""


def verdict(audit: DataAudit, coverage: Coverage | None) -> str:
    """Whether this data may be trained on, in a few plain sentences, with everything that speaks against it."""
    problems = audit.problems + (coverage.problems if coverage else [])
    warnings = audit.warnings + (coverage.warnings if coverage else [])
    tokens = sum(shard.tokens for shard in audit.shards)
    documents = sum(len(shard.document_hashes) for shard in audit.shards)
    lines = [
        "BAD: do not train on this." if problems else "GOOD: what the manifests say is true.",
        f"{len(audit.shards):,} shards, {documents:,} documents and {tokens:,} tokens were read;"
        f" {audit.compared_with_raw:,} documents were compared with the raw input.",
    ]
    if coverage is not None:
        lines.append(
            f"Of the plan's {coverage.total_samples:,} samples {coverage.checked_samples:,} were dealt to"
            f" {coverage.world_size} ranks: {'see below' if coverage.problems else 'each to one rank, none left out'}."
        )
        lines += [f"  {name} will be seen {epochs:.4g} times" for name, epochs in coverage.epochs.items()]
        for number, shares in enumerate(coverage.shares, start=1):
            mixture = ", ".join(f"{name} {share:.4%}" for name, share in shares.items())
            lines.append(f"  stage {number} draws {mixture}")
    lines += [f"problem: {problem}" for problem in problems] + [f"warning: {warning}" for warning in warnings]
    return "\n".join(lines)


def audit_page(audit: DataAudit, coverage: Coverage | None, title: str) -> str:
    """The verdict, a table of sources and four pictures, as one self-contained HTML page."""
    text = verdict(audit, coverage)
    groups: dict[str, list[ShardAudit]] = {}
    for shard in audit.shards:
        groups.setdefault(f"{shard.source}/{shard.split}", []).append(shard)
    pictures = [
        _picture("How long documents are", lambda axis: _draw_lengths(axis, groups)),
        _picture("How often words occur, by rank", lambda axis: _draw_unigrams(axis, groups)),
        _picture("How far each shard is from its source", lambda axis: _draw_drift(axis, audit)),
        _picture("The longest run of one id in each shard", lambda axis: _draw_runs(axis, audit)),
    ]
    state = "bad" if text.startswith("BAD") else "good"
    first, _, rest = text.partition("\n")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><h2 class={state}>{html.escape(first)}</h2>"
        f"<pre>{html.escape(rest)}</pre>{_table(groups, audit)}{''.join(pictures)}</html>\n"
    )


def _table(groups: dict[str, list[ShardAudit]], audit: DataAudit) -> str:
    head = ("", "shards", "documents", "tokens", "tokens per document", "duplicates", "longest run")
    rows = [
        (
            name,
            f"{len(shards):,}",
            f"{(documents := sum(len(shard.document_hashes) for shard in shards)):,}",
            f"{(tokens := sum(shard.tokens for shard in shards)):,}",
            f"{tokens / max(1, documents):,.0f}",
            f"{audit.duplicates[name]:,}",
            f"{max(shard.longest_run[0] for shard in shards):,}",
        )
        for name, shards in groups.items()
    ]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return "<table><tr>" + "".join(f"<th>{cell}" for cell in head) + cells + "</table>"


def _picture(title: str, draw: Callable[[Any], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    draw(axis)
    axis.grid(alpha=0.3)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return f"<h3>{html.escape(title)}</h3>{svg[svg.index('<svg') :]}"


def _draw_lengths(axis: Any, groups: dict[str, list[ShardAudit]]) -> None:
    for name, shards in groups.items():
        counts = np.sum([shard.document_lengths for shard in shards], axis=0)
        axis.step(2.0 ** np.arange(len(counts)), counts / max(1, counts.sum()), where="post", label=name)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens", ylabel="share of documents", xlim=(1, 2**20))
    axis.legend()


def _draw_unigrams(axis: Any, groups: dict[str, list[ShardAudit]]) -> None:
    for name, shards in groups.items():
        counts = np.sort(np.sum([shard.unigrams for shard in shards], axis=0))[::-1]
        axis.plot(np.arange(1, len(counts) + 1), counts / max(1, counts.sum()), label=name)
    axis.set(xlabel="rank of the id", ylabel="share of tokens", xscale="log", yscale="log")
    axis.legend()


def _draw_drift(axis: Any, audit: DataAudit) -> None:
    axis.bar(range(len(audit.drift)), list(audit.drift.values()))
    axis.set(xlabel="shard, in the order of sources and splits", ylabel="total variation", ylim=(0, 1))


def _draw_runs(axis: Any, audit: DataAudit) -> None:
    axis.bar(range(len(audit.shards)), [shard.longest_run[0] for shard in audit.shards])
    axis.set(xlabel="shard, in the order of sources and splits", ylabel="equal ids in a row", yscale="log")
