"""The verdict of an audit, as text and as a page."""

from typing import Any

import numpy as np

from tinyllama_ds.data.audit.audit import DataAudit, ShardAudit, total_unigrams
from tinyllama_ds.data.prepare.coverage import Coverage
from tinyllama_ds.page import Table, chart, render


def verdict(audit: DataAudit, coverage: Coverage | None) -> str:
    """PASS or FAIL, the findings, and every problem and warning."""
    problems, warnings = _problems(audit, coverage), _warnings(audit, coverage)
    lines = [_result(problems), *_findings(audit, coverage)]
    return "\n".join([*lines, *(f"problem: {text}" for text in problems), *(f"warning: {text}" for text in warnings)])


def audit_page(audit: DataAudit, coverage: Coverage | None, title: str) -> str:
    """The verdict, a table of sources and four charts."""
    groups: dict[str, list[ShardAudit]] = {}
    for shard in audit.shards:
        groups.setdefault(f"{shard.source}/{shard.split}", []).append(shard)
    problems = _problems(audit, coverage)
    return render(
        "audit.html",
        title=title,
        verdict=f"{title}: {_result(problems)}",
        passed=not problems,
        findings=_findings(audit, coverage),
        problems=problems,
        warnings=_warnings(audit, coverage),
        sources=_sources(groups, audit),
        charts=[
            chart(lambda axis: _draw_lengths(axis, groups), "Document lengths"),
            chart(lambda axis: _draw_unigrams(axis, groups), "Token frequency by rank"),
            chart(lambda axis: _draw_drift(axis, audit), "Drift of each shard from its source"),
            chart(lambda axis: _draw_runs(axis, audit), "Longest run of one id in each shard"),
        ],
    )


def _problems(audit: DataAudit, coverage: Coverage | None) -> list[str]:
    return audit.problems + (coverage.problems if coverage else [])


def _warnings(audit: DataAudit, coverage: Coverage | None) -> list[str]:
    return audit.warnings + (coverage.warnings if coverage else [])


def _result(problems: list[str]) -> str:
    if not problems:
        return "PASS: the data matches its manifests."
    return f"FAIL: {len(problems):,} problem{'s' * (len(problems) > 1)}; do not train on this data."


def _findings(audit: DataAudit, coverage: Coverage | None) -> list[str]:
    tokens = sum(shard.tokens for shard in audit.shards)
    documents = sum(len(shard.document_hashes) for shard in audit.shards)
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


def _sources(groups: dict[str, list[ShardAudit]], audit: DataAudit) -> Table:
    rows = []
    for name, shards in groups.items():
        documents = sum(len(shard.document_hashes) for shard in shards)
        tokens, longest = sum(shard.tokens for shard in shards), max(shard.longest_run[0] for shard in shards)
        numbers = (len(shards), documents, tokens, round(tokens / max(1, documents)), audit.duplicates[name], longest)
        rows.append((name, *(f"{number:,}" for number in numbers)))
    return Table(
        "Sources", ("", "shards", "documents", "tokens", "tokens per document", "duplicates", "longest run"), rows
    )


def _draw_lengths(axis: Any, groups: dict[str, list[ShardAudit]]) -> None:
    for name, shards in groups.items():
        counts = np.sum([shard.document_lengths for shard in shards], axis=0)
        axis.step(2.0 ** np.arange(len(counts)), counts / max(1, counts.sum()), where="post", label=name)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens", ylabel="share of documents", xlim=(1, 2**20))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.legend()


def _draw_unigrams(axis: Any, groups: dict[str, list[ShardAudit]]) -> None:
    for name, shards in groups.items():
        counts = np.sort(total_unigrams(shards))[::-1]
        axis.plot(np.arange(1, len(counts) + 1), counts / max(1, counts.sum()), label=name)
    axis.set(xlabel="rank of the id", ylabel="share of tokens", xscale="log", yscale="log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()


def _draw_drift(axis: Any, audit: DataAudit) -> None:
    axis.bar(range(len(audit.drift)), list(audit.drift.values()))
    axis.set(xlabel="shard, in the order of sources and splits", ylabel="total variation", ylim=(0, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_runs(axis: Any, audit: DataAudit) -> None:
    from matplotlib.ticker import LogLocator

    axis.bar(range(len(audit.shards)), [shard.longest_run[0] for shard in audit.shards])
    axis.set(xlabel="shard, in the order of sources and splits", ylabel="equal ids in a row", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_minor_formatter("")
    axis.xaxis.get_major_locator().set_params(integer=True)
