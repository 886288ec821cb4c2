"""A plan as tables: for the terminal, and as one HTML file that needs nothing else."""

import html
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

from tinyllama_ds.gpus import GIB
from tinyllama_ds.page import page, section, table
from tinyllama_ds.planning.plan import Plan
from tinyllama_ds.planning.search import Ranking, reason

_TOKENS_300B = 300e9  # what published tables of GPU-hours count


@dataclass(frozen=True)
class Table:
    """One table of the page."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    ends_in_words: bool = False  # the last column, which is then aligned to the left


def headline(found: Plan) -> str:
    """The plan in one sentence."""
    machines, work = found.request.machines, found.work
    ranks, days = machines.hosts.ranks, found.duration.days
    money = f", {found.dollars:,.0f} USD" if found.dollars is not None else ""
    room = f"{found.memory.total / GIB:.1f} of {machines.gpu.memory_bytes / GIB:.1f} GiB"
    verb = "fits" if found.fits else "DOES NOT FIT"
    return (
        f"{found.inputs.recipe.name} on {ranks} x {machines.gpu.name}, {found.layout.name}, micro batch"
        f" {work.micro_batch}: {verb} ({room} per GPU), {days:.1f} days,"
        f" {found.duration.gpu_hours:,.0f} GPU-hours{money}"
    )


def tables_of(found: Plan) -> list[Table]:
    """All tables of a plan, the most asked first."""
    return [
        _cost(found),
        _memory(found),
        _step(found),
        _communication(found),
        _timeline(found),
        _sources(found),
        _reliability(found),
        _values(found),
    ]


def _cost(found: Plan) -> Table:
    duration = found.duration
    per_gpu = duration.tokens_per_second / duration.ranks
    is_published = (found.inputs.recipe.model, found.request.machines.gpu.name) == ("tinyllama-1.1b", "a100-40g")
    paper = " (TinyLlama's paper: 3,456)" if is_published else ""
    rows = [
        ("tokens", f"{duration.tokens:,}"),
        ("optimizer steps", f"{found.inputs.plan.total_steps:,}"),
        ("tokens per second", f"{duration.tokens_per_second:,.0f} ({per_gpu:,.0f} per GPU)"),
        ("days without failures", f"{duration.days:.1f}"),
        ("days with failures and saves", f"{duration.days / found.failures[0].goodput:.1f}"),
        ("GPU-hours", f"{duration.gpu_hours:,.0f}"),
        ("GPU-hours per 300 billion tokens", f"{duration.gpu_hours_for(_TOKENS_300B):,.0f}{paper}"),
    ]
    if found.dollars is not None:
        rows.append(("cost", f"{found.dollars:,.0f} USD at {found.request.price_per_hour:.2f} per GPU-hour"))
    source = (
        f"{found.request.tokens_per_second:,.0f} tokens/s per GPU, as given"
        if found.request.tokens_per_second is not None
        else found.request.machines.compute_from
    )
    return Table("Time and money", ("", ""), rows, f"Speed: {source}.")


def _memory(found: Plan) -> Table:
    rows = [
        (row.name, f"{row.bytes / GIB:.2f}", row.phase, row.how)
        for row in (*found.memory.rows, *found.memory.overhead_rows)
    ]
    capacity = found.request.machines.gpu.memory_bytes
    rows.append(
        ("total at the peak", f"{found.memory.total / GIB:.2f}", found.memory.peak_phase, f"of {capacity / GIB:.1f}")
    )
    note = "Rows of the micro batch and of the optimizer step are not held together; the larger of the two counts."
    return Table("Memory per GPU, GiB", ("", "GiB", "held", "how"), rows, note, ends_in_words=True)


def _step(found: Plan) -> Table:
    rows = []
    for stage, accumulation, step in zip(found.inputs.plan.stages, found.accumulations, found.steps, strict=True):
        figures = (step.compute, step.communication, step.exposed, step.optimizer, step.seconds)
        rows.append((stage.name, f"{accumulation}", *(f"{value:.3f}" for value in figures), f"{step.efficiency:.1%}"))
    head = ("stage", "accumulation", "compute", "communication", "of it waited for", "optimizer", "step", "efficiency")
    return Table("One optimizer step, seconds", head, rows, found.request.machines.compute_from + ".")


def _communication(found: Plan) -> Table:
    rows = [
        (
            part.collective.name,
            part.collective.kind,
            f"{part.collective.bytes / 1e9:.3f}",
            f"{part.per_gpu / 1e9:.3f}",
            f"{part.per_node / 1e9:.3f}",
            f"{part.seconds:.3f}",
            part.collective.overlaps_with or "nothing",
        )
        for part in found.steps[0].traffic
    ]
    head = ("", "collective", "GB in all", "GB per GPU", "GB out of a host", "seconds", "hides behind")
    note = f"Rings over {found.request.machines.network.description}; first stage."
    return Table("Communication per step", head, rows, note)


def _timeline(found: Plan) -> Table:
    rows = [
        (
            milestone.name,
            f"{milestone.step:,}",
            f"{milestone.tokens:,}",
            f"{milestone.learning_rate:.3e}",
            f"{milestone.batch_tokens:,}",
            ", ".join(f"{name} {share:.1%}" for name, share in milestone.mixture.items() if share),
        )
        for milestone in found.timeline.milestones
    ]
    return Table(
        "What the run will do", ("", "step", "tokens", "learning rate", "batch", "mixture"), rows, ends_in_words=True
    )


def _sources(found: Plan) -> Table:
    rows = [
        (
            name,
            f"{tokens:,}",
            f"{found.timeline.epochs[name]:.3f}" if name in found.timeline.epochs else "size not known",
        )
        for name, tokens in found.timeline.tokens_by_source.items()
    ]
    return Table("Sources", ("", "tokens drawn", "epochs"), rows)


def _reliability(found: Plan) -> Table:
    good, bad = found.failures
    storage = found.storage
    rows = [
        ("interruptions expected", f"{good.expected:.1f}", f"{bad.expected:.1f}"),
        (
            "best interval between saves, minutes",
            f"{good.best_interval_minutes:.0f}",
            f"{bad.best_interval_minutes:.0f}",
        ),
        ("goodput", f"{good.goodput:.1%}", f"{bad.goodput:.1%}"),
        ("one checkpoint, GB", f"{storage.checkpoint / 1e9:.1f}", ""),
        ("checkpoints that stay", f"{storage.checkpoints}", ""),
        ("tokens on disk, GB", f"{storage.tokens / 1e9:,.0f}", ""),
        ("storage in all, GB", f"{storage.total / 1e9:,.0f}", ""),
        ("tokens between saves at most", f"{found.timeline.tokens_between_saves:,}", ""),
    ]
    intervals = found.inputs.recipe.intervals
    note = (
        f"A good fleet: {good.per_thousand_node_days:.0f} interruptions per 1,000 node-days, a bad one"
        f" {bad.per_thousand_node_days:.0f}. A save of {found.request.save_seconds:g} s every {intervals.save_minutes}"
        " minutes, 15 minutes lost to detection and restart."
    )
    return Table("Failures and storage", ("", "good fleet", "bad fleet"), rows, note)


def _values(found: Plan) -> Table:
    """The resolved values and who owns each."""
    params, recipe = found.resolved["optimizer"]["params"], found.inputs.recipe
    json_name = str(found.request.deepspeed_config)
    rows = [
        ("model", f"{recipe.model}, {found.inputs.model.num_parameters:,} parameters", "recipe"),
        ("sequence length", f"{recipe.sequence_length}", "recipe"),
        ("global batch, tokens", ", ".join(f"{stage.global_batch_tokens:,}" for stage in recipe.stages), "recipe"),
        ("seed", f"{recipe.seed}", "recipe"),
        ("micro batch, sequences", f"{found.work.micro_batch}", json_name),
        ("ZeRO stage", f"{found.layout.stage}", json_name),
        ("learning rate, peak", f"{params.get('lr', 'default')}", json_name),
        ("optimizer", f"{found.resolved['optimizer']['type']}", json_name),
        ("gradient clipping", f"{found.resolved.get('gradient_clipping', 'default')}", json_name),
        ("GPUs", f"{found.request.machines.hosts.nodes} x {found.request.machines.hosts.gpus}", "hostfile"),
        ("gradient accumulation", ", ".join(map(str, found.accumulations)), "derived"),
    ]
    return Table("Values and their owners", ("", "value", "owner"), rows, ends_in_words=True)


def ranking_table(ranking: Ranking, memory_bytes: int, shown: int = 12) -> Table:
    """The best candidates of a search with their reasons."""
    rows = [
        (f"{place}.", reason(candidate, memory_bytes)) for place, candidate in enumerate(ranking.candidates[:shown], 1)
    ]
    note = f"{len(ranking.candidates)} of {ranking.tried} combinations fit; the first is taken."
    return Table("Ranking", ("", "reason"), rows, note, ends_in_words=True)


def as_text(title: str, tables: list[Table], warnings: tuple[str, ...]) -> str:
    """Aligned columns, warnings last, where they are read."""
    parts = [title, *(_text_table(table) for table in tables)]
    parts += ["\n".join(f"warning: {warning}" for warning in warnings)] if warnings else []
    return "\n\n".join(parts)


def _text_table(table: Table) -> str:
    cells = [table.head, *table.rows] if any(table.head) else table.rows
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.head))]
    left = _columns_of_words(table)
    lines = [table.title]
    for row in cells:
        padded = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join([*lines, *([f"  ({table.note})"] if table.note else [])])


def as_html(title: str, is_good: bool, tables: list[Table], warnings: tuple[str, ...], picture: bytes) -> str:
    """The whole page; the picture is a PNG and is embedded."""
    encoded = b64encode(picture).decode()
    worries = "".join(f"<li>{html.escape(warning)}" for warning in warnings)
    body = (
        section("Warnings", f"<ul>{worries}</ul>" if worries else "")
        + f"<img alt='learning rate, batch and mixture over tokens' src='data:image/png;base64,{encoded}'>"
        + "".join(
            section(each.title, table(each.head, each.rows, _columns_of_words(each)), each.note) for each in tables
        )
    )
    return page(f"Plan: {title}", title, is_good, body)


def _columns_of_words(table: Table) -> set[int]:
    return {0, len(table.head) - 1} if table.ends_in_words else {0}
