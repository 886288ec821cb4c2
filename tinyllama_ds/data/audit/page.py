"""The verdict of an audit, as text and as a page."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from tinyllama_ds.data.audit.audit import DataAudit, total_unigrams
from tinyllama_ds.page import Table, chart, render


def verdict(audit: DataAudit) -> str:
    """PASS or FAIL, the findings, and every problem and warning."""
    problems = [f"problem: {text}" for text in audit.problems] + [f"warning: {text}" for text in audit.warnings]
    tables = [_packing(audit).as_text()] if audit.packing else []
    return "\n".join([_result(audit), *_findings(audit), *tables, *problems])


def audit_page(audit: DataAudit, title: str) -> str:
    """The verdict, tables and charts of the sources."""
    drawings = {
        "Document lengths": _draw_lengths,
        "Token frequency by rank": _draw_unigrams,
        "Drift of each shard from its source": _draw_drift,
        "Longest run of one id in each shard": _draw_runs,
        **({"Tokens cut off from the beginning of their document": _draw_cuts} if audit.packing else {}),
    }
    return render(
        "audit.html",
        title=title,
        verdict=f"{title}: {_result(audit)}",
        passed=not audit.problems,
        findings=_findings(audit),
        problems=audit.problems,
        warnings=audit.warnings,
        tables=[_sources(audit), *([_packing(audit)] if audit.packing else [])],
        charts=[chart(partial(draw, audit), caption) for caption, draw in drawings.items()],
    )


def _result(audit: DataAudit) -> str:
    if not audit.problems:
        return "PASS: the data matches its manifests."
    count = len(audit.problems)
    return f"FAIL: {count:,} problem{'s' * (count > 1)}; do not train on this data."


def _findings(audit: DataAudit) -> list[str]:
    tokens, documents = sum(shard.tokens for shard in audit.shards), sum(shard.documents for shard in audit.shards)
    coverage = audit.coverage
    lines = [
        f"{len(audit.shards):,} shards, {documents:,} documents and {tokens:,} tokens were read;"
        f" {audit.compared_with_raw:,} documents were compared with the raw input."
    ]
    if coverage is None:
        return lines
    once = "see the problems" if coverage.problems else "each to exactly one rank"
    lines.append(
        f"{coverage.checked_samples:,} of the plan's {coverage.total_samples:,} samples were assigned to"
        f" {coverage.world_size} ranks: {once}."
    )
    lines += [f"epochs of {name}: {epochs:.4g}" for name, epochs in coverage.epochs.items()]
    for number, shares in enumerate(coverage.shares, start=1):
        lines.append(f"stage {number} draws " + ", ".join(f"{name} {share:.4%}" for name, share in shares.items()))
    return lines


def _sources(audit: DataAudit) -> Table:
    rows = []
    for name, shards in audit.groups.items():
        documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
        longest = max(shard.longest_run[0] for shard in shards)
        numbers = (len(shards), documents, tokens, round(tokens / max(1, documents)), audit.duplicates[name], longest)
        rows.append((name, *(f"{number:,}" for number in numbers)))
    return Table(
        "Sources", ("", "shards", "documents", "tokens", "tokens per document", "duplicates", "longest run"), rows
    )


def _packing(audit: DataAudit) -> Table:
    rows = []
    for found in audit.packing:
        shares = (found.concatenated.tokens / found.tokens, found.best_fit.tokens / found.tokens)
        padding = found.padding / (found.rows * found.sequence_length)
        cuts = zip((found.concatenated, found.best_fit), shares, strict=True)
        cells = [(f"{cut.documents:,}", f"{cut.tokens:,}", f"{share:.2%}") for cut, share in cuts]
        rows.append(
            (found.source, f"{found.documents:,}", f"{found.longest:,}", *cells[0], *cells[1], f"{padding:.3%}")
        )
    return Table(
        f"Documents in rows of {audit.packing[0].sequence_length:,} tokens",
        (
            *("", "documents", "longest", "cut if concatenated", "tokens cut off", "share"),
            *("cut by best fit", "tokens cut off", "share", "padding of best fit"),
        ),
        rows,
        "tokens cut off are in a row after that of the beginning of their document",
    )


def _draw_cuts(audit: DataAudit, axis: Any) -> None:
    places = np.arange(len(audit.packing))
    for number, (label, key) in enumerate((("concatenated", "concatenated"), ("best fit", "best_fit"))):
        shares = [getattr(found, key).tokens / found.tokens for found in audit.packing]
        axis.bar(places + 0.4 * number - 0.2, shares, width=0.4, label=label)
    axis.set_xticks(places, [found.source for found in audit.packing])
    axis.set(ylabel="share of tokens")
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.legend()


def _draw_lengths(audit: DataAudit, axis: Any) -> None:
    for name, shards in audit.groups.items():
        counts = np.sum([shard.document_lengths for shard in shards], axis=0)
        axis.step(2.0 ** np.arange(len(counts)), counts / max(1, counts.sum()), where="post", label=name)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens", ylabel="share of documents", xlim=(1, 2**20))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.legend()


def _draw_unigrams(audit: DataAudit, axis: Any) -> None:
    for name, shards in audit.groups.items():
        counts = np.sort(total_unigrams(shards))[::-1]
        axis.plot(np.arange(1, len(counts) + 1), counts / max(1, counts.sum()), label=name)
    axis.set(xlabel="rank of the id", ylabel="share of tokens", xscale="log", yscale="log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()


def _draw_drift(audit: DataAudit, axis: Any) -> None:
    _draw_bars(axis, list(audit.drift.values()))
    axis.set(ylabel="total variation", ylim=(0, 1))


def _draw_runs(audit: DataAudit, axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    _draw_bars(axis, [shard.longest_run[0] for shard in audit.shards])
    axis.set(ylabel="equal ids in a row", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_minor_formatter("")


def _draw_bars(axis: Any, values: Sequence[float]) -> None:
    axis.bar(range(len(values)), values)
    axis.set(xlabel="shard, in the order of sources and splits")
    axis.xaxis.get_major_locator().set_params(integer=True)
