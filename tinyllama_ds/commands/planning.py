"""The command that says what a run needs, costs and will do, before it starts."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama_ds.commands.arguments import (
    CHECKPOINTED_BLOCKS,
    MEMORY_SIZE,
    RANKS,
    SHARE,
    Number,
    output_file,
    output_picture,
)
from tinyllama_ds.commands.printing import add_json, print_result
from tinyllama_ds.errors import ConfigError

if TYPE_CHECKING:
    from tinyllama_ds.gpus import Gpu
    from tinyllama_ds.planning.communication import Hosts
    from tinyllama_ds.planning.plan import Inputs, Plan, PlanRequest
    from tinyllama_ds.planning.search import Ranking
    from tinyllama_ds.planning.timing import Machines


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help="name of a shipped recipe, or a TOML file")
    parser.add_argument("--deepspeed-config", type=Path, required=True, metavar="JSON", help="DeepSpeed config")
    where = parser.add_argument_group("where")
    hosts = where.add_mutually_exclusive_group()
    hosts.add_argument("--hostfile", type=Path, metavar="H", help="machines, lines of 'host slots=N'")
    hosts.add_argument("--num-gpus", type=RANKS, default=8, metavar="N", help="of one host, without a hostfile (8)")
    where.add_argument("--gpu", default="a100-40g", help="by name: a100-40g, h100, rtx-4090 ... (default: %(default)s)")
    where.add_argument("--gpu-memory", type=MEMORY_SIZE, metavar="SIZE", help="of any other GPU, such as 40GiB")
    where.add_argument("--peak-tflops", type=Number(most=1e6), metavar="X", help="dense bf16 rate of any other GPU")
    where.add_argument(
        "--network",
        type=Number(most=1e6),
        default=100,
        metavar="GBIT",
        help="out of each host, Gbit/s (default: %(default)s)",
    )
    speed = parser.add_argument_group("how fast")
    speed.add_argument(
        "--efficiency",
        type=SHARE,
        default=0.56,
        help="of the peak while a GPU computes (default: TinyLlama's %(default)s)",
    )
    speed.add_argument(
        "--tokens-per-second", type=Number(most=1e12), metavar="X", help="of one GPU, all included, where it is known"
    )
    speed.add_argument(
        "--measure", action="store_true", help="measure the step here with bench, instead of --efficiency"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--attention", default="auto", help="backend, as in pretrain (default: %(default)s)")
    how.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="as in pretrain: auto is on")
    how.add_argument(
        "--activation-checkpointing", type=CHECKPOINTED_BLOCKS, default=0, metavar="K", help="as in pretrain"
    )
    how.add_argument("--search", action="store_true", help="try every layout, micro batch and checkpointing; rank them")
    how.add_argument(
        "--write-config", type=output_file, metavar="JSON", help="with --search: the winner's DeepSpeed config"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data, for the sizes of the sources")
    parser.add_argument("--price-per-hour", type=Number(least=0, most=1e6), metavar="USD", help="of one GPU")
    parser.add_argument(
        "--save-seconds",
        type=Number(most=1e6),
        default=15,
        metavar="S",
        help="that training stands still for a save (%(default)s)",
    )
    parser.add_argument(
        "--picture", type=output_picture, metavar="PNG", help="learning rate, batch and mixture over tokens"
    )
    parser.add_argument(
        "--html", type=output_file, metavar="FILE", help="the whole plan as one page that needs nothing else"
    )
    add_json(parser)


def _plan(options: argparse.Namespace) -> int:
    """Say what a run needs, costs and will do, before it starts."""
    from tinyllama_ds.outputs import write_file
    from tinyllama_ds.planning import page
    from tinyllama_ds.planning.plan import answer, read_inputs, reject_layout_that_does_not_fit, with_config
    from tinyllama_ds.planning.search import reason, search

    _check_arguments(options)
    inputs = read_inputs(options.recipe, options.deepspeed_config)
    question = _question(options, _machines(options, inputs))
    sizes = _source_sizes(options.data, inputs)
    memory = question.machines.gpu.memory_bytes
    ranking = None
    if options.search:
        ranking = search(question, inputs)
        best = ranking.candidates[0]
        question = replace(
            question, deepspeed_config=Path(f"{best.name}.json"), recompute_every=best.work.recompute_every
        )
        inputs = with_config(inputs, best.config)
        if options.write_config:
            write_file(options.write_config, json.dumps(best.config, indent=2) + "\n")
    found = answer(question, inputs, sizes)
    if not found.fits:
        reject_layout_that_does_not_fit(found, [reason(c, memory) for c in search(question, inputs).candidates[:3]])
    tables = page.tables_of(found)
    if ranking:
        tables = [page.ranking_table(ranking, memory), *tables]
    text = page.as_text(page.headline(found), tables, found.warnings)
    text += _how_to_start(options, ranking) if ranking else ""
    code = print_result(options, _result(found, ranking), text)
    _write_pictures(options, found, tables)
    return code


def _check_arguments(options: argparse.Namespace) -> None:
    if options.write_config and not options.search:
        raise ConfigError("--write-config writes what --search has found; give --search as well")
    if (options.gpu_memory is None) != (options.peak_tflops is None):
        raise ConfigError("--gpu-memory and --peak-tflops describe one GPU; give both, or --gpu alone")


def _machines(options: argparse.Namespace, inputs: "Inputs") -> "Machines":
    from tinyllama_ds.gpus import custom_gpu, gpu_named, network_of
    from tinyllama_ds.planning.timing import Machines

    gpu = gpu_named(options.gpu)
    if options.gpu_memory is not None:
        gpu = custom_gpu(options.gpu_memory, options.peak_tflops, gpu)
    compute, source = options.efficiency * gpu.peak_flops, _efficiency_text(options, gpu)
    if options.measure:
        compute, source = _measured(options, inputs)
    return Machines(_hosts(options), gpu, network_of(gpu, options.network), compute, source)


def _efficiency_text(options: argparse.Namespace, gpu: "Gpu") -> str:
    return f"{options.efficiency:.0%} of the data sheet's {gpu.peak_flops / 1e12:,.0f} TFLOP/s while a GPU computes"


def _hosts(options: argparse.Namespace) -> "Hosts":
    from tinyllama_ds.launch.hostfile import read_hostfile
    from tinyllama_ds.planning.communication import Hosts

    if options.hostfile is None:
        return Hosts(1, options.num_gpus)
    hosts = read_hostfile(options.hostfile)
    slots = {host.slots for host in hosts}
    if len(slots) > 1:
        raise ConfigError(f"{options.hostfile}: hosts of {sorted(slots)} slots; a plan expects as many on every host")
    return Hosts(len(hosts), slots.pop())


def _measured(options: argparse.Namespace, inputs: "Inputs") -> tuple[float, str]:
    """FLOP/s of one rank in the real step on this machine, and how that was measured."""
    from tinyllama_ds.benchmark import grid as bench
    from tinyllama_ds.commands.placement import local_placement
    from tinyllama_ds.config.deepspeed import requested_micro_batch
    from tinyllama_ds.launch.launcher import MEASURE_SCRIPT, launcher_command, launcher_environment

    here = local_placement(None)
    placement = replace(here, num_local=1) if here.on_cpu else here
    is_compiled = options.compile == "on" or (options.compile == "auto" and not here.on_cpu)
    micro_batch = requested_micro_batch(inputs.raw) or 1
    settings = bench.grid([options.deepspeed_config], [micro_batch], [options.attention], [is_compiled])
    shared = {
        "model": inputs.recipe.model,
        "sequence_length": inputs.recipe.sequence_length,
        "activation_checkpointing": options.activation_checkpointing,
        "accumulation": 4,
        "steps": 3,
    }
    (row,) = bench.measure_all(
        [setting | shared for setting in settings],
        lambda arguments: launcher_command(placement, arguments, MEASURE_SCRIPT),
        launcher_environment(placement),
    )
    if "error" in row:
        raise ConfigError(f"--measure: the step did not run here: {row['error']}")
    rate = row["tokens_per_second"] / row["ranks"]
    flops = rate * inputs.model.flops_per_token(inputs.recipe.sequence_length)
    return flops, f"measured here: {rate:,.0f} tokens/s per rank on {row['ranks']} ranks, {flops / 1e12:.2f} TFLOP/s"


def _question(options: argparse.Namespace, machines: "Machines") -> "PlanRequest":
    from tinyllama_ds.planning.plan import PlanRequest

    return PlanRequest(
        options.recipe,
        options.deepspeed_config,
        machines,
        attention=options.attention,
        is_compiled=options.compile != "off",
        recompute_every=options.activation_checkpointing,
        tokens_per_second=options.tokens_per_second,
        price_per_hour=options.price_per_hour,
        save_seconds=options.save_seconds,
    )


def _source_sizes(data: Path | None, inputs: "Inputs") -> dict[str, int]:
    """Tokens of each source, the fillers of packs included: of the prepared data, or as published."""
    from tinyllama_ds.planning.timeline import PUBLISHED_TOKENS

    if data is None:
        return {name: PUBLISHED_TOKENS[name] for name in inputs.recipe.sources if name in PUBLISHED_TOKENS}
    from tinyllama_ds.data.loader import open_streams

    if not data.is_dir():
        raise ConfigError(f"{data}: the data directory is missing")
    streams = open_streams(data, inputs.recipe.sources, "train", inputs.model.vocab_size)
    T = inputs.recipe.sequence_length
    samples = {name: stream.num_samples(T) for name, stream in streams.items()}
    return {name: samples[name] * T if stream.has_loss_mask else stream.tokens for name, stream in streams.items()}


def _write_pictures(options: argparse.Namespace, found: "Plan", tables: list) -> None:
    if not (options.picture or options.html):
        return
    from tinyllama_ds.outputs import drawn, write_figure, write_file
    from tinyllama_ds.planning.page import as_html, headline
    from tinyllama_ds.planning.picture import picture_of

    picture = picture_of(found)
    if options.picture:
        write_figure(picture, options.picture)
    if options.html:
        write_file(options.html, as_html(headline(found), found.fits, tables, found.warnings, drawn(picture)))


def _how_to_start(options: argparse.Namespace, ranking: "Ranking") -> str:
    best = ranking.candidates[0]
    config = options.write_config or "FILE (--write-config FILE writes it)"
    flags = f" --activation-checkpointing {best.work.recompute_every}" if best.work.recompute_every else ""
    flags += f" --compile {options.compile}" if options.compile != "auto" else ""
    return f"\n\nstart it with: pretrain --deepspeed-config {config}{flags}"


def _result(found: "Plan", ranking: "Ranking | None") -> dict:
    """The plan for programs: bytes, seconds, tokens, plain numbers throughout."""
    result = {
        "recipe": found.inputs.recipe.name,
        "layout": asdict(found.layout),
        "micro_batch": found.work.micro_batch,
        "accumulation": list(found.accumulations),
        "gpus": found.question.machines.hosts.ranks,
        "steps": found.inputs.plan.total_steps,
        "tokens": found.duration.tokens,
        "days": found.duration.days,
        "gpu_hours": found.duration.gpu_hours,
        "gpu_hours_per_300b_tokens": found.duration.gpu_hours_for(300e9),
        "tokens_per_second": found.duration.tokens_per_second,
        "usd": found.dollars,
        "memory": {
            "rows": [asdict(row) for row in (*found.memory.rows, *found.memory.overhead_rows)],
            "total": found.memory.total,
            "capacity": found.question.machines.gpu.memory_bytes,
            "fits": found.fits,
        },
        "step_seconds": [
            {"compute": s.compute, "communication": s.communication, "exposed": s.exposed, "optimizer": s.optimizer}
            for s in found.steps
        ],
        "communication": [asdict(part) for part in found.steps[0].traffic],
        "borders": [asdict(border) for border in found.course.borders],
        "tokens_by_source": found.course.tokens_by_source,
        "epochs": found.course.epochs,
        "failures": [asdict(expectation) for expectation in found.failures],
        "storage": asdict(found.storage) | {"total": found.storage.total},
        "deepspeed_config": found.resolved,
        "warnings": list(found.warnings),
    }
    if ranking:
        result["ranking"] = [
            {
                "layout": candidate.name,
                "micro_batch": candidate.work.micro_batch,
                "activation_checkpointing": candidate.work.recompute_every,
                "tokens_per_second_per_gpu": candidate.rate,
                "memory": candidate.memory.total,
            }
            for candidate in ranking.candidates
        ]
    return result


COMMANDS = (("plan", _add_plan, _plan),)
