"""The audit as a person reads it: a verdict in words, and one HTML file that needs nothing else."""

from typing import Any

import numpy as np

from tinyllama_ds.data.audit.audit import DataAudit, ShardAudit, total_unigrams
from tinyllama_ds.data.prepare.coverage import Coverage
from tinyllama_ds.page import drawing, page, preformatted, table


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
        drawing(lambda axis: _draw_lengths(axis, groups), "How long documents are"),
        drawing(lambda axis: _draw_unigrams(axis, groups), "How often words occur, by rank"),
        drawing(lambda axis: _draw_drift(axis, audit), "How far each shard is from its source"),
        drawing(lambda axis: _draw_runs(axis, audit), "The longest run of one id in each shard"),
    ]
    first, _, rest = text.partition("\n")
    body = f"{preformatted(rest)}{_table(groups, audit)}<div class=grid>{''.join(pictures)}</div>"
    return page(title, f"{title}: {first}", not text.startswith("BAD"), body)


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
    return table(head, rows)


def _draw_lengths(axis: Any, groups: dict[str, list[ShardAudit]]) -> None:
    for name, shards in groups.items():
        counts = np.sum([shard.document_lengths for shard in shards], axis=0)
        axis.step(2.0 ** np.arange(len(counts)), counts / max(1, counts.sum()), where="post", label=name)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens", ylabel="share of documents", xlim=(1, 2**20))
    axis.legend()


def _draw_unigrams(axis: Any, groups: dict[str, list[ShardAudit]]) -> None:
    for name, shards in groups.items():
        counts = np.sort(total_unigrams(shards))[::-1]
        axis.plot(np.arange(1, len(counts) + 1), counts / max(1, counts.sum()), label=name)
    axis.set(xlabel="rank of the id", ylabel="share of tokens", xscale="log", yscale="log")
    axis.legend()


def _draw_drift(axis: Any, audit: DataAudit) -> None:
    axis.bar(range(len(audit.drift)), list(audit.drift.values()))
    axis.set(xlabel="shard, in the order of sources and splits", ylabel="total variation", ylim=(0, 1))


def _draw_runs(axis: Any, audit: DataAudit) -> None:
    axis.bar(range(len(audit.shards)), [shard.longest_run[0] for shard in audit.shards])
    axis.set(xlabel="shard, in the order of sources and splits", ylabel="equal ids in a row", yscale="log")
