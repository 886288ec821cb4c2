"""A plan as tables, for the terminal and for its page."""

from collections.abc import Sequence

from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.page import Chart, Table, chart, render
from tinyllama_ds.planning.activations import HOST
from tinyllama_ds.planning.charts import CHARTS
from tinyllama_ds.planning.plan import Plan
from tinyllama_ds.planning.search import Ranking, reason

_TOKENS_300B = 300e9  # what published tables of GPU-hours count
_SHOWN = 12  # candidates of a search


def headline(plan: Plan) -> str:
    """The plan in one sentence."""
    gpu, ranks = plan.request.machines.gpu, plan.request.machines.hosts.ranks
    verb = "fits" if plan.fits else "DOES NOT FIT"
    shared = f", sequence parallelism over {plan.work.sequence_parallel}" if plan.work.sequence_parallel > 1 else ""
    cost = f", {plan.dollars:,.0f} USD" if plan.dollars is not None else ""
    return (
        f"{plan.inputs.recipe.name} on {ranks} x {gpu.name}, {plan.layout.name}, micro-batch {plan.work.micro_batch}"
        f"{shared}: {verb} ({plan.memory.total / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB per GPU),"
        f" {plan.duration.days:.1f} days, {plan.duration.gpu_hours:,.0f} GPU-hours{cost}"
    )


def tables_of(plan: Plan) -> list[Table]:
    """All tables of a plan, the most asked first."""
    tables = (_cost, _memory, _step, _communication, _timeline, _sources, _reliability, _values)
    return [table(plan) for table in tables]


def _cost(plan: Plan) -> Table:
    duration, request = plan.duration, plan.request
    per_gpu = duration.tokens_per_second / duration.ranks
    is_published = (plan.inputs.recipe.model_name, request.machines.gpu.name) == ("tinyllama-1.1b", "a100-40g")
    paper = " (TinyLlama's paper: 3,456)" if is_published else ""
    rows = [
        ("tokens", f"{duration.tokens:,}"),
        ("optimizer steps", f"{plan.inputs.plan.total_steps:,}"),
        ("tokens per second", f"{duration.tokens_per_second:,.0f} ({per_gpu:,.0f} per GPU)"),
        ("days without failures", f"{duration.days:.1f}"),
        ("days with failures and saves", f"{duration.days / plan.failures[0].goodput:.1f}"),
        ("GPU-hours", f"{duration.gpu_hours:,.0f}"),
        ("GPU-hours per 300 billion tokens", f"{duration.gpu_hours_for(_TOKENS_300B):,.0f}{paper}"),
    ]
    if plan.dollars is not None:
        rows.append(("cost", f"{plan.dollars:,.0f} USD at {request.price_per_hour:.2f} per GPU-hour"))
    given = request.tokens_per_second
    source = request.machines.compute_from if given is None else f"{given:,.0f} tokens/s per GPU, as given"
    return Table("Time and cost", (), rows, f"Speed: {source}.")


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    rows = [(row.name, f"{row.bytes / GIB:.2f}", row.phase, row.how) for row in (*memory.rows, *memory.overhead_rows)]
    capacity = f"of {plan.request.machines.gpu.memory_bytes / GIB:.1f}"
    rows.append(("total at the peak", f"{memory.total / GIB:.2f}", memory.peak_phase, capacity))
    if plan.host_bytes:
        gpus = plan.request.machines.hosts.gpus
        how = f"its rows of {gpus} GPUs; besides, processes and checkpoints under way"
        rows.append(("memory of a host", f"{plan.host_bytes / GIB:.2f}", HOST, how))
    note = (
        "The rows of the loss, of the backward pass of a block and of the optimizer step are not held at once; the"
        " largest sum counts. Rows of the host are not in the total."
    )
    return Table("Memory per GPU, GiB", ("", "GiB", "held", "formula"), rows, note, text_columns=(0, 3))


def _step(plan: Plan) -> Table:
    head = ("stage", "accumulation", "compute", "communication", "exposed", "optimizer", "step", "efficiency")
    rows = [
        (
            *(stage.name, f"{accumulation}", f"{step.compute:.3f}", f"{step.communication:.3f}"),
            *(f"{step.exposed:.3f}", f"{step.optimizer:.3f}", f"{step.seconds:.3f}", f"{step.efficiency:.1%}"),
        )
        for stage, accumulation, step in zip(plan.inputs.plan.stages, plan.accumulations, plan.steps, strict=True)
    ]
    return Table("One optimizer step, seconds", head, rows, plan.request.machines.compute_from + ".")


def _communication(plan: Plan) -> Table:
    head = ("", "collective", "GB total", "GB per GPU", "GB out of a host", "seconds", "overlaps with")
    rows = [
        (
            *(part.collective.name, part.collective.kind, f"{part.collective.bytes / 1e9:.3f}"),
            *(f"{part.per_gpu / 1e9:.3f}", f"{part.per_node / 1e9:.3f}", f"{part.seconds:.3f}"),
            part.collective.overlaps_with or "nothing",
        )
        for part in plan.steps[0].traffic
    ]
    note = f"Rings over {plan.request.machines.network.description}; first stage."
    return Table("Communication per step", head, rows, note)


def _timeline(plan: Plan) -> Table:
    rows = [
        (
            *(milestone.name, f"{milestone.step:,}", f"{milestone.tokens:,}", f"{milestone.learning_rate:.3e}"),
            f"{milestone.batch_tokens:,}",
            ", ".join(f"{name} {share:.1%}" for name, share in milestone.mixture.items() if share),
        )
        for milestone in plan.timeline.milestones
    ]
    return Table("Timeline", ("", "step", "tokens", "learning rate", "batch", "mixture"), rows, text_columns=(0, 5))


def _sources(plan: Plan) -> Table:
    epochs = plan.timeline.epochs
    rows = [
        (name, f"{tokens:,}", f"{epochs[name]:.3f}" if name in epochs else "unknown size")
        for name, tokens in plan.timeline.tokens_by_source.items()
    ]
    return Table("Sources", ("", "tokens drawn", "epochs"), rows)


def _reliability(plan: Plan) -> Table:
    fleets, storage, intervals = plan.failures, plan.storage, plan.inputs.recipe.intervals
    rows = [
        ("expected interruptions", *(f"{fleet.expected:.1f}" for fleet in fleets)),
        ("best interval between saves, minutes", *(f"{fleet.best_interval_minutes:.0f}" for fleet in fleets)),
        ("goodput", *(f"{fleet.goodput:.1%}" for fleet in fleets)),
        ("one checkpoint, GB", f"{storage.checkpoint / 1e9:.1f}", ""),
        ("retained checkpoints", f"{storage.checkpoints}", ""),
        ("tokens on disk, GB", f"{storage.tokens / 1e9:,.0f}", ""),
        ("total storage, GB", f"{storage.total / 1e9:,.0f}", ""),
        ("tokens between saves, at most", f"{plan.timeline.tokens_between_saves:,}", ""),
    ]
    good, bad = (f"{fleet.per_thousand_node_days:.0f}" for fleet in fleets)
    note = (
        f"A good fleet: {good} interruptions per 1,000 node-days, a bad one: {bad}. A save of"
        f" {plan.request.save_seconds:g} s every {intervals.save_minutes} minutes, 15 minutes lost to detection and"
        " restart."
    )
    return Table("Failures and storage", ("", "good fleet", "bad fleet"), rows, note)


def _values(plan: Plan) -> Table:
    """The resolved values and who owns each."""
    params, recipe, hosts = plan.resolved["optimizer"]["params"], plan.inputs.recipe, plan.request.machines.hosts
    json_name = str(plan.request.deepspeed_config)
    rows = [
        ("model", f"{recipe.model_name}, {plan.inputs.model.num_parameters:,} parameters", "recipe"),
        ("sequence length", f"{recipe.sequence_length}", "recipe"),
        ("global batch, tokens", ", ".join(f"{stage.global_batch_tokens:,}" for stage in recipe.stages), "recipe"),
        ("seed", f"{recipe.seed}", "recipe"),
        ("micro-batch, sequences", f"{plan.work.micro_batch}", json_name),
        ("ZeRO stage", f"{plan.layout.stage}", json_name),
        ("learning rate, peak", f"{params.get('lr', 'default')}", json_name),
        ("optimizer", f"{plan.resolved['optimizer']['type']}", json_name),
        ("gradient clipping", f"{plan.resolved.get('gradient_clipping', 'default')}", json_name),
        ("GPUs", f"{hosts.nodes} x {hosts.gpus}", "hostfile"),
        ("gradient accumulation", ", ".join(map(str, plan.accumulations)), "derived"),
    ]
    return Table("Values and their owners", ("", "value", "owner"), rows, text_columns=(0, 2))


def ranking_table(ranking: Ranking) -> Table:
    """The best candidates of a search with their reasons."""
    best = enumerate(ranking.candidates[:_SHOWN], start=1)
    rows = [(f"{place}.", reason(candidate)) for place, candidate in best]
    note = f"{len(ranking.candidates)} of {ranking.tried} combinations fit; the first is planned below."
    return Table("Ranking", ("", "reason"), rows, note, text_columns=(0, 1))


def plan_text(plan: Plan, tables: list[Table]) -> str:
    """The headline, all tables, and the warnings last, where they are read."""
    warnings = ["\n".join(f"warning: {warning}" for warning in plan.warnings)] if plan.warnings else []
    return "\n\n".join([headline(plan), *(table.as_text() for table in tables), *warnings])


def plan_page(plan: Plan, tables: list[Table], more_charts: Sequence[Chart] = ()) -> str:
    """The whole page."""
    charts = [chart(lambda axis, draw=draw: draw(axis, plan), title, is_wide=True) for title, draw in CHARTS]  # type: ignore[misc]
    title = headline(plan)
    return render(
        "plan.html", title=f"Plan: {title}", verdict=title, passed=plan.fits, warnings=plan.warnings,
        charts=[*charts, *more_charts], tables=tables,
    )  # fmt: skip
